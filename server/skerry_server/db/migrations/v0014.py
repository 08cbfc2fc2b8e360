"""Version 14: content keys of encrypted bundles, devices' encryption keys, and which device was given which. Frozen once shipped."""

from __future__ import annotations

NAME = "content keys"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE content_keys (
    digest VARCHAR(64) NOT NULL,
    box {BYTES} NOT NULL,
    set_by VARCHAR(100) NOT NULL,
    set_ms BIGINT NOT NULL,
    PRIMARY KEY (digest)
)
    """,
    """
CREATE TABLE encryption_keys (
    device VARCHAR(63) NOT NULL,
    point {BYTES} NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    set_ms BIGINT NOT NULL,
    PRIMARY KEY (device)
)
    """,
    """
CREATE TABLE key_releases (
    digest VARCHAR(64) NOT NULL,
    device VARCHAR(63) NOT NULL,
    encryption_key VARCHAR(64) NOT NULL,
    times INTEGER NOT NULL,
    first_ms BIGINT NOT NULL,
    last_ms BIGINT NOT NULL,
    PRIMARY KEY (digest, device)
)
    """,
)
