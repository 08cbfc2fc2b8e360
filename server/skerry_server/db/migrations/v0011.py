"""Version 11: how long labels took, beside what they said. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "lags of labels"

STATEMENTS: tuple[str, ...] = ("ALTER TABLE profiles ADD COLUMN lags {BYTES}",)
