"""Version 5: what is recorded about a thing is found by its name. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "audit by subject"

STATEMENTS: tuple[str, ...] = ("CREATE INDEX audit_by_subject ON audit (subject, id)",)
