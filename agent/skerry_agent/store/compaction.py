"""The outbox below its bound: carries out what ``core.retention`` decides, and leaves a tombstone for what is dropped.

Only records of the present epoch that were never sent can give way: what the server may hold already stays as it is.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import ContractError

from skerry_agent.core import retention
from skerry_agent.logs import kv
from skerry_agent.store.outbox import Entry, Outbox

log = logging.getLogger(__name__)


class Store(Outbox):
    """The device's store. Made by ``open_store``. ``bound_bytes``: what the outbox may hold."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, new_epoch: Callable[[], str], bound_bytes: int
    ) -> None:
        super().__init__(path, connection, new_epoch)
        self.bound_bytes = bound_bytes

    def compact(self, at: w.Instant) -> int:
        """Brings the outbox below its bound by ``core.retention``. Returns the bytes freed."""
        started = self.pending()[1]
        used = started
        while True:
            rows = self.rows(
                "SELECT seq, kind, key, size, sent FROM outbox WHERE epoch = ? ORDER BY seq", (self.epoch,)
            ) if used > self.bound_bytes else []  # fmt: skip
            actions = retention.plan_retention(rows, used, self.bound_bytes)
            if not actions:
                return started - used
            with self.transaction():
                for action in actions:
                    if isinstance(action, retention.Merge):
                        self._merge(action.seqs)
                    else:
                        self._drop(action, at)
            left = self.pending()[1]
            if left >= used:
                return started - left
            used = left

    def _merge(self, seqs: tuple[int, ...]) -> None:
        records = [self.record(self.epoch, seq) for seq in seqs]
        key, inferences = self.weigh(seqs)
        try:
            windows = [wire.decode(w.Window, record.body, max_bytes=wire.MAX_INFLATED_BYTES) for record in records]
            merged = windows[0]
            for window in windows[1:]:
                merged = w.merge(merged, window)
        except (ValueError, ContractError) as error:
            # Bins that differ under one key cannot be added, bytes that are no window neither: these stay apart for ever.
            log.warning("windows cannot merge", extra=kv(code="unmergeable", key=key, detail=str(error)))
            self._db.executemany(
                "UPDATE outbox SET key = ? WHERE epoch = ? AND seq = ?",
                [(f"{key}#{seq}", self.epoch, seq) for seq in seqs],
            )
            return
        self.remove(seqs)
        body = wire.encode(merged)
        self.insert(self.epoch, Entry(kind="window", body=body, key=key, inferences=inferences), _replaced(records))

    def _drop(self, action: retention.Drop, at: w.Instant) -> None:
        # Older tombstones of the same reason are taken up, so that they cannot fill the outbox in their turn.
        tombs = [
            int(row[0])
            for row in self._db.execute(
                "SELECT seq FROM outbox WHERE epoch = ? AND kind = 'tombstone' AND key = ? AND sent = 0",
                (self.epoch, action.why),
            )
        ]
        records = [self.record(self.epoch, seq) for seq in (*tombs, *action.seqs)]
        _, inferences = self.weigh(action.seqs)
        dropped = len(action.seqs)
        self.count_lost(action.why, dropped)
        if inferences:
            self.count_lost("inferences_dropped", inferences)
        for record in records[: len(tombs)]:
            old = wire.decode(wire.Tombstone, record.body)
            dropped, inferences = dropped + old.records, inferences + old.inferences
        self.remove((*tombs, *action.seqs))
        body = wire.encode(wire.Tombstone(at=at, why=action.why, records=dropped, inferences=inferences))
        self.insert(self.epoch, Entry(kind="tombstone", body=body, key=action.why), _replaced(records))

    def drop(self, epoch: str, seq: int, at: w.Instant, why: str) -> None:
        """Gives up one record that can never be sent, with a tombstone."""
        with self.transaction():
            if epoch != self.epoch:
                self._db.execute("DELETE FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq))
                self.count_lost(why, 1)
                return
            record = self.record(epoch, seq)
            _, inferences = self.weigh((seq,))
            self.remove((seq,))
            self.count_lost(why, 1)
            body = wire.encode(wire.Tombstone(at=at, why=why, records=1, inferences=inferences))
            self.insert(epoch, Entry(kind="tombstone", body=body, key=why), _replaced([record]))


def _replaced(records: Iterable[wire.Record]) -> tuple[wire.Range, ...]:
    spans: list[wire.Range] = []
    for record in records:
        spans.append((record.seq, record.seq))
        spans += record.replaces
    return retention.join_ranges(spans)
