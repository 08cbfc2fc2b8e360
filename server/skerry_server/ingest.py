"""From MQTT into the database: a queue, one writer, one transaction per batch, and only then the acknowledgements.

Owns the writer thread and the order *commit, then acknowledge*. Leaves the session to ``mqtt``, the meaning of messages to
``intake`` and the roll-ups to ``evidence``.

Rules kept here:

* A device is told that a record is held, and the broker that a message is dealt with, only after the commit.
* The queue is bounded, in messages and in bytes. When it is full the network thread waits, and the broker keeps what it holds
  for us.
* Who is behind must not get more work for it: a batch of records that comes again (from the broker or its device) while it
  still waits here is not queued twice. It is acknowledged with the first copy.
* A message can be wrong in any way and ingest goes on: what breaks a batch is taken alone, and what breaks alone is
  counted, set aside and acknowledged to the broker, not to its device.
* While the database fails nothing is acknowledged; the batch waits and is tried again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skerry_contract import ids, topics, wire
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from skerry_server.db.engine import is_unavailable, writing
from skerry_server.intake import Intake, Outcome
from skerry_server.mqtt import Message, ServerLink
from skerry_server.reports import TakenEvent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestSettings:
    """How ingest batches.

    Attributes:
        queue_messages, queue_bytes: bounds of the queue between network and writer; one message is always taken.
        batch_messages: most messages in one transaction.
        linger_s: how long the writer waits for more once it has one message.
        retry_s: pause after the database refused a batch.
        bucket_s: length of the buckets in which profiles are kept, seconds.
        stuck_s: a batch that is not committed after so long shows in ``healthy``.
    """

    queue_messages: int = 5000
    queue_bytes: int = 64 << 20
    batch_messages: int = 500
    linger_s: float = 0.02
    retry_s: float = 0.5
    bucket_s: float = 300.0
    stuck_s: float = 30.0


@dataclass(slots=True)
class IngestTotals:
    """Running sums since the start of this process, for ``/metrics``."""

    messages: int = 0
    records: int = 0
    windows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    quarantined: int = 0
    batches: int = 0
    retries: int = 0
    repeated: int = 0


class Ingest:
    """Takes every device's records and states. Start it once."""

    def __init__(
        self,
        engine: Engine,
        link: ServerLink,
        *,
        settings: IngestSettings | None = None,
        now_s: Callable[[], float] = time.time,
        on_events: Callable[[Sequence[TakenEvent]], None] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            engine: the database, migrated.
            link: the server's session; ``start`` starts it, ``stop`` stops it.
            now_s: the server's clock, seconds since 1970.
            on_events: called in the writer thread after the commit with the events of a batch; must be quick. What it
                raises is logged and changes nothing.
        """
        self._engine = engine
        self._link = link
        self._settings = settings or IngestSettings()
        self._now_s = now_s
        self._on_events = on_events
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._queued_bytes = 0
        # What is received and not yet committed -> its further copies, which wait to be acknowledged. By content, since the
        # broker tells no number of its own, and of records alone: of states the order counts.
        self._held: dict[tuple[str, bytes], list[Message]] = {}
        self._begun_at: float | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._intake = Intake(bucket_ms=max(1, round(self._settings.bucket_s * 1000)))
        self.totals = IngestTotals()

    @property
    def healthy(self) -> bool:
        """Whether the writer runs, the session stands, and nothing waits for its commit for long: readiness."""
        if self._thread is None or not self._thread.is_alive() or not self._link.connected:
            return False
        begun_at = self._begun_at
        return begun_at is None or time.monotonic() - begun_at < self._settings.stuck_s

    @property
    def waiting(self) -> int:
        """Messages received and not yet committed."""
        return self._queue.qsize()

    def start(self) -> None:
        """Starts the writer and then the link."""
        if self._thread is not None:
            raise RuntimeError("ingest was started before")
        self._thread = threading.Thread(target=self._run, name="ingest-writer", daemon=True)
        self._thread.start()
        self._link.start(self.receive)

    def stop(self) -> None:
        """Stops the link, commits what was received, and waits for the writer."""
        self._link.stop()
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def receive(self, message: Message) -> None:
        """Queues one message; waits while the queue is full. Called by the network thread."""
        with self._room:
            if _repeatable(message) and (message.topic, message.payload) in self._held:
                self._held[message.topic, message.payload].append(message._replace(payload=b""))
                self.totals.repeated += 1
                return
            while self._full(len(message.payload)) and not self._stopping.is_set():
                if not self._room.wait(0.5):
                    log.warning("ingest queue full waiting=%d bytes=%d", self._queue.qsize(), self._queued_bytes)
            if self._stopping.is_set():
                return
            if _repeatable(message):
                self._held[message.topic, message.payload] = []
            self._queued_bytes += len(message.payload)
            self._queue.put(message)

    def _full(self, more_bytes: int) -> bool:
        waiting = self._queue.qsize()
        too_many = waiting >= self._settings.queue_messages
        return waiting > 0 and (too_many or self._queued_bytes + more_bytes > self._settings.queue_bytes)

    def _run(self) -> None:
        while True:
            batch = self._collect()
            if batch:
                self._take(batch)
            elif self._stopping.is_set():
                return

    def _collect(self) -> list[Message]:
        try:
            batch = [self._queue.get(timeout=0.1)]
        except queue.Empty:
            return []
        deadline = time.monotonic() + self._settings.linger_s
        while len(batch) < self._settings.batch_messages:
            try:
                batch.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        with self._room:
            self._queued_bytes -= sum(len(message.payload) for message in batch)
            self._room.notify()
        return batch

    def _take(self, batch: list[Message]) -> None:
        while batch:
            batch = batch[self._take_some(batch) :]

    def _take_some(self, batch: list[Message]) -> int:
        """One transaction of as many as it holds; how many of the messages are dealt with."""
        self._begun_at = time.monotonic()
        try:
            outcome = self._commit(batch)
        except Exception:
            if len(batch) > 1:
                log.exception("ingest batch failed messages=%d; taking them one by one", len(batch))
                for message in batch:
                    self._take([message])
                self._begun_at = None
                return len(batch)
            log.exception("ingest message failed topic=%s bytes=%d", batch[0].topic, len(batch[0].payload))
            outcome = self._set_aside(batch[0])
        self._begun_at = None
        if outcome is None:
            self._let_go(batch)
            return len(batch)
        self._tell(batch[: outcome.taken], outcome)
        return outcome.taken

    def _commit(self, batch: list[Message]) -> Outcome | None:
        """One transaction, tried again while the database itself fails. None when stopped before it worked."""
        while True:
            try:
                with writing(self._engine) as connection:
                    return self._intake.take(connection, batch, now_ms=int(self._now_s() * 1000))
            except DBAPIError as error:
                if not is_unavailable(error):
                    raise
                self.totals.retries += 1
                log.error("ingest database failed retry_s=%.1f error=%s", self._settings.retry_s, error.orig)
                if self._stopping.wait(self._settings.retry_s):
                    return None

    def _set_aside(self, message: Message) -> Outcome | None:
        try:
            with writing(self._engine) as connection:
                return self._intake.set_aside(connection, message, now_ms=int(self._now_s() * 1000))
        except Exception:
            # Not even the note could be written: the broker keeps the message, and the device keeps its records.
            log.exception("ingest could not set a message aside topic=%s", message.topic)
            return None

    def _let_go(self, batch: list[Message]) -> list[Message]:
        """Further copies of these messages; from now on a copy is a message of its own."""
        with self._room:
            return [
                copy
                for message in batch
                if _repeatable(message)
                for copy in self._held.pop((message.topic, message.payload), ())
            ]

    def _tell(self, batch: list[Message], outcome: Outcome) -> None:
        for (device, _epoch), ack in outcome.acks.items():
            self._link.publish(topics.ack(ids.DeviceId(device)), wire.encode(ack))
        for message in [*batch, *self._let_go(batch)]:
            self._link.acknowledge(message)
        totals = self.totals
        totals.batches += 1
        totals.messages += len(batch)
        totals.records += outcome.records
        totals.windows += outcome.windows
        totals.duplicates += outcome.duplicates
        totals.conflicts += outcome.conflicts
        totals.quarantined += outcome.quarantined
        if outcome.events and self._on_events is not None:
            try:
                self._on_events(outcome.events)
            except Exception:
                log.exception("the receiver of events failed")


def _repeatable(message: Message) -> bool:
    """Whether a second copy says nothing that the first did not."""
    return message.topic.endswith("/up")
