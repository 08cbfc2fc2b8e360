"""Version 13: deltas. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "deltas"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE deltas (
    base VARCHAR(64) NOT NULL,
    target VARCHAR(64) NOT NULL,
    state VARCHAR(20) NOT NULL,
    model VARCHAR(63) NOT NULL,
    path VARCHAR(200) NOT NULL,
    base_version VARCHAR(128) NOT NULL,
    target_version VARCHAR(128) NOT NULL,
    base_size BIGINT NOT NULL,
    target_size BIGINT NOT NULL,
    devices BIGINT NOT NULL,
    size BIGINT,
    took_s FLOAT,
    detail TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    maker VARCHAR(40) NOT NULL,
    changed_ms BIGINT NOT NULL,
    wanted_ms BIGINT NOT NULL,
    PRIMARY KEY (base, target)
)
    """,
)
