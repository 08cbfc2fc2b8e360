"""Stored looks held against what they rest on: the judge is asked again, and must say the same, byte for byte.

Reads only. It takes long where a stage has many devices, so a question is of some looks only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from skerry_server import judging, looks
from skerry_server.core import judge as j
from skerry_server.core import plan as p
from skerry_server.db import tables as t

MOST_EXPLAINED = 50
"""Looks that are recomputed for one question. One takes 0.03 to 0.1 s with 2,010 devices, in the process that takes what devices send."""


def explain(
    conn: Connection, row: Mapping[str, Any], stage: int, *, after: int = 0, limit: int = MOST_EXPLAINED
) -> Explained:
    """Looks of a stage to be held against what they rest on. Reads only; ``Explained.to_builtins`` recomputes, which takes longer.

    Args:
        after: number of the look before the first that is wanted.
        limit: as many looks at most.
    """
    c = t.looks.c
    of_stage = (c.rollout == row["id"], c.stage == stage)
    count = conn.execute(select(func.count()).select_from(t.looks).where(*of_stage)).scalar_one()
    # The one before them too: what it left is where the first of them begins.
    query = select(*looks.LOOK).where(*of_stage, c.number >= after).order_by(c.number).limit(limit + 2)
    rows = [dict(found) for found in conn.execute(query).mappings()]
    first = int(bool(rows) and rows[0]["number"] <= after)
    return Explained(
        rollout=row["id"],
        stage=stage,
        count=count,
        before=rows[0] if first else None,
        rows=rows[first : first + limit],
        is_more=len(rows) > first + limit,
        design=judging.design(conn, row, p.read_plan(row["plan"]), stage) if count else None,
        ruling=looks.standing(conn, row["id"], stage)[0],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """Some stored looks of a stage, as they are stored.

    Attributes:
        count: looks that the stage has in all.
        before: the look before the first of ``rows``; None at the start of the stage, or when it is not there.
        is_more: there are looks after these.
        design: None when the stage was never looked at.
        ruling: of the stage's newest look; None without one, or when it cannot be read.
    """

    rollout: str
    stage: int
    count: int
    before: dict[str, Any] | None
    rows: list[dict[str, Any]]
    is_more: bool
    design: j.Design | None
    ruling: j.Ruling | None

    def to_builtins(self) -> dict[str, Any]:
        """Recomputes each look from what is stored, and says whether the same comes out, byte for byte.

        A look begins from the memory that the look before it left, as it is stored. So all looks of a stage come out the same
        exactly when a replay from the first one does, whoever asks for them in however many parts.
        """
        units = self.design.units if self.design is not None else ()
        told: list[dict[str, Any]] = []
        before = self.before
        for row in self.rows:
            told.append(self._look(row, before))
            before = row
        return {
            "rollout": self.rollout,
            "stage": self.stage,
            "looks": told,
            "count": self.count,
            "next": str(self.rows[-1]["number"]) if self.is_more else None,
            "identical": all(look["identical"] for look in told),
            "arms": {
                "candidate": [unit.device for unit in units if unit.candidate],
                "control": [unit.device for unit in units if not unit.candidate],
            }
            if units
            else {},
            "ruling": None if self.ruling is None else self.ruling.to_builtins(),
        }

    def _look(self, row: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
        said = {"number": row["number"], "at_ms": row["at_ms"], "information": row["information"]}
        try:
            taken = looks.taken_of(row)
        except looks.UnreadableLook as error:
            return said | {"verdict": "", "reasons": [], "identical": False, "fault": f"cannot be read: {error.why}"}
        said |= {"verdict": taken.ruling.verdict, "reasons": list(taken.ruling.reasons)}
        try:
            ruling, memory = self._recomputed(row, taken, before)
        except (looks.UnreadableLook, ValueError, TypeError, ArithmeticError) as error:
            return said | {"identical": False, "fault": f"cannot be recomputed: {error}"}
        if looks.as_bytes(ruling) == looks.as_bytes(taken.ruling) and looks.as_bytes(memory) == looks.as_bytes(
            taken.memory
        ):
            return said | {"identical": True}
        return said | {"identical": False, "recomputed": ruling.to_builtins()}

    def _recomputed(
        self, row: Mapping[str, Any], taken: looks.Taken, before: Mapping[str, Any] | None
    ) -> tuple[j.Ruling, j.Memory]:
        assert self.design is not None
        if taken.look.number != row["number"]:
            raise ValueError(f"what is stored is of look {taken.look.number}")
        if row["number"] == 1:
            return j.judge(self.design, taken.look, j.Memory())
        if before is None or before["number"] != row["number"] - 1:
            raise ValueError("the look before it is missing")
        return j.judge(self.design, taken.look, looks.taken_of(before).memory)
