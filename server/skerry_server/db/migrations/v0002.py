"""Version 2: when a device went offline, a rollout entered its stage, the server's session began; certificates that name keys. Frozen, as every version that was shipped."""

from __future__ import annotations

NAME = "silence of devices, keys in certificates"

STATEMENTS: tuple[str, ...] = (
    "ALTER TABLE devices ADD COLUMN gone_ms BIGINT",
    "ALTER TABLE devices ADD COLUMN certificate_names_key BOOLEAN DEFAULT FALSE NOT NULL",
    "ALTER TABLE rollouts ADD COLUMN entered_ms BIGINT DEFAULT 0 NOT NULL",
    "ALTER TABLE server_sessions ADD COLUMN since_ms BIGINT DEFAULT 0 NOT NULL",
    "UPDATE rollouts SET entered_ms = stage_since_ms",
)
