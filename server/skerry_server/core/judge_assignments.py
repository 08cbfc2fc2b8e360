"""The reference assignments of the judge: other ways in which the arms could have fallen, within strata.

All of them when there are at most ``ENUMERATE``, each once. Otherwise the observed one and ``DRAWN`` drawn ones, seeded by
(rollout, stage). The draw uses nothing of numpy but the raw output of the bit generator PCG64, started from a sha256: both are
fixed by their definitions, so that every version of Python and numpy draws the same. A golden vector in the tests guards it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skerry_server.core.judge_values import Design
from skerry_server.core.recent import Recent

ENUMERATE = 3000
DRAWN = 1999
_CHUNK = 1 << 22
_UNIT_BYTES = 300

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assignments:
    """Who would be a candidate, one row per assignment.

    Units are numbered in the order (stratum, device), whatever the order of the design. Of each stratum the smaller arm is
    kept: ``members`` holds unit numbers of its candidates, or, where these are most, of its controls plus ``len(order)``.

    Attributes:
        order: number -> index in ``Design.units``.
        stratum: number -> number of its stratum.
        candidate: number -> whether it is one.
        observed: row of the assignment that was made.
        flipped: numbers of units in strata of which the controls are kept.
    """

    order: Indices
    stratum: Indices
    candidate: Bools
    members: Indices
    observed: int
    flipped: Bools

    @property
    def total(self) -> int:
        """How many there are, the observed one included."""
        return len(self.members)

    def sums(self, values: Floats) -> Floats:
        """Per assignment the sum of the values (by unit number) of its candidates.

        Exact, and so without regard to the order of summation, for values that are whole multiples of one power of two and
        add up to less than 2**53 of it.
        """
        both = np.concatenate([values, -values])
        found: Floats = both[self.members].sum(axis=1) + values[self.flipped].sum()
        return found


def _assignments(design: Design) -> Assignments:
    order = sorted(range(len(design.units)), key=lambda i: (design.units[i].stratum, design.units[i].device))
    units = [design.units[i] for i in order]
    names = sorted({unit.stratum for unit in units})
    number = {name: i for i, name in enumerate(names)}
    stratum = np.array([number[unit.stratum] for unit in units], np.int32)
    candidate = np.array([unit.candidate for unit in units], np.bool_)
    blocks = []
    for i in range(len(names)):
        block = np.flatnonzero(stratum == i).astype(np.int32)
        blocks.append((block, candidate[block]))
    flipped = np.zeros(len(units), np.bool_)
    kept: list[tuple[Indices, Bools]] = []
    for block, inside in blocks:
        flip = 2 * int(inside.sum()) > len(block)
        flipped[block] = flip
        kept.append((block, ~inside if flip else inside))
    ways = math.prod(math.comb(len(block), int(inside.sum())) for block, inside in kept)
    if ways <= ENUMERATE:
        members, observed = _all(kept)
    else:
        members, observed = _drawn(kept, _seed(design)), 0
    # Units of flipped strata are meant as "not this one": their second copy holds the negative value.
    members = np.where(flipped[members], members + len(units), members).astype(np.int32)
    return Assignments(
        order=np.array(order, np.int32),
        stratum=stratum,
        candidate=candidate,
        members=members,
        observed=observed,
        flipped=flipped,
    )


def _weigh(design: Design, found: Assignments) -> int:
    arrays = (found.order, found.stratum, found.candidate, found.members, found.flipped)
    return _UNIT_BYTES * len(design.units) + sum(array.nbytes for array in arrays)


assignments = Recent(_assignments, _weigh, most_bytes=128 << 20)
"""The reference set of a design: a pure function. Those of the designs asked for last are kept, since every look asks again: one of 2,010
units with 10 candidates takes 0.1 s or more to draw and less than a megabyte to keep, one of 2,000 candidates 16 megabytes."""


def how_many(design: Design) -> int:
    """How many assignments the reference set of a design has."""
    return assignments(design).total


def _seed(design: Design) -> bytes:
    return hashlib.sha256(f"skerry judge 1\0{design.rollout}\0{design.stage}".encode()).digest()


def _all(blocks: list[tuple[Indices, Bools]]) -> tuple[Indices, int]:
    choices = [[tuple(c) for c in itertools.combinations(b.tolist(), int(inside.sum()))] for b, inside in blocks]
    rows = [sum(parts, ()) for parts in itertools.product(*choices)]
    made = sum((tuple(b[inside].tolist()) for b, inside in blocks), ())
    return np.array(rows, np.int32).reshape(len(rows), len(made)), rows.index(made)


def _drawn(blocks: list[tuple[Indices, Bools]], seed: bytes) -> Indices:
    raw = raw_stream(seed)
    parts: list[Indices] = []
    for block, inside in blocks:
        n, k = len(block), int(inside.sum())
        rows = np.empty((DRAWN + 1, k), np.int32)
        rows[0] = block[inside]
        if k:
            # The k smallest of n random keys. The low bits hold the position, so that no two keys are equal.
            low = np.uint64((1 << n.bit_length()) - 1)
            position = np.arange(n, dtype=np.uint64)
            step = max(1, _CHUNK // n)
            for begin in range(0, DRAWN, step):
                count = min(step, DRAWN - begin)
                keys = (raw.random_raw(count * n).reshape(count, n) & ~low) | position
                smallest = np.partition(keys, k - 1, axis=1)[:, :k] if k < n else keys
                chosen = np.sort((smallest & low).astype(np.int64), axis=1)
                rows[1 + begin : 1 + begin + count] = block[chosen]
        parts.append(rows)
    return np.concatenate(parts, axis=1)


def raw_stream(seed: bytes) -> np.random.PCG64:
    """PCG64 (PCG XSL RR 128/64) whose state and increment are the two halves of a 32-byte seed."""
    raw = np.random.PCG64(0)
    state = int.from_bytes(seed[:16], "big")
    increment = int.from_bytes(seed[16:32], "big") | 1
    raw.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": increment},
        "has_uint32": 0,
        "uinteger": 0,
    }
    return raw
