"""Version 12: proposals of catalogs, and versions that devices hold beyond this server's. Frozen once shipped."""

from __future__ import annotations

NAME = "proposals, and versions ahead"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE proposals (
    id VARCHAR(16) NOT NULL,
    version BIGINT NOT NULL,
    metadata {BYTES} NOT NULL,
    floors {BYTES} NOT NULL,
    targets {BYTES},
    root {BYTES},
    state VARCHAR(20) NOT NULL,
    reason TEXT NOT NULL,
    proposed_by VARCHAR(100) NOT NULL,
    proposed_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    PRIMARY KEY (id)
)
    """,
    """
CREATE TABLE ahead (
    role VARCHAR(40) NOT NULL,
    version BIGINT NOT NULL,
    device VARCHAR(63) NOT NULL,
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (role)
)
    """,
)
