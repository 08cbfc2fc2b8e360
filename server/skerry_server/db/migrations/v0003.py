"""Profiles, labels per device, drift. Frozen once shipped: a change to a table is a migration of its own."""

from __future__ import annotations

NAME = "profiles and drift"

STATEMENTS: tuple[str, ...] = (
    """
CREATE TABLE profiles (
    bundle VARCHAR(64) NOT NULL,
    variant VARCHAR(63) NOT NULL,
    bucket_ms BIGINT NOT NULL,
    model VARCHAR(63) NOT NULL,
    span_ms BIGINT NOT NULL,
    windows BIGINT NOT NULL,
    rows BIGINT NOT NULL,
    predicted BIGINT NOT NULL,
    estimated BIGINT NOT NULL,
    matched BIGINT NOT NULL,
    late BIGINT NOT NULL,
    unknown BIGINT NOT NULL,
    duplicate BIGINT NOT NULL,
    conflicting BIGINT NOT NULL,
    confusion {BYTES} NOT NULL,
    updated_ms BIGINT NOT NULL,
    body {BYTES} NOT NULL,
    PRIMARY KEY (bundle, variant, bucket_ms)
)
    """,
    """
CREATE INDEX profiles_by_bucket ON profiles (bundle, bucket_ms)
    """,
    """
CREATE INDEX profiles_by_update ON profiles (updated_ms)
    """,
    """
CREATE TABLE label_sums (
    bundle VARCHAR(64) NOT NULL,
    bucket_ms BIGINT NOT NULL,
    device VARCHAR(63) NOT NULL,
    labelled BIGINT NOT NULL,
    wrong BIGINT NOT NULL,
    PRIMARY KEY (bundle, bucket_ms, device)
)
    """,
    """
CREATE TABLE drift_evaluations (
    bundle VARCHAR(64) NOT NULL,
    model VARCHAR(63) NOT NULL,
    at_ms BIGINT NOT NULL,
    verdict VARCHAR(20) NOT NULL,
    reason TEXT NOT NULL,
    n BIGINT NOT NULL,
    from_ms BIGINT,
    to_ms BIGINT,
    spans INTEGER NOT NULL,
    subjects INTEGER NOT NULL,
    evaluation JSON NOT NULL,
    PRIMARY KEY (bundle)
)
    """,
    """
CREATE INDEX drift_evaluations_by_model ON drift_evaluations (model, bundle)
    """,
    """
CREATE TABLE drift_findings (
    id {ID} NOT NULL,
    model VARCHAR(63) NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    subject TEXT NOT NULL,
    since_ms BIGINT NOT NULL,
    opened_ms BIGINT NOT NULL,
    closed_ms BIGINT,
    closed_because TEXT NOT NULL,
    updated_ms BIGINT NOT NULL,
    numbers JSON NOT NULL,
    PRIMARY KEY (id)
)
    """,
    """
CREATE INDEX drift_findings_by_bundle ON drift_findings (bundle, closed_ms)
    """,
)
