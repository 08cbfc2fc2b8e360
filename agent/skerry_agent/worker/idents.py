"""A sorted index of the clients' own ids in a label book: which entry holds a digest.

It lies in memory only, beside the book's columns, and is made when a label by a client's own id first asks for it: two bytes
per such id (four where a book has more than 65,536 entries) and one more for the digest at which the next block begins. Making it
takes milliseconds, so it is made in slices, with other work of the event loop in between.

The digests themselves stay in the book. Every entry that is found is compared with what the book holds now, so an index that is
older than the book may miss what was written since, and never names a wrong entry.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt

BLOCK = 8
"""Entries per bound that is kept; so many are compared for each id."""
SLICE = 4096
"""At most so many are sorted at a time: 0.2 ms."""

Digests = npt.NDArray[np.integer]
Entries = npt.NDArray[np.integer]


class Index:
    """Entries of a column of digests in the order of those, in blocks of ``BLOCK``; ``bounds``: where the next block begins."""

    __slots__ = ("_blocks", "_bounds")

    def __init__(self, blocks: Entries, bounds: Digests) -> None:
        self._blocks = blocks
        self._bounds = bounds

    @property
    def size_bytes(self) -> int:
        """What it holds in memory."""
        return self._blocks.nbytes + self._bounds.nbytes

    def find(self, column: Digests, wanted: Digests) -> Entries:
        """The entries of ``column`` that hold one of ``wanted``, which is sorted; of equal ones the newest at least."""
        entries: Entries = self._blocks[self._bounds.searchsorted(wanted, side="right")]
        found: Entries = entries[column[entries] == wanted[:, None]]
        return found


def build(column: Digests, oldest: int, usable: npt.NDArray[np.bool_]) -> Generator[None, None, Index]:
    """Makes an index of ``column``, and stops for other work between slices.

    Args:
        column: digests; the same array that ``find`` will be given.
        oldest: entry after which, going round, each is newer than the one before; the newest of equal digests is kept.
        usable: which entries hold an id.
    """
    kind = np.uint16 if len(column) <= 1 << 16 else np.uint32
    entries = np.flatnonzero(usable).astype(kind)
    turn = int(np.searchsorted(entries, oldest))
    entries = np.concatenate((entries[turn:], entries[:turn]))
    yield
    # Digests are even over their range, so their highest bits make parts of about equal size.
    bits = max(0, (len(entries) // SLICE).bit_length())
    part = (column[entries] >> np.uint64(64 - bits)).astype(np.uint16) if bits else np.zeros(len(entries), np.uint16)
    yield
    found = [np.empty(0, kind)]
    digests = [np.empty(0, np.uint64)]
    for number in range(1 << bits):
        here = entries[part == number]
        values = column[here]
        order = np.argsort(values, kind="stable")
        here, values = here[order], values[order]
        last = np.ones(len(values), np.bool_)
        np.not_equal(values[1:], values[:-1], out=last[:-1])
        found.append(here[last])
        digests.append(values[last])
        yield
    ordered = np.concatenate(found)
    if not len(ordered):
        return Index(np.empty((1, 0), kind), np.empty(0, np.uint64))
    # The last block is filled up with its own: compared twice, it is found twice, which changes nothing.
    blocks = np.append(ordered, ordered[-1:].repeat(-len(ordered) % BLOCK)).reshape(-1, BLOCK)
    return Index(blocks, np.concatenate(digests)[BLOCK::BLOCK].copy())
