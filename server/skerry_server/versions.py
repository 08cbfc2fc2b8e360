"""Optimistic versions: who changes something may say which version of it they read, and is refused when it has moved on since.

The refusal says what is there now and who changed it last, so that the caller can decide anew. A request without a version
changes whatever is there. Rows are read with a lock by the callers: between the check and the write nobody comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from skerry_server import audit
from skerry_server.errors import Conflict


def expect(conn: Connection, subject: str, *, wanted: int | None, present: int, now: Mapping[str, Any]) -> None:
    """Checks the version that a caller read; None is always right.

    Args:
        subject: as in the audit, e.g. ``group:press``.
        present: the version that is there, 0 when the thing is not there yet.
        now: what the caller wants to change, as it is.

    Raises:
        Conflict: ``moved_on``, with ``version``, ``now`` and ``last`` (who, what, when; None when nobody ever did).
    """
    if wanted is None or wanted == present:
        return
    last = audit.last(conn, subject)
    by = "" if last is None else f"; last: {last['action']} by {last['actor']}"
    kind, _, name = subject.partition(":")
    raise Conflict(
        "moved_on",
        f"{kind} {name!r} has changed since: it is at version {present}, not {wanted}{by}",
        version=present,
        now=dict(now),
        last=last,
    )
