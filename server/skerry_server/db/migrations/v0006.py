"""Version 6: what devices say of a rollout, one row per device. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "reports of a rollout"

_UNABLE = (
    "('no_variant', 'agent_too_old', 'runtime_missing', 'not_enough_disk', 'not_enough_memory', 'storage_failed', "
    "'not_enrolled', 'identity_damaged')"
)
_ELSEWHERE = (
    "('unreachable', 'timeout', 'expired', 'rollback', 'withdrawn', 'interrupted', 'busy', 'courier_crashed', "
    "'process_not_started')"
)
_OF_THE_CANDIDATE = (
    "e.device = d.id AND e.name = 'update' AND e.received_ms >= r.created_ms"
    " AND {NAMED_ROLLOUT} = r.id AND {NAMED_DIGEST} = r.candidate AND e.code"
)

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE rollout_reports (
    rollout VARCHAR(63) NOT NULL,
    device VARCHAR(63) NOT NULL,
    went_back VARCHAR(60) NOT NULL,
    unable VARCHAR(60) NOT NULL,
    crashed_ms BIGINT NOT NULL,
    PRIMARY KEY (rollout, device),
    FOREIGN KEY(rollout) REFERENCES rollouts (id)
)
    """,
    # Rollouts under way: what was said in them stands among the events.
    f"""
INSERT INTO rollout_reports (rollout, device, went_back, unable, crashed_ms)
SELECT rollout, device, went_back, unable, crashed_ms FROM (
    SELECT r.id AS rollout, d.id AS device,
        COALESCE((SELECT e.code FROM events e WHERE {_OF_THE_CANDIDATE} <> '' AND e.code NOT IN {_UNABLE}
            AND e.code NOT IN {_ELSEWHERE} ORDER BY e.id DESC LIMIT 1), '') AS went_back,
        COALESCE((SELECT e.code FROM events e WHERE {_OF_THE_CANDIDATE} IN {_UNABLE} ORDER BY e.id DESC LIMIT 1), '') AS unable,
        COALESCE((SELECT MAX(e.received_ms) FROM events e WHERE e.device = d.id AND e.name = 'worker'
            AND e.code IN ('runtime_crashed', 'worker_hung') AND e.received_ms >= r.created_ms AND {{NAMES_MODEL}}), 0) AS crashed_ms
    FROM rollouts r JOIN devices d ON d."group" = r."group"
    WHERE r.state IN ('draft', 'running', 'paused', 'completing', 'rolling_back')
) AS said WHERE went_back <> '' OR unable <> '' OR crashed_ms > 0
    """,  # noqa: S608 (of constants)
)
