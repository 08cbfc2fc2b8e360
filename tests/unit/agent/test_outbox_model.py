"""Any history of an outbox against a server that decides as the real one does: what arrives is what was made, or the rest is named.

The store is a real file, the server's decisions are its own ledger's. The network loses, repeats and reorders; the process is killed
(its files are taken as they stand) or restarted; acknowledgements are lost, late and old; the outbox is always near its bound.
"""

from __future__ import annotations

import bisect
import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from skerry_agent.store import Entry, RingAt, Store, open_store
from skerry_agent.upload import Upload
from skerry_contract import window as w
from skerry_contract import wire
from skerry_server import ledger

BOOT = "b" * 32
BOUND = 2500
MAX_RANGES, MAX_EXTRA = 8, 3
ACK_S = 30.0
epochs = itertools.count(1)


class Server:
    """What the server keeps: a ledger per epoch, windows and tombstones of what was new."""

    def __init__(self) -> None:
        self.held: dict[str, list[ledger.Held]] = {}
        self.at: dict[str, tuple[int, int]] = {}
        self.taken: dict[tuple[str, int], wire.Record] = {}
        self.conflicts = 0
        self.refused = 0
        """Records that replace more than a record may."""

    def take(self, payload: bytes) -> bytes:
        batch = wire.decode_batch(payload)
        rows = self.held.setdefault(batch.epoch, [])
        stream = ledger.Stream(
            *self.at.get(batch.epoch, (0, 0)),
            lambda low, high, most: [
                row for row in rows[bisect.bisect_left(rows, low, key=lambda row: row.seq) :] if row.low <= high
            ][:most],
        )
        for record in batch.records:
            malformed = len(record.replaces) > wire.MAX_RANGES
            if stream.take(record, wire.digest(record), malformed=malformed) == "new":
                if malformed:
                    self.refused += 1
                else:
                    self.taken[batch.epoch, record.seq] = record
        extra = stream.settle()
        self.held[batch.epoch] = sorted(rows + stream.added)
        self.at[batch.epoch] = stream.upto, stream.high
        self.conflicts += len(stream.conflicts)
        return wire.encode(
            wire.Ack(epoch=batch.epoch, upto=stream.upto, extra_ranges=extra, conflict=tuple(stream.conflicts))
        )

    def inferences(self) -> int:
        return sum(wire.decode_window(r.body).counts.ok for r in self.taken.values() if r.kind == "window")

    def told_lost(self) -> tuple[int, int]:
        """(records, inferences) that tombstones told of."""
        tombs = [wire.decode(wire.Tombstone, r.body) for r in self.taken.values() if r.kind == "tombstone"]
        return sum(tomb.records for tomb in tombs), sum(tomb.inferences for tomb in tombs)


class Device(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="skerry-outbox-"))
        # What a history of months reaches with the real numbers, one of minutes reaches with these.
        self.bounds = pytest.MonkeyPatch()
        self.bounds.setattr(wire, "MAX_RANGES", MAX_RANGES)
        self.bounds.setattr(ledger, "MAX_EXTRA", MAX_EXTRA)
        self.life = 0
        self.now_s = 0.0
        self.server = Server()
        self.up: list[bytes] = []
        self.acks: list[bytes] = []
        self.online = False
        self.made = self.ring = 0
        self.others = 0
        self.begun = 0
        self.store: Store | None = None

    @initialize()
    def start(self) -> None:
        self.open()

    def open(self) -> None:
        path = self.folder / f"{self.life}.db"
        self.store, opened = open_store(
            path, binding="m", device="d-1", new_epoch=lambda: f"{next(epochs):032x}", wall_s=0.0, bound_bytes=BOUND
        )
        assert opened.new_epoch == ("" if self.begun else "first")
        self.begun += 1
        # What a killed process leaves is in the files whether or not they were synchronised; power cuts are test_power_cut's.
        self.store._db.execute("PRAGMA synchronous = OFF")
        self.upload = Upload(self.store, self.publish, window=3, batch_bytes=700, ack_s=ACK_S)
        self.upload.open = self.online

    def publish(self, payload: bytes) -> bool:
        if self.online:
            self.up.append(payload)
        return self.online

    def at(self) -> w.Instant:
        return w.Instant(BOOT, int(self.now_s * 1e9), 0, False)

    # --- what happens ------------------------------------------------------------------------------------------------

    @rule(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6), stage=st.integers(0, 2), pad=st.integers(0, 12))
    def windows_are_cut(self, counts: list[int], stage: int, pad: int) -> None:
        key = w.Key("gas", "a" * 64, "v", "none", "", stage)
        entries = []
        for ok in counts:
            found = w.Window(
                key=key, start=self.at(), end=self.at(), counts=w.Counts(ok=ok), resources={f"r{i}_n": 1 for i in range(pad)}
            )  # fmt: skip
            entries.append(Entry(kind="window", body=wire.encode(found), key=str(stage), inferences=ok))
        self.store.append(entries, [RingAt(ring="r", upto=self.ring + sum(counts))])
        self.made += sum(counts)
        self.ring += sum(counts)

    @rule(kind=st.sampled_from(["event", "sample"]), size=st.integers(0, 300))
    def something_else_is_kept(self, kind: wire.Kind, size: int) -> None:
        self.store.append([Entry(kind=kind, body=bytes(size))])
        self.others += 1

    @rule(n=st.integers(2, 12), kinds=st.integers(1, 3))
    def windows_of_several_models_come_with_samples_between(self, n: int, kinds: int) -> None:
        entries = []
        for i in range(n):
            key = w.Key("gas", "a" * 64, "v", "none", "", i % kinds)
            found = w.Window(key=key, start=self.at(), end=self.at(), counts=w.Counts(ok=1), resources={"r_n": 1})
            entries.append(Entry(kind="window", body=wire.encode(found), key=str(i % kinds), inferences=1))
            entries.append(Entry(kind="sample", body=bytes(20)))
        self.store.append(entries, [RingAt(ring="r", upto=self.ring + n)])
        self.made += n
        self.ring += n
        self.others += n

    @rule()
    def the_outbox_is_brought_below_its_bound(self) -> None:
        self.store.compact(self.at())

    @rule()
    def a_step_of_that(self) -> None:
        self.store.compact(self.at(), rounds=1)

    @rule(passed_s=st.sampled_from([0.0, 1.0, ACK_S + 1]))
    def the_device_sends(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.upload.pump(self.now_s, self.at())

    @rule()
    def the_link_comes_or_goes(self) -> None:
        self.online = not self.online
        self.upload.open = self.online
        self.upload.again()

    @precondition(lambda self: self.up)
    @rule(data=st.data(), what=st.sampled_from(["taken", "taken", "taken", "repeated", "lost", "ack lost"]))
    def a_message_travels(self, data: st.DataObject, what: str) -> None:
        at = data.draw(st.integers(0, len(self.up) - 1))
        payload = self.up[at] if what == "repeated" else self.up.pop(at)
        if what != "lost":
            ack = self.server.take(payload)
            if what != "ack lost":
                self.acks.append(ack)

    @precondition(lambda self: self.acks)
    @rule(data=st.data(), again=st.booleans())
    def an_acknowledgement_arrives(self, data: st.DataObject, again: bool) -> None:
        at = data.draw(st.integers(0, len(self.acks) - 1))
        self.hear(self.acks[at] if again else self.acks.pop(at))

    def hear(self, payload: bytes) -> None:
        ack = wire.decode(wire.Ack, payload)
        assert self.store.acknowledge(ack).new_epoch == "", "nobody else has this outbox"
        self.upload.acknowledged(ack)

    @rule(killed=st.booleans())
    def the_process_ends_and_starts(self, killed: bool) -> None:
        if killed:
            self.life += 1
            for suffix in ("", "-wal"):
                source = self.folder / f"{self.life - 1}.db{suffix}"
                if source.exists():
                    shutil.copy(source, self.folder / f"{self.life}.db{suffix}")
        self.store.close()
        self.open()

    # --- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def no_seq_stands_for_two_records(self) -> None:
        assert self.server.conflicts == 0

    @invariant()
    def no_record_stands_for_more_than_one_may(self) -> None:
        assert self.server.refused == 0

    @invariant()
    def the_ring_is_committed_as_far_as_its_windows(self) -> None:
        if self.store is not None and self.ring:
            assert self.store.ring_upto("r") == self.ring

    def teardown(self) -> None:
        try:
            if self.store is not None:
                self.everything_arrives(self.store)
        finally:
            self.bounds.undo()

    def everything_arrives(self, store: Store) -> None:
        self.online = self.upload.open = True
        self.upload.again()
        rounds = 0
        while self.store.pending()[0]:
            self.now_s += 1.0
            self.upload.pump(self.now_s, self.at())
            assert self.up or self.acks, "something waits, and nothing is sent"
            while self.up:
                self.acks.append(self.server.take(self.up.pop(0)))
            while self.acks:
                self.hear(self.acks.pop(0))
            rounds += 1
            assert rounds < 500
        lost = self.store.lost()
        records, inferences = self.server.told_lost()
        assert self.server.inferences() + inferences == self.made
        assert inferences == lost.get("inferences_dropped", 0)
        assert records == sum(n for cause, n in lost.items() if cause != "inferences_dropped")
        others = sum(r.kind in ("event", "sample") for r in self.server.taken.values())
        gone = sum(n for cause, n in lost.items() if cause.startswith(("samples_", "events_")))
        assert others + gone == self.others
        # Every seq that was given out is held, stood for or told of: the server's account has no gap.
        upto, high = self.server.at.get(self.store.epoch, (0, 0))
        assert upto == high == self.store.last_seq
        self.store.close()
        shutil.rmtree(self.folder)


TestOutboxAndServer = Device.TestCase
TestOutboxAndServer.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
