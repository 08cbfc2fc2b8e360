"""Drift in the database: the last look at each bundle, and what was opened and closed on it.

Owns ``drift_evaluations`` and ``drift_findings``. Each opening and closing is one transaction with its audit row. Leaves the
decision to ``core.drift`` and the loop to ``watch``.

Silence closes nothing: a bundle without new rows keeps its findings, since no data is no evidence. They end when no group,
rollout or pin names the bundle any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from skerry_contract import manifest as m
from sqlalchemy import Connection, RowMapping, Select, insert, select, tuple_, update

from skerry_server import audit, profiles, registry
from skerry_server.core import drift as core
from skerry_server.core.profile import shape_of
from skerry_server.db import queries
from skerry_server.db import tables as t

ACTOR = "system:drift"
NOT_SERVED = "no group, rollout or pin names the bundle any more"
_DIGITS = 6

_f = t.drift_findings.c


def due(connection: Connection, since_ms: int) -> list[str]:
    """Bundles that have counted something since then, or have open findings."""
    fresh = connection.execute(select(t.profiles.c.bundle).where(t.profiles.c.updated_ms >= since_ms).distinct())
    held = connection.execute(select(_f.bundle).where(_f.closed_ms.is_(None)).distinct())
    return sorted({*fresh.scalars(), *held.scalars()})


def served(connection: Connection, bundle: str) -> bool:
    """Whether something still names the bundle."""
    return bool(registry.users(connection, bundle))


def look(
    connection: Connection, bundle: str, manifest: m.Manifest, limits: core.Limits, *, lookback_ms: int, now_ms: int
) -> core.Evaluation:
    """Evaluates a bundle as it stands; writes nothing."""
    found = profiles.buckets(connection, bundle, shape_of(manifest), from_ms=now_ms - lookback_ms, upto_ms=now_ms)
    spans = core.gather(manifest, found, limits)
    opened = connection.execute(select(_f.subject).where(_f.bundle == bundle, _f.closed_ms.is_(None))).scalars()
    return core.evaluate(manifest, spans, frozenset(opened), limits)


def store(connection: Connection, bundle: str, model: str, evaluation: core.Evaluation, *, now_ms: int) -> list[str]:
    """Writes an evaluation and what it opens and closes; returns those changes in words."""
    row = {
        "model": model,
        "at_ms": now_ms,
        "verdict": evaluation.verdict,
        "reason": evaluation.reason,
        **{name: getattr(evaluation, name) for name in ("n", "from_ms", "to_ms", "spans")},
        "subjects": len(evaluation.subjects),
        "evaluation": plain(evaluation),
    }
    entered = queries.upsert(connection, t.drift_evaluations).values(bundle=bundle, **row)
    connection.execute(entered.on_conflict_do_update(index_elements=["bundle"], set_=row))
    opened = {
        finding["subject"]: finding
        for finding in connection.execute(
            select(t.drift_findings).where(_f.bundle == bundle, _f.closed_ms.is_(None))
        ).mappings()
    }
    changes = []
    for subject in evaluation.subjects:
        held = opened.get(subject.subject)
        if held is None and subject.change == "open":
            _open(connection, bundle, model, subject, now_ms)
        elif held is not None and subject.change == "close":
            close(connection, held, "; ".join(subject.reasons), now_ms=now_ms)
        else:
            if held is not None and subject.now.state != "unknown":
                numbers = {"numbers": plain(subject), "updated_ms": now_ms}
                connection.execute(update(t.drift_findings).where(_f.id == held["id"]).values(**numbers))
            continue
        changes.append(f"{subject.change} {subject.subject}")
    return changes


def _open(connection: Connection, bundle: str, model: str, subject: core.Subject, now_ms: int) -> None:
    numbers = plain(subject)
    connection.execute(
        insert(t.drift_findings).values(
            model=model,
            bundle=bundle,
            subject=subject.subject,
            since_ms=subject.since_ms,
            opened_ms=now_ms,
            updated_ms=now_ms,
            numbers=numbers,
        )
    )
    audit.record(
        connection,
        at_ms=now_ms,
        actor=ACTOR,
        action="drift.open",
        subject=_audited(model, bundle, subject.subject),
        after={"since_ms": subject.since_ms, "numbers": numbers["now"]},
        reason="; ".join(subject.reasons),
    )


def close(connection: Connection, held: RowMapping, reason: str, *, now_ms: int) -> None:
    """Ends a finding."""
    values = {"closed_ms": now_ms, "closed_because": reason}
    connection.execute(update(t.drift_findings).where(_f.id == held["id"]).values(**values))
    audit.record(
        connection,
        at_ms=now_ms,
        actor=ACTOR,
        action="drift.close",
        subject=_audited(held["model"], held["bundle"], held["subject"]),
        before={"since_ms": held["since_ms"], "opened_ms": held["opened_ms"]},
        reason=reason,
    )


def close_unserved(connection: Connection, bundle: str, *, now_ms: int) -> int:
    """Ends every finding of a bundle that nothing names any more, and says so as its last look; returns how many."""
    e = t.drift_evaluations.c
    said = {"verdict": "NO_DATA", "reason": NOT_SERVED, "at_ms": now_ms}
    connection.execute(update(t.drift_evaluations).where(e.bundle == bundle, e.reason != NOT_SERVED).values(**said))
    rows = connection.execute(select(t.drift_findings).where(_f.bundle == bundle, _f.closed_ms.is_(None))).mappings()
    held = list(rows)
    for row in held:
        close(connection, row, NOT_SERVED, now_ms=now_ms)
    return len(held)


def _audited(model: str, bundle: str, subject: str) -> str:
    return f"drift:{model}/{bundle[:12]}/{subject}"


def plain(value: Any) -> Any:
    """Builtins for a JSON column; numbers keep ``_DIGITS`` significant digits."""
    return _rounded(msgspec.to_builtins(value))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


# --- reading -------------------------------------------------------------------------------------------------------------


def evaluations_page(
    connection: Connection, *, model: str | None, after: tuple[str, str] | None, limit: int
) -> list[dict[str, Any]]:
    """The last look at each bundle by (model, bundle), with the bundle's version and its open findings."""
    e = t.drift_evaluations.c
    query = _last_looks().limit(limit)
    if model is not None:
        query = query.where(e.model == model)
    if after is not None:
        query = query.where(tuple_(e.model, e.bundle) > tuple_(*after))
    return _with_open_findings(connection, query)


def evaluations_of(connection: Connection, bundles: Sequence[str]) -> list[dict[str, Any]]:
    """As ``evaluations_page``, of these bundles."""
    return _with_open_findings(connection, _last_looks().where(t.drift_evaluations.c.bundle.in_(bundles)))


def _last_looks() -> Select[Any]:
    e, b = t.drift_evaluations.c, t.bundles.c
    return (
        select(*(column for column in e if column.name != "evaluation"), b.version)
        .select_from(t.drift_evaluations.outerjoin(t.bundles, b.digest == e.bundle))
        .order_by(e.model, e.bundle)
    )


def _with_open_findings(connection: Connection, query: Select[Any]) -> list[dict[str, Any]]:
    items = [dict(row) for row in connection.execute(query).mappings()]
    open_ones = findings(connection, [item["bundle"] for item in items], closed=False)
    for item in items:
        item["findings"] = [one for one in open_ones if one["bundle"] == item["bundle"]]
    return items


def evaluation_of(connection: Connection, bundle: str) -> dict[str, Any] | None:
    """The last look at one bundle with every number, and all its findings; None when it was never looked at."""
    e = t.drift_evaluations.c
    row = connection.execute(select(t.drift_evaluations).where(e.bundle == bundle)).mappings().first()
    if row is None:
        return None
    return dict(row) | {"findings": findings(connection, [bundle], closed=True)}


def findings(connection: Connection, bundles: Sequence[str], *, closed: bool) -> list[dict[str, Any]]:
    """Findings of some bundles, oldest first; without the closed ones unless asked."""
    query = select(t.drift_findings).where(_f.bundle.in_(list(bundles))).order_by(_f.opened_ms, _f.id)
    if not closed:
        query = query.where(_f.closed_ms.is_(None))
    return [dict(row) for row in connection.execute(query).mappings()]
