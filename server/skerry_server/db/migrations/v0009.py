"""Version 9: what operators asked devices' logs for, and what came. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "requested logs"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE log_requests (
    id {ID} NOT NULL,
    device VARCHAR(63) NOT NULL,
    asked_by VARCHAR(100) NOT NULL,
    asked_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    fault VARCHAR(60) NOT NULL,
    size BIGINT NOT NULL,
    body {BYTES},
    PRIMARY KEY (id)
)
    """,
    """
CREATE INDEX log_requests_by_device ON log_requests (device, id)
    """,
)
