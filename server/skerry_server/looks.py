"""Looks of the judge in the database: stored once, read again as they were written, or named as unreadable.

Owns the table ``looks``. What a look is of, and when the next is due, is ``judging``'s.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Text, func, insert, select, type_coerce

from skerry_server.core import judge as j
from skerry_server.db import tables as t


class UnreadableLook(Exception):
    """A look is stored that this release cannot read. Names it, and what is wrong."""

    def __init__(self, rollout: str, stage: int, number: int, cause: Exception) -> None:
        self.number, self.why = number, f"{type(cause).__name__}: {cause}"
        super().__init__(
            f"the stored look {number} of stage {stage + 1} of rollout {rollout} cannot be read: {self.why}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A look, new or stored. ``at_ms``: by the server's clock."""

    stage: int
    at_ms: int
    look: j.Look
    ruling: j.Ruling
    memory: j.Memory


def last(conn: Connection, rollout: str, stage: int) -> Taken | None:
    """The newest look at a stage.

    Raises:
        UnreadableLook: the judge cannot go on from it.
    """
    c = t.looks.c
    query = select(*LOOK).where(c.rollout == rollout, c.stage == stage).order_by(c.number.desc()).limit(1)
    row = conn.execute(query).mappings().first()
    return None if row is None else taken_of(dict(row))


def standing(conn: Connection, rollout: str, stage: int) -> tuple[j.Ruling | None, str]:
    """What the judge last said of a stage, and why that cannot be told: the two as ``core.rollout.decide`` takes them.

    For all who show how a rollout stands: a stored look that cannot be read is a fault of this one rollout, not of the question.
    """
    try:
        taken = last(conn, rollout, stage)
    except UnreadableLook as error:
        return None, str(error)
    return None if taken is None else taken.ruling, ""


def newest_stage(conn: Connection, rollout: str) -> int:
    """The last stage that was looked at; 0 when none was."""
    return int(
        conn.execute(
            select(func.coalesce(func.max(t.looks.c.stage), 0)).where(t.looks.c.rollout == rollout)
        ).scalar_one()
    )


def all_of(conn: Connection, rollout: str, stage: int) -> list[Taken]:
    """Every look at a stage, oldest first."""
    c = t.looks.c
    query = select(*LOOK).where(c.rollout == rollout, c.stage == stage).order_by(c.number)
    return [taken_of(dict(row)) for row in conn.execute(query).mappings()]


def keep(conn: Connection, rollout: str, taken: Taken) -> None:
    """Stores a look, in the caller's transaction."""
    conn.execute(insert(t.looks).values(**stored(rollout, taken)))


def as_bytes(value: j.Ruling | j.Memory) -> bytes:
    """To be compared: the same value is the same bytes."""
    return msgspec.json.encode(value.to_builtins(), order="sorted")


def _packed(value: j.Look | j.Memory) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(value))


def stored(rollout: str, taken: Taken) -> dict[str, Any]:
    """The row of a look."""
    return {
        "rollout": rollout,
        "stage": taken.stage,
        "number": taken.look.number,
        "at_ms": taken.at_ms,
        "information": taken.look.information,
        "evidence": _packed(taken.look),
        "ruling": taken.ruling.to_builtins(),
        "memory": _packed(taken.memory),
    }


# As text, where the database gives it so: then JSON that is none shows in ``taken_of``, and not while rows are fetched.
LOOK = tuple(type_coerce(c, Text).label(c.name) if c.name == "ruling" else c for c in t.looks.c)


def taken_of(row: Mapping[str, Any]) -> Taken:
    """The look of a row.

    Raises:
        UnreadableLook: it is nothing that this release can read.
    """
    try:
        ruling = row["ruling"]
        return Taken(
            stage=row["stage"],
            at_ms=row["at_ms"],
            look=msgspec.msgpack.decode(zlib.decompress(row["evidence"]), type=j.Look),
            ruling=j.Ruling.from_builtins(json.loads(ruling) if isinstance(ruling, str) else ruling),
            memory=msgspec.msgpack.decode(zlib.decompress(row["memory"]), type=j.Memory),
        )
    except (zlib.error, msgspec.MsgspecError, ValueError, TypeError) as error:
        raise UnreadableLook(row["rollout"], row["stage"], row["number"], error) from error
