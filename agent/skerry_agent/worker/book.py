"""The label book of one window key: what was predicted, and which labels came for it, in a mapped file (``mapped``).

It stands beside the recorder's ring of the same key and outlives it: the ring goes when its windows are committed, the book
stays as long as labels may come. Two parts follow the header:

* columns, one entry per ring position (position ``p`` in entry ``p % capacity``): when, which class, which row of its
  request, the digest of the client's own id, and the label, once there is one. They are filled from the ring when it is
  folded, many at a time, so that a request costs nothing more. The file's third position says how far.
* ``records`` fixed records, one per label that came, what it was taken for, and how long after its prediction it came. They are folded into windows with
  (start, upto) and committed as those of the ring are, so each is counted once, whatever dies.

A record is written before its prediction is marked as labelled; opening the book again makes up for a mark that a kill
prevented. A record that is not committed is never overwritten: ``room`` says how many more may come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

from skerry_agent import workerwire as ww
from skerry_agent.worker import idents, mapped
from skerry_agent.worker import ring as r
from skerry_agent.worker.plan import OutputColumn, Plan

VERSION = 1
MAGIC = b"SKRYLABL"
SUFFIX = ".labels"
RECORDS = 4096
NONE = 0xFFFF
"""No class: of a prediction that cannot be labelled, of one that has no label yet."""
MOST_CLASSES = 1024
"""Up to so many the confusion matrix is kept; above, matched labels are only counted."""
MATCHED, LATE, UNKNOWN, DUPLICATE, CONFLICTING = range(5)
OUTCOMES = ("matched", "late", "unknown", "duplicate", "conflicting")

_RECORD = np.dtype(
    [
        ("outcome", "u1"),
        ("lag", "u1", (3,)),
        ("truth", "<u2"),
        ("predicted", "<u2"),
        ("position", "<u8"),
        ("at_ns", "<i8"),
    ]
)
_LAG_BYTES: npt.NDArray[np.int64] = np.array([1, 1 << 8, 1 << 16])
"""A lag is one more than its whole seconds, little-endian, the greatest 194 days; 0 is none: an older worker wrote none."""
_MOST_LAG = (1 << 24) - 1
_COLUMNS = (("ident", "<u8"), ("at_s", "<u4"), ("row", "<u2"), ("predicted", "<u2"), ("truth", "<u2"))
_ENTRY_BYTES = sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a book is about.

    Attributes:
        token: names the book in prediction ids; random.
        output: the output whose classes the labels are.
    """

    key: w.Key
    token: str
    output: OutputColumn
    capacity: int
    records: int
    boot_id: str


class Found(NamedTuple):
    """A prediction: its position, class, and label (``NONE`` before one came). ``age_s``: of the prediction."""

    position: int
    predicted: int
    truth: int
    age_s: float


class NotFound(Exception):
    """``forgotten``: there was such a prediction, and newer ones took its place. ``wanted``: what the row must be."""

    def __init__(self, *, forgotten: bool = False, wanted: str = "") -> None:
        self.forgotten = forgotten
        self.wanted = wanted
        super().__init__(wanted or ("forgotten" if forgotten else "unknown"))


def path_beside(ring: str) -> str:
    """Where the book of a ring is."""
    return str(Path(ring).with_suffix(SUFFIX))


def labelled_output(plan: Plan) -> OutputColumn | None:
    """The output that labels are about: the first classifier."""
    return plan.outputs[0] if plan.outputs and plan.outputs[0].classes < NONE else None


class Book:
    """See the module. Use ``create`` or ``open``.

    Attributes:
        filled: ring positions below it are in the columns.
        written, committed, cut_at: label records made, known to be in the store, sent to it.
    """

    def __init__(self, header: Header, file: mapped.Mapped) -> None:
        self.path = file.path
        self.header = header
        self._file = file
        n, at = header.capacity, file.start
        columns: dict[str, npt.NDArray[np.integer]] = {}
        for name, kind in _COLUMNS:
            columns[name] = np.frombuffer(file.memory, kind, n, at)
            at += np.dtype(kind).itemsize * n
        self._ident, self._at_s, self._row = columns["ident"], columns["at_s"], columns["row"]
        self._predicted, self._truth = columns["predicted"], columns["truth"]
        self._records: npt.NDArray[np.void] = np.frombuffer(file.memory, _RECORD, header.records, at + -at % 8)
        self._positions = file.positions
        self.written: int = self._positions[mapped.WRITTEN]
        self.committed: int = self._positions[mapped.COMMITTED]
        self.filled: int = self._positions[mapped.THIRD]
        self.cut_at = self.committed
        self._index: idents.Index | None = None
        self._indexed = 0
        self._class = {name: i for i, name in enumerate(header.output.labels)}
        if self.written:
            last = self._records[(self.written - 1) % header.records]
            if last["outcome"] == MATCHED and int(last["position"]) >= self.filled - n:
                self._truth[int(last["position"]) % n] = last["truth"]

    @classmethod
    def create(cls, path: str, header: Header) -> Book:
        """Makes the file; without room on the disk the book lives in memory, and dies with the worker.

        Raises:
            FileExistsError: there is a book of that name.
        """
        size = header.capacity * _ENTRY_BYTES + 8 + header.records * _RECORD.itemsize
        return cls(header, mapped.create(path, MAGIC, VERSION, header, header.boot_id, size))

    @classmethod
    def open(cls, path: str, *, boot_id: str) -> Book:
        """Maps a book that another worker left, to go on with it.

        Raises:
            mapped.Damaged: it cannot be read, or is of another boot than ``boot_id``.
            mapped.Locked: that worker still writes it.
        """
        file, header = mapped.open_existing(path, MAGIC, (VERSION,), Header, boot_id=boot_id, write=True)
        try:
            if header.capacity < 1 or header.records < 1:
                raise mapped.Damaged(f"capacity {header.capacity}, records {header.records}")
            return cls(header, file)
        except ValueError as error:
            file.release()
            raise mapped.Damaged(f"unreadable: {error}") from None
        except mapped.Damaged:
            file.release()
            raise

    # --- predictions ------------------------------------------------------------------------------------------------

    def fill(self, ring: r.Ring, upto: int, *, believe: bool = True) -> None:
        """Takes in the predictions of ring positions below ``upto``, which must still be in the ring.

        Args:
            ring: beside the book.
            upto: at most as far as the ring is written.
            believe: False for a ring that another process left: slots that are not of their positions hold no prediction.
        """
        start = self.filled
        if upto - start > ring.capacity:
            # Overwritten before anyone read them: of these nothing is known, and what stood there before is no more.
            gap = upto - ring.capacity
            for position in range(max(start, gap - self.header.capacity), gap):
                self._predicted[position % self.header.capacity] = NONE
            start = gap
        offset_ns = ring.boot_offset_ns
        while start < upto:
            low, here = start % ring.capacity, start % self.header.capacity
            n = min(upto - start, ring.capacity - low, self.header.capacity - here)
            self._fill(ring.meta[low : low + n], ring.values[low : low + n], slice(here, here + n), ring, offset_ns)
            if not believe:
                _, whole = ring.span(start, start + n)
                self._predicted[here : here + n][~whole] = NONE
            start += n
            # After each part: the rows of a request may go on in the next.
            self.filled = start
            self._positions[mapped.THIRD] = start

    def _fill(
        self, meta: npt.NDArray[np.void], values: npt.NDArray[np.floating], here: slice, ring: r.Ring, offset_ns: int
    ) -> None:
        outcome = meta["outcome"]
        continued = outcome == r.ROW
        if continued.any():
            index = np.arange(len(meta))
            base = index - np.maximum.accumulate(np.where(continued, -1, index))
            before = (here.start - 1) % self.header.capacity
            orphans = np.maximum.accumulate(np.where(continued, 0, 1)) == 0
            base[orphans] = int(self._row[before]) + 1 + index[orphans]
            self._row[here] = base
        else:
            self._row[here] = 0
        output, at = self.header.output, len(ring.header.plan.features)
        part = values[:, at : at + output.width]
        if output.raw:
            predicted = part.argmax(1)
            # The first largest, or a NaN where there is one: cheaper than asking for the largest again.
            confidence = part[np.arange(len(part)), predicted]
        else:
            confidence = part[:, 1]
            predicted = np.nan_to_num(part[:, 0]).astype(np.int64)
        known = ~np.isnan(confidence)
        known &= meta["flags"] & r.VALUES != 0
        known &= continued | (outcome == r.OK)
        if not known.all():
            predicted[~known] = NONE
        self._predicted[here] = predicted
        self._truth[here] = NONE
        self._ident[here] = meta["ident"]
        self._at_s[here] = (meta["at_ns"] + offset_ns) // 1_000_000_000

    def find(self, position: int, row: int | None, now_s: float) -> Found:
        """The prediction of a request that began at ``position``.

        Args:
            position: of the request's first row.
            row: which of its rows; None where it had only one.
            now_s: boottime, seconds.

        Raises:
            NotFound: there is no such prediction, or not any more, or it needs another ``row``.
        """
        capacity = self.header.capacity
        if position >= self.filled:
            raise NotFound
        if position < self.filled - capacity:
            raise NotFound(forgotten=True)
        if self._row[position % capacity] != 0:
            raise NotFound
        if row is None:
            if self._continues(position + 1, 1):
                raise NotFound(wanted="the row as well: the request had several")
            row = 0
        if row and not self._continues(position + row, row):
            raise NotFound
        entry = (position + row) % capacity
        predicted = int(self._predicted[entry])
        if predicted >= self.header.output.classes:
            # NONE, or what no recorder wrote.
            raise NotFound
        return Found(position + row, predicted, int(self._truth[entry]), now_s - int(self._at_s[entry]))

    def _continues(self, position: int, row: int) -> bool:
        return position < self.filled and bool(self._row[position % self.header.capacity] == row)

    def positions_of(self, wanted: idents.Digests) -> dict[int, int]:
        """The newest position of each digest of a client's id that is here. ``wanted`` is sorted."""
        found = [] if self._index is None else [self._index.find(self._ident, wanted)]
        new = self.unindexed
        if new:
            # What no index holds yet: the part before the end of the column, and going round the part from its beginning.
            end = (self.filled - 1) % self.header.capacity + 1
            found.append(_scanned(self._ident, max(0, end - new), end, wanted))
            if new > end:
                found.append(_scanned(self._ident, self.header.capacity - (new - end), self.header.capacity, wanted))
        if not any(map(len, found)):
            return {}
        entries = np.concatenate(found).astype(np.int64)
        entries = entries[self._row[entries] == 0]
        # An entry holds the newest position that ends on it.
        positions = self.filled - 1 - (self.filled - 1 - entries) % self.header.capacity
        order = np.argsort(positions)
        return dict(zip(self._ident[entries[order]].tolist(), positions[order].tolist(), strict=True))

    @property
    def unindexed(self) -> int:
        """Predictions that ``positions_of`` has to look through one by one."""
        return min(self.filled - self._indexed, self.header.capacity)

    def index(self) -> Iterator[None]:
        """Makes the index of what is here now; stops for other work every few hundred microseconds."""
        upto = self.filled
        n = min(upto, self.header.capacity)
        ident = self._ident
        usable = (self._row[:n] == 0) & (ident[:n] != 0)
        yield
        self._index = yield from idents.build(ident, upto % self.header.capacity if upto > n else 0, usable)
        self._indexed = upto

    @property
    def last_s(self) -> float:
        """Boottime of the newest prediction, 0 before the first."""
        return float(self._at_s[(self.filled - 1) % self.header.capacity]) if self.filled else 0.0

    # --- labels -----------------------------------------------------------------------------------------------------

    def class_of(self, label: str | int) -> int | None:
        """The class that a label names, by name or index; None when there is no such class."""
        if isinstance(label, str):
            return self._class.get(label)
        return label if not isinstance(label, bool) and 0 <= label < self.header.output.classes else None

    @property
    def room(self) -> int:
        """Label records that may come before some must be committed."""
        return self.header.records - (self.written - self.committed)

    @property
    def uncut(self) -> int:
        """Label records that no window holds yet."""
        return self.written - self.cut_at

    def record(
        self,
        outcome: int,
        *,
        at_ns: int,
        position: int = 0,
        truth: int = NONE,
        predicted: int = NONE,
        lag_s: float | None = None,
    ) -> None:
        """Counts one label; call before its reply is sent. There must be ``room``. ``lag_s``: age of its prediction."""
        lag = 0 if lag_s is None else min(max(0, int(lag_s)) + 1, _MOST_LAG)
        self._records[self.written % self.header.records] = (
            outcome, (lag & 0xFF, lag >> 8 & 0xFF, lag >> 16), truth, predicted, position, at_ns,
        )  # fmt: skip
        self.written += 1
        self._positions[mapped.WRITTEN] = self.written
        if outcome == MATCHED:
            self._truth[position % self.header.capacity] = truth

    def cut(self) -> ww.WindowCut | None:
        """The window of the labels since the last cut; None when none came."""
        if self.cut_at == self.written:
            return None
        self._file.look_at_clocks()
        slots = np.arange(self.cut_at, self.written) % self.header.records
        part = self._records[slots]
        labels = _counted(part, self.header.output.classes)
        window = w.Window(
            key=self.header.key,
            start=self._file.instant(int(part["at_ns"][0])),
            end=self._file.instant(int(part["at_ns"][-1])),
            labels=labels,
        )
        cut = ww.WindowCut(ring=self.path, start=self.cut_at, upto=self.written, body=wire.encode(window))
        self.cut_at = self.written
        return cut

    def resume(self, start: int) -> None:
        """Goes on where the store is: records from ``start`` on are still to be counted.

        Raises:
            mapped.Damaged: the records are not what a worker wrote behind ``start``.
        """
        if not start <= self.written <= start + self.header.records:
            raise mapped.Damaged(f"written up to {self.written}, committed up to {start}")
        part = self._records[np.arange(start, self.written) % self.header.records]
        classes = self.header.output.classes
        matched = part[part["outcome"] == MATCHED]
        if (
            (part["outcome"] >= len(OUTCOMES)).any()
            or (matched["truth"] >= classes).any()
            or (matched["predicted"] >= classes).any()
        ):
            raise mapped.Damaged(f"records from {start} on are none that a worker wrote")
        self.commit(start)
        self.cut_at = min(start, self.written)

    def commit(self, upto: int) -> None:
        """Notes that the store holds every label record below ``upto``."""
        self.committed = max(self.committed, min(upto, self.written))
        self._positions[mapped.COMMITTED] = self.committed

    def close(self) -> None:
        """Gives up the mapping and the lock."""
        self._file.release()
        for name in ("_ident", "_at_s", "_row", "_predicted", "_truth"):
            setattr(self, name, np.empty(0, np.uint8))
        self._records = np.empty(0, _RECORD)
        self._index = None


def _scanned(column: idents.Digests, low: int, high: int, wanted: idents.Digests) -> idents.Entries:
    part = column[low:high]
    if len(wanted) == 1:
        return np.flatnonzero(part == wanted[0]) + low
    place = np.searchsorted(wanted, part)
    place[place == len(wanted)] = 0
    return np.flatnonzero(wanted[place] == part) + low


def _counted(part: npt.NDArray[np.void], classes: int) -> w.Labels:
    by_outcome = np.bincount(part["outcome"], minlength=len(OUTCOMES)).tolist()
    confusion: tuple[int, ...] = ()
    lags: dict[int, h.Exponential] = {}
    if classes <= MOST_CLASSES and by_outcome[MATCHED]:
        matched = part[part["outcome"] == MATCHED]
        cells = Counter((matched["truth"].astype(np.int64) * classes + matched["predicted"]).tolist())
        dense = [0] * (classes * classes)
        for cell, n in cells.items():
            dense[cell] = n
        confusion = tuple(dense)
        lags = _lags(matched)
    return w.Labels(
        confusion=confusion,
        matched=by_outcome[MATCHED],
        late=by_outcome[LATE],
        unknown=by_outcome[UNKNOWN],
        duplicate=by_outcome[DUPLICATE],
        conflicting=by_outcome[CONFLICTING],
        lags=lags,
    )


def _lags(matched: npt.NDArray[np.void]) -> dict[int, h.Exponential]:
    lag = matched["lag"].astype(np.int64) @ _LAG_BYTES
    known, truth = lag > 0, matched["truth"]
    return {
        int(of_class): h.exponential_of((lag[known & (truth == of_class)] - 1).tolist())
        for of_class in np.unique(truth[known])
    }
