"""Each record once, and upto from the database."""

import pytest
from skerry_contract import wire
from skerry_server.db import tables as t


def test_records_are_taken_and_acknowledged(server, make):
    ack = server.ack(make.up("dev-a", make.record(1), make.record(2)))
    assert (ack.upto, ack.extra_ranges, ack.conflict) == (2, (), ())
    assert server.counted() == 20
    assert [row["seq"] for row in server.rows(t.windows)] == [1, 2]
    assert server.rows(t.windows)[0]["body"] == make.record(1).body


def test_a_replayed_record_is_acknowledged_again_and_not_counted(server, make):
    server.take(make.up("dev-a", make.record(1)))
    for _ in range(3):
        assert server.ack(make.up("dev-a", make.record(1))).upto == 1
    assert server.counted() == 10
    assert server.rows(t.streams)[0]["duplicates"] == 3


def test_the_same_record_twice_in_one_transaction_is_counted_once(server, make):
    message = make.up("dev-a", make.record(1))
    assert server.ack(message, message).upto == 1
    assert server.counted() == 10


def test_same_seq_other_content_is_a_conflict_and_never_taken(server, make):
    server.take(make.up("dev-a", make.record(1), make.record(2)))
    ack = server.ack(make.up("dev-a", make.record(2, make.window(ok=99)), make.record(3)))
    assert (ack.upto, ack.conflict) == (3, (2,))
    assert server.counted() == 30
    assert server.rows(t.streams)[0]["conflicts"] == 1
    # What was refused is kept for a person to look at.
    assert server.rows(t.quarantine)[0]["payload"] == make.record(2, make.window(ok=99)).body


def test_the_same_seq_in_another_epoch_is_another_record(server, make):
    server.take(make.up("dev-a", make.record(1)))
    outcome = server.take(make.up("dev-a", make.record(1), epoch="2" * 32))
    assert outcome.acks["dev-a", "2" * 32].upto == 1
    assert server.counted() == 20


def test_a_gap_is_told_and_closed_by_what_comes_late(server, make):
    ack = server.ack(make.up("dev-a", make.record(1), make.record(4), make.record(5), make.record(8)))
    assert (ack.upto, ack.extra_ranges) == (1, ((4, 5), (8, 8)))
    ack = server.ack(make.up("dev-a", make.record(2)))
    assert (ack.upto, ack.extra_ranges) == (2, ((4, 5), (8, 8)))
    ack = server.ack(make.up("dev-a", make.record(3)))
    assert (ack.upto, ack.extra_ranges) == (5, ((8, 8),))
    ack = server.ack(make.up("dev-a", make.record(6), make.record(7)))
    assert (ack.upto, ack.extra_ranges) == (8, ())


def test_what_is_answered_is_named_however_many_holes_there_are_below_it(server, make):
    """A device sends windows before samples: each sample between two windows is a hole until all windows are through."""
    body = make.window(ok=1)
    held = set()
    ups = [
        make.up("dev-a", *(make.record(seq, body) for seq in range(low, low + 800, 2))) for low in range(1, 12_001, 800)
    ]
    for low, up in zip(range(1, 12_001, 800), ups, strict=True):
        ack = server.ack(up)
        assert len(ack.extra_ranges) <= 2000
        named = {seq for first, last in ack.extra_ranges for seq in range(first, last + 1)} | set(
            range(1, ack.upto + 1)
        )
        assert set(range(low, low + 800, 2)) <= named
        held |= set(range(low, low + 800, 2))
        assert named <= held
    again = server.ack(ups[-1])
    named = {seq for first, last in again.extra_ranges for seq in range(first, last + 1)}
    assert set(range(11_201, 12_001, 2)) <= named, "a copy is answered like the first one"
    for low in range(2, 12_001, 800):
        ack = server.ack(make.up("dev-a", *(make.record(seq, body) for seq in range(low, low + 800, 2))))
        assert ack.upto >= min(low + 799, 12_000), "a hole that closes moves it over all that follows"
    assert (ack.upto, ack.extra_ranges) == (12_000, ())
    assert server.counted() == 12_000


def test_upto_comes_from_the_database_not_from_the_batch(server, make):
    server.take(make.up("dev-a", make.record(2)), make.up("dev-a", make.record(3)))
    assert server.ack(make.up("dev-a", make.record(3))).extra_ranges == ((2, 3),)
    assert server.ack(make.up("dev-a", make.record(1))).upto == 3


def test_a_merged_record_stands_for_what_it_replaces(server, make):
    server.take(make.up("dev-a", make.record(4)))
    ack = server.ack(make.up("dev-a", make.record(5, make.window(ok=30), replaces=[(1, 3)])))
    assert ack.upto == 5
    assert server.counted() == 40
    kinds = [(row["low"], row["seq"], row["kind"]) for row in server.rows(t.ledger)]
    assert kinds == [(1, 3, "replaced"), (4, 4, "window"), (5, 5, "window")]


def test_a_late_copy_of_a_replaced_record_is_not_counted_again(server, make):
    server.take(make.up("dev-a", make.record(4, make.window(ok=30), replaces=[(1, 3)])))
    ack = server.ack(make.up("dev-a", make.record(2)))
    assert (ack.upto, ack.conflict) == (4, ())
    assert server.counted() == 30


@pytest.mark.parametrize("replaces", [[(1, 3)], [(2, 2)], [(3, 4)], [(1, 1), (3, 3)]])
def test_a_merged_record_that_overlaps_what_was_counted_is_refused(server, make, replaces):
    server.take(make.up("dev-a", make.record(2), make.record(3)))
    merged = make.record(9, make.window(ok=500), replaces=replaces)
    ack = server.ack(make.up("dev-a", merged))
    assert (ack.upto, ack.extra_ranges, ack.conflict) == (0, ((2, 3),), (9,))
    assert server.counted() == 20
    # None of the seqs it names was entered: a record of theirs that comes is new and is counted.
    assert server.ack(make.up("dev-a", make.record(1))).upto == 3
    assert server.counted() == 30


def test_two_merged_records_cannot_stand_for_the_same(server, make):
    server.take(make.up("dev-a", make.record(5, make.window(ok=40), replaces=[(1, 4)])))
    ack = server.ack(make.up("dev-a", make.record(6, make.window(ok=20), replaces=[(3, 4)])))
    assert ack.conflict == (6,)
    assert server.counted() == 40


def test_overlap_within_one_batch_is_seen(server, make):
    ack = server.ack(
        make.up("dev-a", make.record(1), make.record(2), make.record(3, make.window(ok=20), replaces=[(1, 2)]))
    )
    assert (ack.upto, ack.conflict) == (2, (3,))
    assert server.counted() == 20


def test_a_merge_of_a_merge_names_all_and_is_taken(server, make):
    # 1-2 became 3, then 3 and 4 became 5; neither 3 nor 4 was ever sent.
    ack = server.ack(make.up("dev-a", make.record(5, make.window(ok=40), replaces=[(1, 4)])))
    assert ack.upto == 5


def test_a_tombstone_closes_the_gap_and_is_reported(server, make):
    outcome = server.take(make.up("dev-a", make.record(1), make.tombstone(5, [(2, 4)])))
    assert outcome.acks["dev-a", make.EPOCH].upto == 5
    assert server.rows(t.streams)[0]["tombstoned"] == 3
    event = server.rows(t.events)[0]
    assert (event["name"], event["code"], event["data"]["inferences"]) == ("tombstone", "outbox_full", 7)


def test_a_tombstone_over_what_is_held_enters_the_rest(server, make):
    server.take(make.up("dev-a", make.record(2), make.record(3)))
    ack = server.ack(make.up("dev-a", make.tombstone(6, [(1, 5)])))
    assert (ack.upto, ack.conflict) == (6, ())
    assert server.counted() == 20
    assert server.rows(t.streams)[0]["tombstoned"] == 3


def test_a_replaced_range_costs_one_row_however_long(server, make):
    ack = server.ack(make.up("dev-a", make.record(wire.MAX_SEQ, make.window(), replaces=[(1, wire.MAX_SEQ - 1)])))
    assert ack.upto == wire.MAX_SEQ
    assert len(server.rows(t.ledger)) == 2


def test_any_order_and_batching_ends_the_same(server, make):
    import random

    records = [make.record(i, make.window(ok=i)) for i in range(1, 31)]
    records[9] = make.record(10, make.window(ok=55), replaces=[(5, 9)])
    kept = records[:4] + records[9:]
    chance = random.Random(7)
    for trial in range(10):
        device_epoch = f"{trial:032x}"
        todo = kept * 2
        chance.shuffle(todo)
        while todo:
            n = chance.randint(1, 7)
            part = sorted({r.seq: r for r in todo[:n]}.values(), key=lambda r: r.seq)
            todo = todo[n:]
            ack = server.ack(make.up("dev-a", *part, epoch=device_epoch), epoch=device_epoch)
        assert (ack.upto, ack.extra_ranges, ack.conflict) == (30, (), ())
    assert server.counted() == 10 * (sum(range(1, 5)) + 55 + sum(range(11, 31)))
