"""Rings and label books and the windows cut from them: what is committed, what waits for it, what a dead worker left.

Every window goes to the store with its ring position in one transaction, and only then the worker may reuse the slots. What arrives
within an interval shares a commit. Until then, and while a window cannot be stored, it waits here and in its ring: a supervisor that
dies loses none, the next one has the ring folded again. A ring's file goes when all of it is committed,
a label book's when its worker says that no label can come for it any more. Whatever is locked is still written, by a worker of
a supervisor that was killed, and waits.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol

import msgspec
from skerry_contract import window as w
from skerry_contract import wire

from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.readings import Readings
from skerry_agent.serving.waiting import Hears, Waiting
from skerry_agent.store import Entry, RingAt, Store

log = logging.getLogger(__name__)

_BUSY_S = 1.0
_COMPACT_S = 0.05
"""Room is made for so long at a try: the loop has other work, and comes by again."""
_HOUR_NS = 3_600_000_000_000
SHADOW_RING = "shadow-"
"""Positions of a process that answers nobody have a name that begins so, and no file; they end with it."""
_AT_ONCE = 64
"""Windows of one commit."""
_RING_SUFFIX, _BOOK_SUFFIX = ".ring", ".labels"
_RING_POSITIONS = struct.Struct("<QQ")
_RING_POSITIONS_AT = 16
"""Where a ring or a label book says how far it was written and, as far as its worker heard, committed."""


class Guests(Protocol):
    """Who else counts in rings of this folder (``applications``).

    Attributes:
        lent: rings and books that somebody out there writes.
    """

    lent: set[str]

    def may_count(self, ring: str, key: w.Key) -> bool:
        """Whether a ring or label book may hold windows of that key."""

    def take_over(self, path: Path) -> bool:
        """Called before a worker maps a ring or book that nobody writes any more; False when there is nothing in it."""


class Rings:
    """The folder of rings, and the way of their windows into the store.

    Args:
        commit_s: windows that arrive within so many seconds share a commit; 0: each has its own.
        on_records: the outbox grew.
        on_fault: the store cannot be used any more.

    Attributes:
        guests: whose rings lie here beside the workers'.
        readings: of the device, which go along with the next window.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        clock: Clock,
        *,
        commit_s: float = 0.0,
        on_records: Callable[[], None],
        on_fault: Callable[[Degraded], None],
        readings: Readings | None = None,
    ) -> None:
        self._folder = folder
        self._readings = readings
        self.seal: Callable[[bytes], bytes] | None = None
        self._store = store
        self._clock = clock
        self._commit_s = commit_s
        self._due: asyncio.TimerHandle | None = None
        self._on_records = on_records
        self._on_fault = on_fault
        self.guests: Guests | None = None
        self._unstored = Waiting(store.ring_upto)
        self._folded: set[str] = set()
        self._hour = 0
        self._kept: dict[str, int] = {}
        self._refused = False
        self._retry_at_s = 0.0
        self._gone: list[tuple[str, dict[str, int]]] = []
        self._counted: dict[str, int] = {}
        """Inferences in the windows of a ring, since this agent began."""
        folder.mkdir(exist_ok=True, mode=0o700)
        for ring in store.rings():
            if ring.startswith(SHADOW_RING):
                self.remove(ring)
            elif folder.is_symlink() and ring.endswith(_RING_SUFFIX) and not Path(ring).exists():
                # A folder in memory, and the power failed: nobody can say how much of it had no window yet.
                self._note_gone(ring, {})

    def path(self, generation: int, model: str, serial: int = 0) -> str:
        """The ring of a model in a generation; ``serial`` counts its keys."""
        return str(self._folder / f"{generation}-{model}-{serial}.ring")

    def highest(self) -> int:
        """The highest generation that a ring is, or was, named for."""
        names = [path.name for path in self._folder.glob("*-*")] + [Path(ring).name for ring in self._store.rings()]
        numbers = [name.partition("-")[0] for name in names]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def commit(self, worker: Hears, cut: ww.WindowCut) -> None:
        """Stores a window, with what else arrives soon, and tells its worker; keeps it for later when there is no room."""
        key = wire.decode(w.Window, cut.body, max_bytes=wire.MAX_INFLATED_BYTES).key
        if self.guests is not None and not self.guests.may_count(cut.ring, key):
            log.error("window of a foreign key", extra=kv(ring=cut.ring, inferences=cut.inferences))
            self.count_lost("foreign_windows", 1)
            worker.send(ww.Committed(ring=cut.ring, upto=cut.upto))
            return
        waited = bool(self._unstored)
        entry = Entry(kind="window", body=cut.body, key="/".join(map(str, key)), inferences=cut.inferences)
        self._unstored.add(worker, cut, entry)
        self._counted[cut.ring] = self._counted.get(cut.ring, 0) + cut.inferences
        if self._commit_s > 0:
            if self._due is None:
                self._due = asyncio.get_running_loop().call_later(self._commit_s, self.retry)
        elif not waited:
            # Else in their order, at the next try: while the store is held, every try holds up the loop a little.
            self.retry()

    def sampled(self, message: ww.Sampled) -> None:
        """Stores a sample, sealed where that is wanted. Without room it is dropped: the next one is as good."""
        self._count_kept(message.body)
        body = message.body if self.seal is None else self.seal(message.body)
        try:
            self._store.append([Entry(kind="sample", body=body)])
        except Degraded as error:
            self.count_lost("samples_not_stored", 1)
            if error.code == "store_damaged":
                self._on_fault(error)
            return
        self._on_records()

    def kept_this_hour(self) -> dict[str, int]:
        """Samples of this hour by model and reason, of all workers: the next one goes on with their bound."""
        hour = time.monotonic_ns() // _HOUR_NS
        if hour != self._hour:
            self._hour = hour
            self._kept.clear()
        return self._kept

    def _count_kept(self, body: bytes) -> None:
        sample = wire.decode(wire.Sample, body)
        what, kept = f"{sample.key.model} {sample.why}", self.kept_this_hour()
        kept[what] = kept.get(what, 0) + 1

    def retry(self) -> None:
        """Stores what waits; of a store that another program holds, tries once a second."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._name_gone()
        if not self._unstored or self._clock.boot_s() < self._retry_at_s:
            return
        try:
            while self._unstored:
                try:
                    self._store_some()
                    self._refused = False
                except Degraded as error:
                    again, self._refused = self._refused, True
                    if not again:
                        log.error(
                            "window not stored", extra=kv(code=error.code, detail=error.detail, advice=error.advice)
                        )
                    if error.code == "store_busy":
                        # The lock of a moment is gone at the next tick; while one lasts, every try holds up the loop.
                        self._retry_at_s = self._clock.boot_s() + _BUSY_S if again else 0.0
                        return
                    if error.code != "store_damaged":
                        self._make_room()
                        return
                    raise
        except Degraded as error:
            # No room to make room either, or a lock: the windows wait here, and in their rings, for the next try.
            if error.code == "store_damaged":
                self._on_fault(error)

    def _make_room(self) -> None:
        end_s = self._clock.boot_s() + _COMPACT_S
        self._store.compact(self._clock.instant(), more=lambda: self._clock.boot_s() < end_s)

    def _store_some(self) -> None:
        some = self._unstored.first(_AT_ONCE)
        entries: list[Entry] = []
        at: dict[str, int] = {}
        for held in some:
            cut = held.cut
            committed = at.get(cut.ring, self._store.ring_upto(cut.ring))
            if committed is not None and cut.start < committed:
                # Sent twice: by a worker that did not hear of the commit, and by its heir. The first one counts.
                log.warning(
                    "window known", extra=kv(ring=cut.ring, start=cut.start, upto=cut.upto, committed=committed)
                )
                continue
            at[cut.ring] = cut.upto
            entries.append(held.entry)
        if entries:
            readings = self._readings.held() if self._readings is not None else {}
            if readings:
                entries[0] = _with_readings(entries[0], readings)
            self._store.append(entries, [RingAt(ring=ring, upto=upto) for ring, upto in at.items()])
            if self._readings is not None:
                self._readings.taken(readings)
        self._unstored.take(len(some))
        for held in some:
            held.worker.send(ww.Committed(ring=held.cut.ring, upto=held.cut.upto))
        if entries:
            self._on_records()

    def left_behind(self, owned: Collection[str]) -> list[tuple[str, int]]:
        """Rings that no living worker owns: (ring, position from which it is to be folded). Removes those without a rest."""
        found = []
        for path in sorted(self._folder.glob("*.ring")):
            ring = str(path)
            if ring in owned or ring in self._lent or _locked(path):
                continue
            if self.spent(ring) or (ring in self._folded and not self._unstored.owes(ring)):
                self.remove(ring)
                continue
            if ring in self._folded or (self.guests is not None and not self.guests.take_over(path)):
                continue
            found.append((ring, self.continued(path)))
        return found

    @property
    def _lent(self) -> set[str]:
        return self.guests.lent if self.guests is not None else set()

    def books(self, *, without: Collection[str], models: Collection[str] | None = None) -> tuple[str, ...]:
        """Label books but those of ``without``, whoever writes them, and those that are lent; of some ``models`` only."""
        gone = {*without, *self._lent}
        return tuple(
            str(path)
            for path in sorted(self._folder.glob(f"*{_BOOK_SUFFIX}"))
            if str(path) not in gone and (models is None or model_of(str(path)) in models)
        )

    def books_left_behind(self, owned: Collection[str], *, recovering: Collection[str]) -> list[tuple[str, int]]:
        """Label books that no living worker writes: (book, position from which it is to be folded).

        A book comes after its ring, out of which it is filled.

        Args:
            owned: books of living workers.
            recovering: rings that were given to the worker for which the books are.
        """
        found = []
        for book in self.books(without=owned):
            if book in self._folded:
                # Closed, and only kept for windows that waited.
                self.remove(book)
                continue
            path = Path(book)
            ring = path.with_suffix(_RING_SUFFIX)
            if _locked(path) or (ring.exists() and str(ring) not in recovering and str(ring) not in self._folded):
                continue
            if self.guests is not None and not self.guests.take_over(path):
                continue
            found.append((book, self.continued(path)))
        return found

    def continued(self, path: Path) -> int:
        """Where an heir goes on with a ring or a label book."""
        # What waits to be stored was folded already: the heir goes on behind it.
        return max(self._unstored.upto(str(path)), self._positions(path)[1])

    def _positions(self, path: Path) -> tuple[int, int]:
        """(written, committed) of a ring; (-1, 0) when it cannot be read."""
        try:
            with open(path, "rb") as file:
                file.seek(_RING_POSITIONS_AT)
                written, noted = _RING_POSITIONS.unpack(file.read(_RING_POSITIONS.size))
        except (OSError, struct.error):
            return -1, 0
        known = self._store.ring_upto(str(path)) or 0
        # The store may know less than the ring: it was damaged, or put back from a backup. Its worker noted what was committed once it
        # was, so the note is never too high; one beyond what was written is none of a worker's.
        return int(written), max(known, int(noted)) if noted <= written else known

    def spent(self, ring: str) -> bool:
        """Whether nothing of it has to be folded or stored any more."""
        path = Path(ring)
        written, committed = self._positions(path)
        return not path.exists() or (written == committed and not self._unstored.owes(ring))

    def granted(self, rings: Iterable[str]) -> None:
        """Notes rings that are written from now on: should their files be gone at the next start, it is known that there were some."""
        fresh = [RingAt(ring=ring, upto=0) for ring in rings if self._store.ring_upto(ring) is None]
        try:
            if fresh:
                self._store.append([], fresh)
        except Degraded as error:
            log.warning("ring not noted", extra=kv(code=error.code, detail=error.detail))

    def went_along(self, ring: str, answered: int) -> None:
        """A worker ended hard: names what it had answered beyond its windows where its ring has no file, by its last report.

        Args:
            answered: inferences of the ring's model since the worker began, as it said last.
        """
        if not Path(ring).exists():
            self._note_gone(ring, {"inferences": max(0, answered - self._counted.get(ring, 0))})

    def _note_gone(self, ring: str, data: dict[str, int]) -> None:
        log.error("ring gone", extra=kv(ring=Path(ring).name, **data))
        self._gone.append((ring, data))
        self._name_gone()

    def _name_gone(self) -> None:
        """Stores what is gone; without room at the next try: the disk that has none is why the ring lay in memory."""
        while self._gone:
            ring, data = self._gone[0]
            about = {"ring": Path(ring).name, **data}
            event = wire.Event(at=self._clock.instant(), name="ring", code="ring_gone", data=about)
            try:
                with self._store.transaction():
                    self._store.count_lost("rings_gone", 1)
                    if data.get("inferences"):
                        self._store.count_lost("inferences_in_gone_rings", data["inferences"])
                    self._store.append([Entry(kind="event", body=wire.encode(event))])
                    self._store.forget_ring(ring)
            except Degraded:
                return
            del self._gone[0]

    def recovered(self, message: ww.Recovered) -> bool:
        """A dead worker's ring is folded: notes what was lost in it, and removes it. False when that could not be noted."""
        try:
            self._note_losses(message)
        except Degraded as error:
            # The ring stays, and with it what there is to say; the next heir, or the next start, reads it again.
            log.error("loss not stored", extra=kv(code=error.code, detail=error.detail, ring=message.ring))
            return False
        self._folded.add(message.ring)
        self.remove(message.ring)
        return True

    def _note_losses(self, message: ww.Recovered) -> None:
        if not message.lost and not message.damage:
            return
        name = Path(message.ring).name
        with self._store.transaction():
            if message.lost:
                self._store.count_lost("records_overwritten", message.lost)
            if message.damage:
                self._store.count_lost("rings_damaged", 1)
                if message.inferences:
                    self._store.count_lost("inferences_in_damaged_rings", message.inferences)
                data = {"ring": name, "detail": message.damage, "inferences": message.inferences}
                event = wire.Event(at=self._clock.instant(), name="ring", code="ring_damaged", data=data)
                self._store.append([Entry(kind="event", body=wire.encode(event))])
        if message.damage:
            log.error("ring damaged", extra=kv(ring=name, detail=message.damage, inferences=message.inferences))
            self._on_records()

    def book_closed(self, message: ww.BookClosed) -> None:
        """No label can come for a book any more: counts it when labels in it were lost, and removes it."""
        if message.damage and not self.spent(message.book):
            self.count_lost("label_books_damaged", 1)
            log.error("label book damaged", extra=kv(book=Path(message.book).name, detail=message.damage))
        self._folded.add(message.book)
        self.remove(message.book)

    def remove(self, ring: str) -> None:
        """Removes a ring or a book, unless windows of it wait to be stored."""
        if self._unstored.owes(ring):
            return
        # The file first: a position without a ring is harmless, a ring without a position is counted again.
        Path(ring).unlink(missing_ok=True)
        self._folded.discard(ring)
        self._counted.pop(ring, None)
        try:
            self._store.forget_ring(ring)
        except Degraded as error:
            log.warning("ring position stays", extra=kv(ring=Path(ring).name, code=error.code, detail=error.detail))

    def count_lost(self, cause: str, n: int) -> None:
        """Adds to what was lost on this device; a full store only logs it."""
        if n == 0:
            return
        try:
            self._store.count_lost(cause, n)
        except Degraded as error:
            log.error("loss not counted", extra=kv(cause=cause, n=n, code=error.code, detail=error.detail))


def _with_readings(entry: Entry, held: dict[str, int]) -> Entry:
    window = wire.decode(w.Window, entry.body, max_bytes=wire.MAX_INFLATED_BYTES)
    window = msgspec.structs.replace(window, resources=window.resources | held)
    return msgspec.structs.replace(entry, body=wire.encode(window))


def book_of(ring: str) -> str:
    """The label book beside a ring."""
    return str(Path(ring).with_suffix(_BOOK_SUFFIX))


def model_of(ring: str) -> str:
    """The model whose ring or label book it is."""
    return Path(ring).stem.partition("-")[2].rpartition("-")[0]


def _locked(path: Path) -> bool:
    """Whether a worker that is not ours still writes the ring or book."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        # Not now: out of descriptors, most likely. What is not folded yet is not lost.
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # A file system without locks.
        return False
    finally:
        os.close(descriptor)
    return False
