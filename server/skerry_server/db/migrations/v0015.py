"""Version 15: the digest of a delta's own file, so that one that rotted is found. Frozen once shipped."""

from __future__ import annotations

NAME = "digests of deltas"

STATEMENTS: tuple[str, ...] = ("ALTER TABLE deltas ADD COLUMN sha256 VARCHAR(64)",)
