"""The outbox below its bound: carries out what ``core.retention`` decides, and leaves a tombstone for what is dropped.

Only records of the present epoch that were never sent can give way: what the server may hold already stays as it is.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import ContractError

from skerry_agent.core import merging, retention
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import ballast
from skerry_agent.store.database import WAL_PAGES
from skerry_agent.store.outbox import AT_ONCE, Entry, Outbox, RecordDamaged, RingAt

log = logging.getLogger(__name__)


_PLANNED_ROWS = 2000
"""Records of one kind, the oldest, among which a step of retention chooses: a long backlog is never loaded whole."""
_INDEX_BYTES = 32 * 1024
"""What the index of the write-ahead log takes on disk."""
_TOMBS_AT_ONCE = 8
"""Older tombstones that one drop takes up: what is not among the newest is full."""
_LEAST_PAGES = 64
"""Free pages of the file in which windows still find room on a full file system."""
_LEAST_SHARE = 8
"""However full others make the file system, the outbox keeps this part of its bound."""


class Store(Outbox):
    """The device's store. Made by ``open_store``.

    Args:
        bound_bytes: what waiting records may take.
        files_bound_bytes: what the file, its write-ahead log and the index of that may take on disk; 0: not bounded.
        free_bytes: what the outbox leaves free on its file system, as far as it can.
    """

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        new_epoch: Callable[[], str],
        bound_bytes: int,
        files_bound_bytes: int = 0,
        free_bytes: int = 0,
    ) -> None:
        super().__init__(path, connection, new_epoch)
        self.bound_bytes = bound_bytes
        self.files_bound_bytes = files_bound_bytes
        self.free_bytes = free_bytes
        self._planned: deque[retention.Action] = deque()
        """What is still to be done of a plan, so that a step does not look at everything again; ``_planned_for``: the epoch it is of."""
        self._planned_for = ""

    def load(self) -> tuple[int, int]:
        """(bytes used, bytes allowed) of whichever bound is nearer: of records, or of pages in the file."""
        records = self.pending()[1], self.bound_bytes
        if not self.files_bound_bytes:
            return records
        pages = self.live_bytes(), self._allowed_bytes()
        return max(records, pages, key=lambda one: one[0] / max(1, one[1]))

    def _allowed_bytes(self) -> int:
        """What the pages in use may take, so that they and the log stay within the bound and the file system keeps its rest."""
        bound = self.files_bound_bytes - 2 * WAL_PAGES * self.page_bytes - _INDEX_BYTES
        if self.free_bytes:
            # Free pages of the file are room that this store has taken already.
            ((pages,),) = self.read("PRAGMA page_count")
            room = ballast.room(self.path.parent)[0] - self.free_bytes
            bound = min(bound, int(pages) * self.page_bytes + room)
        return max(bound, self.files_bound_bytes // _LEAST_SHARE)

    def held_up(self) -> bool:
        """Whether the log cannot be carried over into the file, since a reader of another program needs it, and is at its bound."""
        if not self.files_bound_bytes or self.log_bytes() <= 2 * WAL_PAGES * self.page_bytes:
            return False
        return not self.checkpoint()

    def append(self, entries: Iterable[Entry], rings: Iterable[RingAt] = ()) -> tuple[int, ...]:
        """See ``Outbox.append``.

        Raises:
            Degraded: also ``store_busy`` while ``held_up``: what waits for room must not make the log longer; and ``store_full``
                on a full file system: its last room is for what frees some.
        """
        if self.free_bytes and ballast.full(self.path.parent) and self._free_pages() < _LEAST_PAGES:
            raise Degraded(
                "store_full", f"{self.path}: the file system is full", advice="make room on the device's disk"
            )
        if self.held_up():
            raise Degraded(
                "store_busy", f"{self.path}: the log is {self.log_bytes()} bytes long and a reader holds it",
                advice="end the program that has the file open",
            )  # fmt: skip
        return super().append(entries, rings)

    def compact(self, at: w.Instant, *, rounds: int = 1 << 30, more: Callable[[], bool] = lambda: True) -> int:
        """Brings the outbox below its bounds by ``core.retention``. Returns the bytes of records that went.

        Args:
            rounds: most transactions of this call; whoever has other work calls again.
            more: whether there is time for more than what was done so far; asked after each step, the shortest there is.
        """
        started = waiting = self.pending()[1]
        while True:
            if not self._planned or self._planned_for != self.epoch:
                self._plan()
                if not self._planned:
                    break
                waiting = self.pending()[1]
            try:
                self._some(at, more)
            except RecordDamaged as error:
                self._planned.clear()
                self.drop(error.epoch, error.seq, at, "record_damaged")
            except Exception:
                # What was taken off the plan was not done.
                self._planned.clear()
                raise
            rounds -= 1
            if rounds <= 0 or not more():
                break
            if not self._planned and self.pending()[1] >= waiting:
                break
        return started - self.pending()[1]

    def within_bounds(self) -> bool:
        """Whether there is nothing to compact."""
        used, bound = self.load()
        return used <= bound and not self._planned

    @property
    def planned(self) -> bool:
        """Whether something of a plan is still to be done."""
        return bool(self._planned)

    def _plan(self) -> None:
        self._planned.clear()
        self._planned_for = self.epoch
        used, bound = self.load()
        if used > bound:
            for action in retention.plan_retention(self._oldest(), used, bound):
                if isinstance(action, retention.Merge):
                    self._planned.append(action)
                else:
                    self._planned += [
                        retention.Drop(seqs=action.seqs[at : at + AT_ONCE], why=action.why)
                        for at in range(0, len(action.seqs), AT_ONCE)
                    ]

    def _some(self, at: w.Instant, more: Callable[[], bool]) -> None:
        """One transaction: the log holds what it changed, and is within the bound too."""
        used, bound = self.load()
        if used <= int(bound * retention.LOW_WATER):
            # Acknowledgements made room meanwhile.
            self._planned.clear()
            return
        taken = 0
        with self.transaction():
            while self._planned and taken < AT_ONCE:
                action = self._planned.popleft()
                # Since it was planned, some may have been sent, or are gone.
                seqs = self._free_seqs(action.seqs)
                taken += len(action.seqs)
                if isinstance(action, retention.Drop):
                    if seqs:
                        self._drop(retention.Drop(seqs=seqs, why=action.why), at)
                elif len(seqs) > 1:
                    self._merge(seqs)
                if not more():
                    break

    def _free_seqs(self, seqs: tuple[int, ...]) -> tuple[int, ...]:
        query = "SELECT 1 FROM outbox WHERE epoch = ? AND seq = ? AND sent = 0"
        return tuple(seq for seq in seqs if self.read(query, (self.epoch, seq)))

    def tidy(self) -> int:
        """See ``Database.tidy``; also takes the ballast again once there is room for it."""
        if self.free_bytes:
            ballast.restock(self.path.parent, leave_bytes=self.free_bytes)
        return super().tidy()

    def _make_room(self) -> None:
        if self.free_bytes and ballast.spend(self.path.parent):
            log.error("ballast given up", extra=kv(code="store_full", detail=str(self.path)))

    def _free_pages(self) -> int:
        return int(self.read("PRAGMA freelist_count")[0][0])

    def _oldest(self) -> list[retention.Row]:
        found: list[retention.Row] = []
        for kind in wire.KINDS:
            found += self.rows(
                "SELECT seq, kind, key, size, sent FROM outbox INDEXED BY outbox_waiting "
                "WHERE epoch = ? AND kind = ? AND sent = 0 ORDER BY seq LIMIT ?",
                (self.epoch, kind, _PLANNED_ROWS),
            )
        return sorted(found, key=lambda row: row.seq)

    def _merge(self, seqs: tuple[int, ...]) -> None:
        records = self._of_one_life([self.record(self.epoch, seq) for seq in seqs])
        seqs = tuple(record.seq for record in records)
        key, _ = self.weigh(seqs)
        room = retention.together([_stands_for(record) for record in records], _most_ranges())[0]
        ended = room < len(seqs)
        seqs, records = seqs[:room], records[:room]
        if room == 1:
            # Its neighbours are of another life, or between them lie more other records than a record may stand for.
            self._keep_apart(key, seqs)
            return
        try:
            windows = [wire.decode(w.Window, record.body, max_bytes=wire.MAX_INFLATED_BYTES) for record in records]
            merged = [(wire.encode(window), n) for window, n in merging.merge_some(windows, self.boots())]
        except (ValueError, ContractError) as error:
            # Bins that differ under one key cannot be added, bytes that are no window neither.
            log.warning("windows cannot merge", extra=kv(code="unmergeable", key=key, detail=str(error)))
            self._keep_apart(key, seqs)
            return
        except Exception:
            # A bug, or a window that nobody foresaw: no reason to end, and none to try these again for ever.
            log.exception("windows cannot merge", extra=kv(code="unmergeable", key=key))
            self._keep_apart(key, seqs)
            return
        start = 0
        for i, (body, n) in enumerate(merged):
            group, start = seqs[start : start + n], start + n
            # Nothing more goes into one to which its neighbour could not be added; the last may still take some.
            full = ended or i < len(merged) - 1
            if n == 1:
                if full:
                    self._keep_apart(key, group)
                continue
            _, inferences = self.weigh(group)
            self.remove(group)
            self.insert(
                Entry(kind="window", body=body, key=f"{key}#{group[0]}" if full else key, inferences=inferences),
                _replaced(records[start - n : start]),
            )

    def _of_one_life(self, records: list[wire.Record]) -> list[wire.Record]:
        """The most that may merge: what another life of this outbox may have sent does not merge with what only this one made."""
        starts = self.starts(self.epoch)
        found: dict[str, list[wire.Record]] = {}
        for record in records:
            found.setdefault(starts.life(record.seq, record.replaces), []).append(record)
        return max(found.values(), key=len)

    def _keep_apart(self, key: str, seqs: tuple[int, ...]) -> None:
        self._db.executemany(
            "UPDATE outbox SET key = ? WHERE epoch = ? AND seq = ?", [(f"{key}#{seq}", self.epoch, seq) for seq in seqs]
        )

    def _drop(self, action: retention.Drop, at: w.Instant) -> None:
        # Older tombstones of the same reason are taken up, so that they cannot fill the outbox in their turn.
        tombs = [
            int(row[0])
            for row in self._db.execute(
                "SELECT seq FROM outbox WHERE epoch = ? AND kind = 'tombstone' AND key = ? AND sent = 0 "
                "ORDER BY seq DESC LIMIT ?",
                (self.epoch, action.why, _TOMBS_AT_ONCE),
            )
        ][::-1]
        records = [self.record(self.epoch, seq) for seq in (*tombs, *action.seqs)]
        start = 0
        for n in retention.together([_stands_for(record) for record in records], _most_ranges()):
            group, start = records[start : start + n], start + n
            if n > 1 or group[0].kind != "tombstone":
                self._bury(group, action.why, at)

    def _bury(self, records: list[wire.Record], why: str, at: w.Instant) -> None:
        """One tombstone instead of records; what older ones among them tell, it tells too."""
        gone = tuple(record.seq for record in records if record.kind != "tombstone")
        _, inferences = self.weigh(gone)
        dropped = len(gone)
        if dropped:
            self.count_lost(why, dropped)
        if inferences:
            self.count_lost("inferences_dropped", inferences)
        for record in records:
            if record.kind == "tombstone":
                old = wire.decode(wire.Tombstone, record.body)
                dropped, inferences = dropped + old.records, inferences + old.inferences
        self.remove([record.seq for record in records])
        body = wire.encode(wire.Tombstone(at=at, why=why, records=dropped, inferences=inferences))
        self.insert(Entry(kind="tombstone", body=body, key=why), _replaced(records))

    def drop(self, epoch: str, seq: int, at: w.Instant, why: str) -> None:
        """Gives up one record that can never be sent, with a tombstone."""
        with self.transaction():
            ((inferences, spans),) = self.read(
                "SELECT inferences, replaces FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq)
            )
            inferences = inferences if isinstance(inferences, int) and inferences > 0 else 0
            self._db.execute("DELETE FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq))
            self.count_lost(why, 1)
            if inferences:
                self.count_lost("inferences_dropped", inferences)
            if epoch != self.epoch:
                # A former epoch gives out no seq any more: the device's own counters name what is gone.
                return
            body = wire.encode(wire.Tombstone(at=at, why=why, records=1, inferences=inferences))
            self.insert(
                Entry(kind="tombstone", body=body, key=why),
                _replaced([wire.Record(seq=seq, kind="window", body=b"", replaces=_readable(spans, seq))]),
            )


def _readable(spans: bytes, seq: int) -> tuple[wire.Range, ...]:
    """What a damaged record replaced, as far as that makes sense."""
    try:
        found = msgspec.json.decode(spans, type=tuple[wire.Range, ...])
    except (msgspec.DecodeError, TypeError):
        return ()
    last = 0
    for low, high in found:
        if not last < low <= high < seq:
            return ()
        last = high
    return found


def _most_ranges() -> int:
    """Half of what the server takes: what is dropped or damaged afterwards adds a range each time."""
    return wire.MAX_RANGES // 2


def _stands_for(record: wire.Record) -> tuple[wire.Range, ...]:
    return (*record.replaces, (record.seq, record.seq))


def _replaced(records: Iterable[wire.Record]) -> tuple[wire.Range, ...]:
    return retention.join_ranges(span for record in records for span in _stands_for(record))
