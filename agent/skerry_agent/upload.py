"""What of the outbox is on its way: a bounded number of batches, each until the *server* acknowledged it.

A broker's PUBACK frees nothing. A batch that is not acknowledged in time, or was on its way when the session or the
server ended, is sent again, after a longer wait each time; the server takes each record once. Records are frozen on disk
before they leave.

What a long outage held up leaves at a bounded rate: the link, and a server that a whole fleet comes back to, have other work too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import msgspec
from skerry_contract import wire
from skerry_contract.window import Instant

from skerry_agent.logs import kv
from skerry_agent.store import RecordDamaged

log = logging.getLogger(__name__)

_MAX_RECORDS = 400
_MOST_DOUBLINGS = 4
BURST_S = 4.0
"""After a pause so many seconds' worth may leave at once: what an ordinary interval made does not wait."""


class Outbox(Protocol):
    """What uploading needs of the store."""

    def next_batch(
        self, in_flight: Collection[tuple[str, int]], *, max_bytes: int, max_records: int
    ) -> wire.Batch | None:
        """The next records, None when nothing waits."""
        ...

    def mark_sent(self, epoch: str, seqs: tuple[int, ...]) -> None:
        """Freezes records durably."""
        ...

    def drop(self, epoch: str, seq: int, at: Instant, why: str) -> None:
        """Gives up a record that cannot be sent."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    epoch: str
    seqs: tuple[int, ...]
    until_s: float


class Upload:
    """See the module.

    Args:
        outbox: where records wait.
        publish: hands bytes to the session; False without one.
        opened: a record's body as it is sent, of what lies on the disk; None for what cannot be read any more.
        window: batches in flight at most; batch_bytes: of bodies per batch; ack_s: patience per batch, seconds.
        owed: whether the broker has yet to take something that was published: until then nothing is sent a second time.
        rate_bytes_s: of messages, what is sent again included, bytes per second in the mean; 0: not limited.
    """

    def __init__(
        self,
        outbox: Outbox,
        publish: Callable[[bytes], bool],
        *,
        window: int,
        batch_bytes: int,
        ack_s: float,
        rate_bytes_s: float = 0.0,
        owed: Callable[[], bool] = lambda: False,
        opened: Callable[[bytes], bytes | None] = lambda body: body,
    ) -> None:
        self._opened = opened
        self._outbox = outbox
        self._publish = publish
        self._window = window
        self._batch_bytes = batch_bytes
        self._ack_s = ack_s
        self._owed = owed
        self._in_vain = 0
        """How often patience ended since the last acknowledgement: it doubles each time."""
        self._rate_bytes_s = rate_bytes_s
        self._allowance = rate_bytes_s * BURST_S
        """Bytes that may leave now. Below 0 after a message that was larger: the next waits for it."""
        self._allowed_s: float | None = None
        self._flights: list[_Flight] = []
        self.open = False

    @property
    def in_flight(self) -> int:
        """Batches on their way."""
        return len(self._flights)

    def pump(self, now_s: float, at: Instant) -> int:
        """Sends what may be sent. Returns the number of batches. ``now_s`` is any clock that only grows."""
        if not self.open:
            return 0
        self._expire(now_s)
        self._allow(now_s)
        sent = 0
        max_bytes = self._batch_bytes
        while len(self._flights) < self._window and (self._allowance > 0 or not self._rate_bytes_s):
            flying = {(flight.epoch, seq) for flight in self._flights for seq in flight.seqs}
            try:
                batch = self._outbox.next_batch(flying, max_bytes=max_bytes, max_records=_MAX_RECORDS)
            except RecordDamaged as error:
                log.error("record damaged", extra=kv(epoch=error.epoch, seq=error.seq))
                self._outbox.drop(error.epoch, error.seq, at, "record_damaged")
                continue
            if batch is None:
                break
            batch = self._open(batch, at)
            if batch is None:
                continue
            payload = wire.encode_batch(batch)
            seqs = tuple(record.seq for record in batch.records)
            if (
                len(payload) > wire.MAX_MESSAGE_BYTES
                or sum(len(r.body) for r in batch.records) > wire.MAX_INFLATED_BYTES // 2
            ):
                if len(seqs) == 1:
                    self._outbox.drop(batch.epoch, seqs[0], at, "too_large")
                else:
                    max_bytes //= 2
                continue
            self._outbox.mark_sent(batch.epoch, seqs)
            if not self._publish(payload):
                break
            self._allowance -= len(payload)
            self._flights.append(_Flight(epoch=batch.epoch, seqs=seqs, until_s=now_s + self._ack_s * 2**self._in_vain))
            sent += 1
        return sent

    def _expire(self, now_s: float) -> None:
        left = [flight for flight in self._flights if now_s < flight.until_s]
        # A copy beside one that never left would only make the queue longer.
        if len(left) < len(self._flights) and not self._owed():
            self._flights = left
            self._in_vain = min(self._in_vain + 1, _MOST_DOUBLINGS)

    def _allow(self, now_s: float) -> None:
        passed_s = now_s - self._allowed_s if self._allowed_s is not None else 0.0
        self._allowed_s = now_s
        self._allowance = min(self._allowance + passed_s * self._rate_bytes_s, self._rate_bytes_s * BURST_S)

    def _open(self, batch: wire.Batch, at: Instant) -> wire.Batch | None:
        """The batch in the clear; None when something in it was given up, and another look is to be had."""
        records, given_up = [], False
        for record in batch.records:
            body = self._opened(record.body)
            if body is None:
                self._outbox.drop(batch.epoch, record.seq, at, "unreadable")
                given_up = True
            else:
                records.append(record if body is record.body else msgspec.structs.replace(record, body=body))
        return None if given_up else msgspec.structs.replace(batch, records=tuple(records))

    def acknowledged(self, ack: wire.Ack) -> None:
        """Lets go of the batches that the server holds in full."""
        self._in_vain = 0
        spans = ((0, ack.upto), *ack.extra_ranges)
        known = set(ack.conflict)

        def held(seq: int) -> bool:
            return seq in known or any(low <= seq <= high for low, high in spans)

        self._flights = [
            flight for flight in self._flights if flight.epoch != ack.epoch or not all(held(seq) for seq in flight.seqs)
        ]

    def again(self) -> None:
        """Whatever was on its way may be lost: it is sent again."""
        self._flights.clear()
        self._in_vain = 0
