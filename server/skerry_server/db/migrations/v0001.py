"""Version 1: every table of the first release. Frozen: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "first release"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE api_tokens (
    id {ID} NOT NULL,
    name VARCHAR(63) NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    role VARCHAR(20) NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT,
    revoked_ms BIGINT,
    used_ms BIGINT,
    PRIMARY KEY (id),
    UNIQUE (name),
    UNIQUE (sha256)
)
    """,
    """
CREATE TABLE audit (
    id {ID} NOT NULL,
    at_ms BIGINT NOT NULL,
    actor VARCHAR(100) NOT NULL,
    action VARCHAR(60) NOT NULL,
    subject VARCHAR(200) NOT NULL,
    "before" JSON,
    "after" JSON,
    reason TEXT NOT NULL,
    chain VARCHAR(64) NOT NULL,
    PRIMARY KEY (id)
)
    """,
    """
CREATE TABLE bells (
    target VARCHAR(70) NOT NULL,
    version BIGINT NOT NULL,
    rung_version BIGINT NOT NULL,
    PRIMARY KEY (target)
)
    """,
    """
CREATE TABLE blobs (
    sha256 VARCHAR(64) NOT NULL,
    size BIGINT NOT NULL,
    stored_ms BIGINT NOT NULL,
    PRIMARY KEY (sha256)
)
    """,
    """
CREATE TABLE bundles (
    digest VARCHAR(64) NOT NULL,
    model VARCHAR(63) NOT NULL,
    version VARCHAR(128) NOT NULL,
    state VARCHAR(20) NOT NULL,
    reason TEXT NOT NULL,
    manifest {BYTES} NOT NULL,
    signature {BYTES},
    submitter VARCHAR(100) NOT NULL,
    pushed_ms BIGINT NOT NULL,
    validation JSON,
    lock_version INTEGER NOT NULL,
    PRIMARY KEY (digest),
    CONSTRAINT one_digest_per_version UNIQUE (model, version)
)
    """,
    """
CREATE TABLE certificates (
    serial VARCHAR(60) NOT NULL,
    device VARCHAR(63) NOT NULL,
    issued_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    revoked_ms BIGINT,
    PRIMARY KEY (serial)
)
    """,
    """
CREATE INDEX ix_certificates_device ON certificates (device)
    """,
    """
CREATE TABLE enrolment_tokens (
    sha256 VARCHAR(64) NOT NULL,
    device VARCHAR(63),
    serial_prefix VARCHAR(63),
    "group" VARCHAR(63) NOT NULL,
    tags JSON NOT NULL,
    uses_left INTEGER NOT NULL,
    created_by VARCHAR(100) NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    PRIMARY KEY (sha256)
)
    """,
    """
CREATE TABLE events (
    id {ID} NOT NULL,
    device VARCHAR(63) NOT NULL,
    received_ms BIGINT NOT NULL,
    at_ms BIGINT NOT NULL,
    name VARCHAR(60) NOT NULL,
    code VARCHAR(60) NOT NULL,
    data JSON NOT NULL,
    PRIMARY KEY (id)
)
    """,
    """
CREATE INDEX events_by_device ON events (device, id)
    """,
    """
CREATE INDEX events_by_name ON events (name, id)
    """,
    """
CREATE TABLE evidence (
    device VARCHAR(63) NOT NULL,
    model VARCHAR(63) NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    variant VARCHAR(63) NOT NULL,
    arm VARCHAR(10) NOT NULL,
    rollout VARCHAR(63) NOT NULL,
    stage INTEGER NOT NULL,
    windows BIGINT NOT NULL,
    ok BIGINT NOT NULL,
    invalid BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    shed BIGINT NOT NULL,
    rows BIGINT NOT NULL,
    latency {BYTES} NOT NULL,
    labelled BIGINT NOT NULL,
    wrong BIGINT NOT NULL,
    entered_epoch VARCHAR(32) NOT NULL,
    entered_seq BIGINT NOT NULL,
    pre_ok BIGINT NOT NULL,
    pre_failed BIGINT NOT NULL,
    pre_labelled BIGINT NOT NULL,
    pre_wrong BIGINT NOT NULL,
    first_ms BIGINT NOT NULL,
    last_ms BIGINT NOT NULL,
    PRIMARY KEY (device, model, bundle, variant, arm, rollout, stage)
)
    """,
    """
CREATE INDEX evidence_by_bundle ON evidence (bundle)
    """,
    """
CREATE INDEX evidence_by_rollout ON evidence (rollout, stage)
    """,
    """
CREATE TABLE groups (
    name VARCHAR(63) NOT NULL,
    generation BIGINT NOT NULL,
    settings JSON NOT NULL,
    published {BYTES},
    version INTEGER NOT NULL,
    created_ms BIGINT NOT NULL,
    PRIMARY KEY (name)
)
    """,
    """
CREATE TABLE ingest_counters (
    device VARCHAR(63) NOT NULL,
    name VARCHAR(60) NOT NULL,
    n BIGINT NOT NULL,
    PRIMARY KEY (device, name)
)
    """,
    """
CREATE TABLE ledger (
    device VARCHAR(63) NOT NULL,
    epoch VARCHAR(32) NOT NULL,
    seq BIGINT NOT NULL,
    low BIGINT NOT NULL,
    digest {BYTES} NOT NULL,
    kind VARCHAR(12) NOT NULL,
    PRIMARY KEY (device, epoch, seq)
)
{WITHOUT_ROWID}
    """,
    """
CREATE TABLE quarantine (
    id {ID} NOT NULL,
    device VARCHAR(63) NOT NULL,
    received_ms BIGINT NOT NULL,
    topic VARCHAR(200) NOT NULL,
    code VARCHAR(60) NOT NULL,
    detail TEXT NOT NULL,
    payload {BYTES} NOT NULL,
    size BIGINT NOT NULL,
    share FLOAT NOT NULL,
    PRIMARY KEY (id)
)
    """,
    """
CREATE INDEX ix_quarantine_device ON quarantine (device)
    """,
    """
CREATE TABLE roles (
    role VARCHAR(40) NOT NULL,
    version BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    bytes {BYTES} NOT NULL,
    PRIMARY KEY (role)
)
    """,
    """
CREATE TABLE samples (
    id {ID} NOT NULL,
    device VARCHAR(63) NOT NULL,
    received_ms BIGINT NOT NULL,
    model VARCHAR(63) NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    body {BYTES} NOT NULL,
    PRIMARY KEY (id)
)
    """,
    """
CREATE TABLE schema_version (
    version INTEGER NOT NULL,
    name VARCHAR(100) NOT NULL,
    applied_ms BIGINT NOT NULL,
    PRIMARY KEY (version)
)
    """,
    """
CREATE TABLE server_sessions (
    name VARCHAR(20) NOT NULL,
    birth BIGINT NOT NULL,
    PRIMARY KEY (name)
)
    """,
    """
CREATE TABLE streams (
    device VARCHAR(63) NOT NULL,
    epoch VARCHAR(32) NOT NULL,
    upto BIGINT NOT NULL,
    high BIGINT NOT NULL,
    first_ms BIGINT NOT NULL,
    last_ms BIGINT NOT NULL,
    records BIGINT NOT NULL,
    duplicates BIGINT NOT NULL,
    conflicts BIGINT NOT NULL,
    tombstoned BIGINT NOT NULL,
    PRIMARY KEY (device, epoch)
)
    """,
    """
CREATE TABLE windows (
    id {ID} NOT NULL,
    device VARCHAR(63) NOT NULL,
    epoch VARCHAR(32) NOT NULL,
    seq BIGINT NOT NULL,
    received_ms BIGINT NOT NULL,
    model VARCHAR(63) NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    variant VARCHAR(63) NOT NULL,
    arm VARCHAR(10) NOT NULL,
    rollout VARCHAR(63) NOT NULL,
    stage INTEGER NOT NULL,
    start_ms BIGINT NOT NULL,
    end_ms BIGINT NOT NULL,
    ok BIGINT NOT NULL,
    errors BIGINT NOT NULL,
    body {BYTES} NOT NULL,
    PRIMARY KEY (id)
)
    """,
    """
CREATE INDEX ix_windows_received_ms ON windows (received_ms)
    """,
    """
CREATE INDEX windows_by_device ON windows (device, received_ms)
    """,
    """
CREATE INDEX windows_by_model ON windows (model, bundle, received_ms)
    """,
    """
CREATE TABLE devices (
    id VARCHAR(63) NOT NULL,
    "group" VARCHAR(63) NOT NULL,
    tags JSON NOT NULL,
    membership_version INTEGER NOT NULL,
    status VARCHAR(20) NOT NULL,
    enrolled_ms BIGINT NOT NULL,
    public_key_sha256 VARCHAR(64) NOT NULL,
    public_key_pem TEXT NOT NULL,
    certificate_serial VARCHAR(60) NOT NULL,
    certificate_expires_ms BIGINT NOT NULL,
    online BOOLEAN NOT NULL,
    seen_ms BIGINT,
    birth BIGINT NOT NULL,
    stratum VARCHAR(200) NOT NULL,
    agent VARCHAR(40) NOT NULL,
    generation BIGINT NOT NULL,
    running JSON NOT NULL,
    state JSON NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY("group") REFERENCES groups (name)
)
    """,
    """
CREATE INDEX ix_devices_group ON devices ("group")
    """,
    """
CREATE TABLE group_models (
    "group" VARCHAR(63) NOT NULL,
    model VARCHAR(63) NOT NULL,
    stable VARCHAR(64) NOT NULL,
    fallback VARCHAR(64),
    version INTEGER NOT NULL,
    PRIMARY KEY ("group", model),
    FOREIGN KEY("group") REFERENCES groups (name)
)
    """,
    """
CREATE TABLE rollouts (
    id VARCHAR(63) NOT NULL,
    "group" VARCHAR(63) NOT NULL,
    model VARCHAR(63) NOT NULL,
    stable VARCHAR(64) NOT NULL,
    candidate VARCHAR(64) NOT NULL,
    salt VARCHAR(32) NOT NULL,
    "plan" JSON NOT NULL,
    state VARCHAR(20) NOT NULL,
    stage INTEGER NOT NULL,
    stage_since_ms BIGINT NOT NULL,
    cuts JSON NOT NULL,
    created_by VARCHAR(100) NOT NULL,
    created_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    reason TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY("group") REFERENCES groups (name)
)
    """,
    """
CREATE INDEX ix_rollouts_group ON rollouts ("group")
    """,
    """
CREATE TABLE decisions (
    id {ID} NOT NULL,
    rollout VARCHAR(63) NOT NULL,
    at_ms BIGINT NOT NULL,
    stage INTEGER NOT NULL,
    action VARCHAR(20) NOT NULL,
    verdict VARCHAR(20) NOT NULL,
    reason TEXT NOT NULL,
    evidence JSON NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(rollout) REFERENCES rollouts (id)
)
    """,
    """
CREATE INDEX ix_decisions_rollout ON decisions (rollout)
    """,
    """
CREATE TABLE pins (
    device VARCHAR(63) NOT NULL,
    model VARCHAR(63) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    set_by VARCHAR(100) NOT NULL,
    set_ms BIGINT NOT NULL,
    PRIMARY KEY (device, model),
    FOREIGN KEY(device) REFERENCES devices (id)
)
    """,
    """
CREATE TABLE rollout_devices (
    rollout VARCHAR(63) NOT NULL,
    stage INTEGER NOT NULL,
    device VARCHAR(63) NOT NULL,
    arm VARCHAR(10) NOT NULL,
    stratum VARCHAR(200) NOT NULL,
    PRIMARY KEY (rollout, stage, device),
    FOREIGN KEY(rollout) REFERENCES rollouts (id)
)
    """,
)
