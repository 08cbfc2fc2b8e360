"""Version 10: what was explained. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "explanations"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE explanations (
    bundle VARCHAR(64) NOT NULL,
    variant VARCHAR(63) NOT NULL,
    bucket_ms BIGINT NOT NULL,
    chosen BIGINT NOT NULL,
    rows BIGINT NOT NULL,
    dropped BIGINT NOT NULL,
    body {BYTES} NOT NULL,
    PRIMARY KEY (bundle, variant, bucket_ms)
)
    """,
)
