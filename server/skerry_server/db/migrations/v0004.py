"""Version 4: the judge's looks, the devices' state when they were frozen, and what was counted right after a switch."""

from __future__ import annotations

NAME = "the judge"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE looks (
    rollout VARCHAR(63) NOT NULL,
    stage INTEGER NOT NULL,
    number INTEGER NOT NULL,
    at_ms BIGINT NOT NULL,
    information FLOAT NOT NULL,
    evidence {BYTES} NOT NULL,
    ruling JSON NOT NULL,
    memory {BYTES} NOT NULL,
    PRIMARY KEY (rollout, stage, number),
    FOREIGN KEY(rollout) REFERENCES rollouts (id)
)
    """,
    """
ALTER TABLE rollout_devices ADD COLUMN online BOOLEAN DEFAULT TRUE NOT NULL
    """,
    """
ALTER TABLE evidence ADD COLUMN entered_boot VARCHAR(32) DEFAULT '' NOT NULL
    """,
    """
ALTER TABLE evidence ADD COLUMN entered_ns BIGINT DEFAULT 0 NOT NULL
    """,
    """
ALTER TABLE evidence ADD COLUMN early {BYTES}
    """,
)
