"""Version 7: bundles in shadow, and what devices paired. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "shadows"

STATEMENTS: tuple[str, ...] = (
    """
ALTER TABLE group_models ADD COLUMN shadow VARCHAR(64)
    """,
    """
CREATE TABLE shadows (
    device VARCHAR(63) NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    candidate VARCHAR(64) NOT NULL,
    model VARCHAR(63) NOT NULL,
    pairs BIGINT NOT NULL,
    agreed BIGINT NOT NULL,
    first_ms BIGINT NOT NULL,
    last_ms BIGINT NOT NULL,
    body {BYTES} NOT NULL,
    PRIMARY KEY (device, bundle, candidate)
)
    """,
    """
CREATE INDEX shadows_by_model ON shadows (model, candidate, bundle, device)
    """,
)
