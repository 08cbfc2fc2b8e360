"""What goes first when the outbox is full, and what is sent next."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.core import retention as r

rows = st.lists(
    st.tuples(
        st.sampled_from(["window", "event", "sample", "tombstone"]),
        st.sampled_from("ab"),
        st.integers(1, 500),
        st.booleans(),
    ),
    max_size=60,
).map(
    lambda found: [
        r.Row(seq=i, kind=k, key=key, size=size, sent=sent) for i, (k, key, size, sent) in enumerate(found, 1)
    ]
)


def row(seq: int, kind: str = "window", key: str = "a", size: int = 100, *, sent: bool = False) -> r.Row:
    return r.Row(seq=seq, kind=kind, key=key, size=size, sent=sent)  # type: ignore[arg-type]


def test_nothing_goes_while_all_fits() -> None:
    assert r.plan_retention([row(1), row(2)], 200, 200) == ()


def test_windows_of_one_key_merge_before_anything_is_dropped() -> None:
    found = [row(1), row(2, key="b"), row(3), row(4, "sample"), row(5, "event")]
    assert r.plan_retention(found, 500, 400) == (r.Merge(seqs=(1, 3)),)


def test_samples_go_before_events_and_events_before_windows() -> None:
    lone = [row(1), row(2, key="b"), *(row(seq, "sample") for seq in range(3, 11)), row(11, "event")]
    (action,) = r.plan_retention(lone, 1100, 400)
    assert action == r.Drop(seqs=(3, 5, 7), why="samples_thinned")
    events = [row(seq, "event", size=10) for seq in range(1, 301)] + [row(400)]
    (action,) = r.plan_retention(events, 3100, 2000)
    assert isinstance(action, r.Drop)
    assert action.why == "events_dropped"
    assert max(action.seqs) <= 100
    (action,) = r.plan_retention([row(1), row(2, key="b"), row(3, "event")], 300, 200)
    assert action == r.Drop(seqs=(1, 2), why="windows_dropped")


@given(rows, st.integers(1, 20_000))
def test_a_frozen_record_is_never_touched_and_every_action_is_about_real_records(
    found: list[r.Row], bound: int
) -> None:
    used = sum(row.size for row in found)
    touched: set[int] = set()
    for action in r.plan_retention(found, used, bound):
        assert not touched & set(action.seqs)
        touched |= set(action.seqs)
        if isinstance(action, r.Merge):
            assert len({found[seq - 1].key for seq in action.seqs}) == 1
            assert all(found[seq - 1].kind == "window" for seq in action.seqs)
    assert all(not found[seq - 1].sent for seq in touched)


@given(rows, st.integers(1, 20_000))
def test_carried_out_again_and_again_it_ends(found: list[r.Row], bound: int) -> None:
    seq = len(found)
    for _ in range(300):
        actions = r.plan_retention(found, sum(row.size for row in found), bound)
        if not actions:
            return
        for action in actions:
            gone = [row for row in found if row.seq in action.seqs]
            found = [row for row in found if row.seq not in action.seqs]
            seq += 1
            if isinstance(action, r.Merge):
                found.append(r.Row(seq=seq, kind="window", key=gone[0].key, size=max(row.size for row in gone)))
            else:
                found = [row for row in found if row.kind != "tombstone" or row.key != action.why or row.sent]
                found.append(r.Row(seq=seq, kind="tombstone", key=action.why, size=80))
    raise AssertionError("retention does not settle")


@given(rows, st.integers(1, 2000), st.integers(1, 20))
def test_a_batch_is_ascending_bounded_and_holds_nothing_in_flight(
    found: list[r.Row], max_bytes: int, most: int
) -> None:
    flying = {row.seq for row in found if row.seq % 3 == 0}
    seqs = r.next_batch(found, flying, max_bytes=max_bytes, max_records=most)
    assert list(seqs) == sorted(set(seqs))
    assert not flying & set(seqs)
    assert len(seqs) <= most
    assert len(seqs) == 1 or sum(found[seq - 1].size for seq in seqs) <= max_bytes
    assert bool(seqs) == any(row.seq not in flying for row in found)


def test_events_are_sent_before_windows_and_windows_before_samples() -> None:
    found = [row(1, "sample"), row(2), row(3, "event"), row(4)]
    assert r.next_batch(found, (), max_bytes=250, max_records=9) == (2, 3)


@given(st.sets(st.integers(1, 60)))
def test_ranges_hold_exactly_the_seqs(seqs: set[int]) -> None:
    ranges = r.ranges_of(seqs)
    assert {s for low, high in ranges for s in range(low, high + 1)} == seqs
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(ranges))
    assert r.join_ranges((s, s) for s in seqs) == ranges
