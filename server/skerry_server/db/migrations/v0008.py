"""Version 8: boots of devices, by which instants of a clock that was not set are placed. Frozen once shipped."""

from __future__ import annotations

NAME = "boots of devices"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE boots (
    device VARCHAR(63) NOT NULL,
    boot_id VARCHAR(32) NOT NULL,
    synced_ms BIGINT,
    heard_ms BIGINT,
    last_ms BIGINT NOT NULL,
    PRIMARY KEY (device, boot_id)
)
    """,
    "ALTER TABLE windows ADD COLUMN timed VARCHAR(8) DEFAULT 'device' NOT NULL",
)
