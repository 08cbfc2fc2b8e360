"""Each (device, epoch, seq) once: what to do with a record, given what the ledger holds of its stream.

Owns the decision and the arithmetic of ranges; reads through a callable and writes nothing. ``intake`` stores the rows that
``Stream.added`` lists. A row covers ``low..seq``; no two rows of a stream overlap.

The rules, and why counts are neither doubled nor lost:

* A seq that is held with the same digest is a duplicate: it is acknowledged again.
* A seq that is held with another digest is a conflict. The device was set back (restored backup, cloned card); its record is
  new content under an old number. It is not taken and not acknowledged: the device keeps it, and sends it in a new epoch.
* A seq that a merged record already stands for (``replaced``), or that was reported as dropped, is a duplicate too: a copy that
  was late on its way. Its content is counted, or reported as lost, once.
* A merged record that names a seq which is held with content of its own would count that content twice: overlap, refused as
  a conflict. A device freezes what is in flight, so only one that was set back can send it. A seq that was quarantined has no
  counted content and does not stand in the way.
* A tombstone counts nothing, so it is never refused: it enters the seqs that are not held yet as ``tombstoned``.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from skerry_contract import wire

Verdict = Literal["new", "duplicate", "conflict", "overlap"]
QUARANTINED = "quarantined"
REPLACED = "replaced"
TOMBSTONED = "tombstoned"

MAX_EXTRA = 2000
"""Ranges above ``upto`` that one acknowledgement lists: those of what it answers, and of the others the lowest."""
_PAGE = 4096


class Held(NamedTuple):
    """One row of the ledger."""

    seq: int
    low: int
    digest: bytes
    kind: str


Load = Callable[[int, int, int], Sequence[Held]]
"""(low, high, most) -> the first ``most`` rows of the stream that touch low..high, ascending. ``high`` may be ``wire.MAX_SEQ``."""
_ALL = 1 << 31


@dataclass(slots=True)
class Stream:
    """One (device, epoch) within one transaction.

    Attributes:
        upto, high: as stored; 0 for a stream not seen before.
        answered: seqs that were taken, or were known already.
        added: rows that this transaction adds, ascending by seq.
    """

    upto: int
    high: int
    load: Load
    added: list[Held] = field(default_factory=list)
    records: int = 0
    duplicates: int = 0
    tombstoned: int = 0
    answered: list[int] = field(default_factory=list)
    conflicts: list[int] = field(default_factory=list)

    def take(self, record: wire.Record, digest: bytes, *, malformed: bool = False) -> Verdict:
        """Decides about one record and remembers what it adds.

        Args:
            malformed: its body cannot be used: the seq and what it replaces are entered as quarantined.
        """
        seq = record.seq
        held = next(iter(self._touching(seq, seq)), None)
        if held is not None:
            if held.digest == digest or held.kind in (REPLACED, TOMBSTONED):
                self.duplicates += 1
                self.answered.append(seq)
                return "duplicate"
            self.conflicts.append(seq)
            return "conflict"
        ranges = joined(record.replaces)
        rows = self._touching(ranges[0][0], ranges[-1][1]) if ranges else []
        if record.kind != "tombstone" and not malformed and _overlaps(ranges, rows):
            self.conflicts.append(seq)
            return "overlap"
        kind = QUARANTINED if malformed else TOMBSTONED if record.kind == "tombstone" else REPLACED
        for low, high in without(ranges, rows):
            self._add(Held(high, low, digest, kind))
            if kind == TOMBSTONED:
                self.tombstoned += high - low + 1
        self._add(Held(seq, seq, digest, QUARANTINED if malformed else record.kind))
        self.records += 1
        self.answered.append(seq)
        return "new"

    def settle(self) -> tuple[wire.Range, ...]:
        """Moves ``upto`` and ``high`` over what was added; returns the ranges held above ``upto``.

        Of more than ``MAX_EXTRA`` those are named that hold what was answered: a device that sends its windows before its samples
        leaves thousands of holes, and would send for ever what no acknowledgement names.
        """
        extra: list[wire.Range] = []
        complete = True
        for row in self._above():
            if row.seq <= self.upto:
                continue
            if not extra and row.low <= self.upto + 1:
                self.upto = row.seq
            elif extra and row.low == extra[-1][1] + 1:
                extra[-1] = (extra[-1][0], row.seq)
            elif len(extra) < MAX_EXTRA:
                extra.append((row.low, row.seq))
            else:
                complete = False
                break
        self.high = max(self.high, self.added[-1].seq if self.added else 0)
        if not complete:
            answered = joined([(seq, seq) for seq in sorted(set(self.answered)) if seq > self.upto])[:MAX_EXTRA]
            extra = extra[: MAX_EXTRA - len(answered)]
            extra += [span for span in answered if not extra or span[0] > extra[-1][1]]
        return tuple(extra)

    def _above(self) -> Iterator[Held]:
        """Rows above ``upto``, ascending, those that are stored a page at a time."""
        above = self.upto
        fresh = self.added[bisect.bisect_right(self.added, above, key=_seq) :]
        # Without a gap below what was stored, only what this transaction added can lie above.
        return iter(fresh) if self.high == above else heapq.merge(self._stored(above + 1), fresh, key=_seq)

    def _stored(self, low: int) -> Iterator[Held]:
        while page := self.load(low, wire.MAX_SEQ, _PAGE):
            yield from page
            if len(page) < _PAGE:
                return
            low = page[-1].seq + 1

    def _touching(self, low: int, high: int) -> list[Held]:
        found = list(self.load(low, high, _ALL)) if low <= self.high else []
        start = bisect.bisect_left(self.added, low, key=_seq)
        fresh = []
        for row in self.added[start:]:
            if row.low > high:
                break
            fresh.append(row)
        return sorted(found + fresh) if found and fresh else found or fresh

    def _add(self, row: Held) -> None:
        if not self.added or row.seq > self.added[-1].seq:
            self.added.append(row)
        else:
            bisect.insort(self.added, row, key=_seq)


def joined(ranges: Sequence[wire.Range]) -> list[wire.Range]:
    """Ascending disjoint ranges with neighbours put together.

    >>> joined([(1, 2), (3, 3), (5, 9)])
    [(1, 3), (5, 9)]
    """
    out: list[wire.Range] = []
    for low, high in ranges:
        if out and out[-1][1] + 1 == low:
            out[-1] = (out[-1][0], high)
        else:
            out.append((low, high))
    return out


def without(ranges: Sequence[wire.Range], rows: Sequence[Held]) -> list[wire.Range]:
    """What of the ranges no row covers; both ascending and disjoint.

    >>> without([(1, 9)], [Held(3, 2, b"", "window"), Held(9, 9, b"", "window")])
    [(1, 1), (4, 8)]
    """
    out: list[wire.Range] = []
    at = 0
    for low, high in ranges:
        while at < len(rows) and rows[at].seq < low:
            at += 1
        here = at
        while here < len(rows) and rows[here].low <= high:
            if rows[here].low > low:
                out.append((low, rows[here].low - 1))
            low = rows[here].seq + 1
            here += 1
        if low <= high:
            out.append((low, high))
    return out


def _overlaps(ranges: Sequence[wire.Range], rows: Sequence[Held]) -> bool:
    counted = [row for row in rows if row.kind != QUARANTINED]
    if not counted or not ranges:
        return False
    wanted = sum(high - low + 1 for low, high in ranges)
    return sum(high - low + 1 for low, high in without(ranges, counted)) != wanted


def _seq(row: Held) -> int:
    return row.seq
