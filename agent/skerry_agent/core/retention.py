"""The outbox at its bound: what to merge, thin and drop; and what to send next.

The order of sacrifice: time resolution first (old windows of one key merge into coarser ones, no inference is lost), then
samples (every second of the old ones, then all), then old events beyond the newest ``KEPT_EVENTS``, then the oldest
windows, at last the remaining events. What is dropped leaves a tombstone that names it. A record that was ever sent is
frozen: until the server says what it holds, it is neither merged nor dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from skerry_contract.wire import Kind, Range

MERGE_AT_ONCE = 8
KEPT_EVENTS = 200
NEWEST_FIRST: frozenset[Kind] = frozenset({"event", "tombstone"})
"""Kinds of which the newest is sent first: a person waits for it. Windows go in their order, so that the server's ledger has no gap."""
LOW_WATER = 0.8
"""Retention goes on until this share of the bound is reached, so that it does not run at every append."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What decides about a record. ``key`` names its window key, ``size`` is in bytes."""

    seq: int
    kind: Kind
    key: str
    size: int
    sent: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Windows of one key become one record, which replaces them."""

    seqs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Records go; one tombstone replaces them. ``why`` is the tombstone's."""

    seqs: tuple[int, ...]
    why: Literal["samples_thinned", "samples_dropped", "events_dropped", "windows_dropped"]


Action = Merge | Drop


def plan_retention(rows: Sequence[Row], used_bytes: int, bound_bytes: int) -> tuple[Action, ...]:
    """What to do now; empty when all fits or nothing more can go.

    Each answer is one kind of sacrifice. The caller carries it out, measures and asks again until the answer is empty.

    Args:
        rows: all records of the epoch, ascending by seq.
        used_bytes: what the outbox takes; bound_bytes: what it may take.
    """
    excess = used_bytes - int(bound_bytes * LOW_WATER)
    if used_bytes <= bound_bytes or excess <= 0:
        return ()
    free = [row for row in rows if not row.sent]
    merges = _merges(free, excess)
    if merges:
        return merges
    samples = [row for row in free if row.kind == "sample"]
    if len(samples) >= 4:
        thinned = samples[: len(samples) * 3 // 4 : 2]
        return (Drop(seqs=tuple(row.seq for row in thinned), why="samples_thinned"),)
    if samples:
        return (Drop(seqs=tuple(row.seq for row in samples), why="samples_dropped"),)
    events = [row for row in free if row.kind == "event"]
    windows = [row for row in free if row.kind == "window"]
    if len(events) > KEPT_EVENTS:
        return (Drop(seqs=_oldest(events[:-KEPT_EVENTS], excess), why="events_dropped"),)
    # A drop that frees less than its tombstone takes would never end.
    if sum(row.size for row in windows) > 0:
        return (Drop(seqs=_oldest(windows, excess), why="windows_dropped"),)
    if len(events) > 1:
        return (Drop(seqs=_oldest(events, excess), why="events_dropped"),)
    return ()


def _merges(free: Iterable[Row], excess: int) -> tuple[Merge, ...]:
    by_key: dict[str, list[Row]] = {}
    for row in free:
        if row.kind == "window":
            by_key.setdefault(row.key, []).append(row)
    runs = [
        run
        for rows in by_key.values()
        for start in range(0, len(rows), MERGE_AT_ONCE)
        if len(run := rows[start : start + MERGE_AT_ONCE]) > 1
    ]
    chosen: list[Merge] = []
    for run in sorted(runs, key=lambda run: run[0].seq):
        if excess <= 0:
            break
        # Merged windows share their bins: about as large as the largest.
        excess -= sum(row.size for row in run) - max(row.size for row in run)
        chosen.append(Merge(seqs=tuple(row.seq for row in run)))
    return tuple(chosen)


def _oldest(rows: Sequence[Row], excess: int) -> tuple[int, ...]:
    seqs: list[int] = []
    for row in rows:
        if excess <= 0 and seqs:
            break
        excess -= row.size
        seqs.append(row.seq)
    return tuple(seqs)


def next_batch(rows: Iterable[Row], in_flight: Collection[int], *, max_bytes: int, max_records: int) -> tuple[int, ...]:
    """The seqs of the next upload, ascending; empty when nothing waits.

    Events and tombstones go before windows, the newest of them first; windows before samples, the oldest first. A record
    larger than ``max_bytes`` goes alone.
    """
    rank = {"event": 0, "tombstone": 0, "window": 1, "sample": 2}
    waiting = sorted(
        (row for row in rows if row.seq not in in_flight),
        key=lambda row: (rank[row.kind], -row.seq if row.kind in NEWEST_FIRST else row.seq),
    )
    seqs: list[int] = []
    total = 0
    for row in waiting:
        if seqs and (total + row.size > max_bytes or len(seqs) >= max_records):
            break
        seqs.append(row.seq)
        total += row.size
    return tuple(sorted(seqs))


def together(spans: Sequence[Sequence[Range]], most: int) -> list[int]:
    """How many neighbours may share one record each time, so that it replaces at most ``most`` ranges; one alone always may.

    Args:
        spans: what each of them stands for, ascending, disjoint, of one with those of the others.

    >>> together([[(1, 1)], [(3, 3)], [(5, 5)], [(6, 6)]], 2)
    [2, 2]
    >>> together([[(1, 1), (3, 3)], [(2, 2)]], 1)
    [2]
    """
    if len(join_ranges(span for one in spans for span in one)) <= most:
        return [len(spans)] if spans else []
    found: list[int] = []
    joined: tuple[Range, ...] = ()
    upper = 0
    for one in spans:
        upper += len(one)
        if upper > most:
            # Counted anew only where it could matter: each time would take time by the square.
            joined = join_ranges((*joined, *one))
            upper = len(joined)
        else:
            joined = (*joined, *one)
        if found and upper <= most:
            found[-1] += 1
        else:
            found.append(1)
            joined, upper = tuple(one), len(one)
    return found


def ranges_of(seqs: Iterable[int]) -> tuple[Range, ...]:
    """Ascending disjoint inclusive ranges.

    >>> ranges_of([3, 1, 2, 7])
    ((1, 3), (7, 7))
    """
    found: list[Range] = []
    for seq in sorted(set(seqs)):
        if found and found[-1][1] == seq - 1:
            found[-1] = (found[-1][0], seq)
        else:
            found.append((seq, seq))
    return tuple(found)


def join_ranges(spans: Iterable[Range]) -> tuple[Range, ...]:
    """The same for ranges; they may touch, not overlap."""
    found: list[Range] = []
    for low, high in sorted(spans):
        if found and found[-1][1] >= low - 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return tuple(found)
