"""What a round of kills will be, drawn from ``(seed, number)`` alone: the sort of rollout, which parts die, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["server", "broker", "supervisor", "worker", "courier"]
Sort = Literal["plain", "judged", "bad"]
KINDS: tuple[Kind, ...] = ("server", "broker", "supervisor", "worker", "courier")
SURE_WITHIN = 3
"""In so many rounds every kind and every sort comes."""
ERRANDS = ("sync", "manifest", "fetch")
SORTS: tuple[Sort, ...] = ("plain", "judged", "bad")
ENDS = {"plain": "completed", "judged": "completed", "bad": "rolled_back"}
DEVICES, TFLITE = ("gas-1", "gas-2", "gas-3", "gas-4"), ("gas-4",)
GOOD, BAD = ("1.0.0", "2.0.0", "3.0.0"), "9.0.0"
"""Good versions take turns; of three, a device keeps two, so that every round downloads."""
WORLD, ANOTHER_WORLD = 1, 5
"""What applications read and good versions were trained on; what the bad one was trained on: it is right one time in five."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill as it was drawn.

    Attributes:
        at: after the rollout's start, as a share of what the last rollout of the sort took; of a courier: from then on the next one.
        device: of supervisor, worker, courier.
        wait_s: of a courier how long after it was first seen; of server and supervisor how long until they are started again.
        which: in [0, 1), of several workers.
        errand: of a courier; any will do once the rollout has ended.
    """

    kind: Kind
    at: float
    device: str
    wait_s: float
    which: float
    errand: str = ""


def drawn_sort(seed: int, number: int) -> Sort:
    """Every three rounds have each sort once."""
    block = list(SORTS)
    random.Random(f"{seed}:sorts:{number // len(block)}").shuffle(block)
    return block[number % len(block)]


def drawn_kills(seed: int, number: int) -> list[Kill]:
    """2 to 5 kills, by time. Each kind is sure to come in rounds 0 to 2, in 3 to 5 and so on; the rest is chance."""
    draw = random.Random(f"{seed}:kills:{number}")
    block = random.Random(f"{seed}:kinds:{number // SURE_WITHIN}")
    sure = [*KINDS, block.choice(KINDS)]
    block.shuffle(sure)
    kinds = [*sure[number % SURE_WITHIN :: SURE_WITHIN], *(draw.choice(KINDS) for _ in range(draw.randint(0, 3)))]
    kills = []
    for kind in kinds:
        at, device, which = draw.random(), draw.choice(DEVICES), draw.random()
        if kind == "courier":
            errand = draw.choice(ERRANDS)
            # What belongs to the update itself is over early.
            at = at if errand == "sync" else at / 3
            kill = Kill(kind=kind, at=at, device=device, wait_s=draw.uniform(0.0, 0.6), which=which, errand=errand)
        else:
            own = device if kind in ("supervisor", "worker") else ""
            kill = Kill(kind=kind, at=at, device=own, wait_s=draw.uniform(0.0, 2.5), which=which)
        kills.append(kill)
    return sorted(kills, key=lambda kill: kill.at)
