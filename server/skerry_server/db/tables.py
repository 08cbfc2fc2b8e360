"""The tables of the server's database at the newest schema version.

SQLAlchemy Core only. Times are whole milliseconds since 1970 (``*_ms``) of the server's clock unless named otherwise; JSON
columns hold builtins. ``migrations/`` brings an older database here; a test compares what the migrations make with this file.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()

# SQLite gives automatic row ids to INTEGER keys only; PostgreSQL wants 64 bits.
_Id = BigInteger().with_variant(Integer, "sqlite")

schema_version = Table(
    "schema_version",
    metadata,
    Column("version", Integer, primary_key=True),
    Column("name", String(100), nullable=False),
    Column("applied_ms", BigInteger, nullable=False),
)

# --- who may do what ------------------------------------------------------------------------------------------------

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("role", String(20), nullable=False),  # viewer, engineer, approver, operator, auditor, admin
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
    Column("used_ms", BigInteger),
)

audit = Table(
    "audit",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(100), nullable=False),  # token name, device:<id>, system:<part>
    Column("action", String(60), nullable=False),  # e.g. rollout.start
    Column("subject", String(200), nullable=False),  # e.g. rollout:r-12
    Column("before", JSON),
    Column("after", JSON),
    Column("reason", Text, nullable=False, default=""),
    # sha256 over the previous row's chain and this row: a removed or changed row shows.
    Column("chain", String(64), nullable=False),
    Index("audit_by_subject", "subject", "id"),
)

# --- devices --------------------------------------------------------------------------------------------------------

groups = Table(
    "groups",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("generation", BigInteger, nullable=False, default=0),  # of the last published document
    Column("settings", JSON, nullable=False, default=dict),
    Column("published", LargeBinary),  # bytes of the last published document
    Column("version", Integer, nullable=False, default=1),  # of the settings; callers may name the one they read
    Column("created_ms", BigInteger, nullable=False),
)

group_models = Table(
    "group_models",
    metadata,
    Column("group", String(63), ForeignKey("groups.name"), primary_key=True),
    Column("model", String(63), primary_key=True),
    Column("stable", String(64), nullable=False),  # bundle digest
    Column("fallback", String(64)),
    Column("version", Integer, nullable=False, default=1),
    Column("shadow", String(64)),
)

devices = Table(
    "devices",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("group", String(63), ForeignKey("groups.name"), nullable=False, index=True),
    Column("tags", JSON, nullable=False, default=dict),
    Column("membership_version", Integer, nullable=False, default=1),  # of group, tags and pins
    Column("status", String(20), nullable=False),  # enrolled, revoked
    Column("enrolled_ms", BigInteger, nullable=False),
    Column("public_key_sha256", String(64), nullable=False),
    Column("public_key_pem", Text, nullable=False),
    Column("certificate_serial", String(60), nullable=False),
    Column("certificate_expires_ms", BigInteger, nullable=False),
    # From the retained state topic; liveness is by the server's receive time.
    Column("online", Boolean, nullable=False, default=False),
    Column("seen_ms", BigInteger),
    Column("birth", BigInteger, nullable=False, default=0),
    Column("stratum", String(200), nullable=False, default=""),
    Column("agent", String(40), nullable=False, default=""),
    Column("generation", BigInteger, nullable=False, default=0),
    Column("running", JSON, nullable=False, default=dict),  # model -> {digest, version, variant, state}
    Column("state", JSON, nullable=False, default=dict),  # the last state as builtins
    Column("gone_ms", BigInteger),  # when it last went from online to offline
    Column("certificate_names_key", Boolean, nullable=False, server_default=text("FALSE")),
)

pins = Table(
    "pins",
    metadata,
    Column("device", String(63), ForeignKey("devices.id"), primary_key=True),
    Column("model", String(63), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("set_by", String(100), nullable=False),
    Column("set_ms", BigInteger, nullable=False),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("device", String(63)),  # one of device, serial_prefix
    Column("serial_prefix", String(63)),
    Column("group", String(63), nullable=False),
    Column("tags", JSON, nullable=False, default=dict),
    Column("uses_left", Integer, nullable=False, default=1),
    Column("created_by", String(100), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(60), primary_key=True),
    Column("device", String(63), nullable=False, index=True),
    Column("issued_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("revoked_ms", BigInteger),
)

bells = Table(
    "bells",
    metadata,
    Column("target", String(70), primary_key=True),  # d/<device> or g/<group>
    Column("version", BigInteger, nullable=False),
    Column("rung_version", BigInteger, nullable=False, default=0),  # published to the broker
)

server_sessions = Table(
    "server_sessions",
    metadata,
    # How often this server has connected to its broker: the birth number of ``server/state``.
    Column("name", String(20), primary_key=True),
    Column("birth", BigInteger, nullable=False),
    # When that session began: devices say again that they are there, so who was not heard of since is not known to be.
    Column("since_ms", BigInteger, nullable=False, server_default=text("0")),
)

# --- bundles and the repository --------------------------------------------------------------------------------------

bundles = Table(
    "bundles",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("model", String(63), nullable=False),
    Column("version", String(128), nullable=False),
    Column("state", String(20), nullable=False),  # draft, validated, approved, deprecated, retired, rejected
    Column("reason", Text, nullable=False, default=""),
    Column("manifest", LargeBinary, nullable=False),
    Column("signature", LargeBinary),
    Column("submitter", String(100), nullable=False),
    Column("pushed_ms", BigInteger, nullable=False),
    Column("validation", JSON),  # what the child measured and found
    Column("lock_version", Integer, nullable=False, default=1),
    UniqueConstraint("model", "version", name="one_digest_per_version"),
)

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("stored_ms", BigInteger, nullable=False),
)

deltas = Table(
    "deltas",
    metadata,
    # What is known of each delta that devices could use. The files of the ready ones lie in the repository.
    Column("base", String(64), primary_key=True),  # sha256 of the file that it leads from
    Column("target", String(64), primary_key=True),  # and of the one that it leads to
    Column("state", String(20), nullable=False),  # waiting making ready useless failed
    Column("model", String(63), nullable=False),
    Column("path", String(200), nullable=False),
    Column("base_version", String(128), nullable=False),
    Column("target_version", String(128), nullable=False),
    Column("base_size", BigInteger, nullable=False),
    Column("target_size", BigInteger, nullable=False),
    Column("devices", BigInteger, nullable=False),  # that would take it, when it was last wanted
    Column("size", BigInteger),  # of the delta, of one that was not kept too
    Column("took_s", Float),
    Column("detail", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("maker", String(40), nullable=False),  # version of the program that tried last
    Column("changed_ms", BigInteger, nullable=False),
    Column("wanted_ms", BigInteger, nullable=False),
    Column("sha256", String(64)),  # of its file, when it was made
)

roles = Table(
    "roles",
    metadata,
    Column("role", String(40), primary_key=True),  # TUF roles: the versions last published
    Column("version", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("bytes", LargeBinary, nullable=False),
)

content_keys = Table(
    "content_keys",
    metadata,
    Column("digest", String(64), primary_key=True),  # of the bundle
    Column("box", LargeBinary, nullable=False),  # sealed with the release key, which is not in the database
    Column("set_by", String(100), nullable=False),
    Column("set_ms", BigInteger, nullable=False),
)

encryption_keys = Table(
    "encryption_keys",
    metadata,
    # Devices' keys that content keys are wrapped for: the first that a device names stays.
    Column("device", String(63), primary_key=True),
    Column("point", LargeBinary, nullable=False),  # of P-256, uncompressed
    Column("sha256", String(64), nullable=False),  # of the point
    Column("set_ms", BigInteger, nullable=False),
)

key_releases = Table(
    "key_releases",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("device", String(63), primary_key=True),
    Column("encryption_key", String(64), nullable=False),  # sha256 of the one it was last wrapped for
    Column("times", Integer, nullable=False),
    Column("first_ms", BigInteger, nullable=False),
    Column("last_ms", BigInteger, nullable=False),
)

proposals = Table(
    "proposals",
    metadata,
    # Next catalogs that lack signatures. Whether one is void or past its time is seen when it is read.
    Column("id", String(16), primary_key=True),  # of what is signed
    Column("version", BigInteger, nullable=False),  # of the catalog
    Column("metadata", LargeBinary, nullable=False),  # with the signatures that hold
    Column("floors", LargeBinary, nullable=False),
    Column("targets", LargeBinary),  # that come with it in one snapshot
    Column("root", LargeBinary),
    Column("state", String(20), nullable=False),  # open, published, withdrawn
    Column("reason", Text, nullable=False, default=""),
    Column("proposed_by", String(100), nullable=False),
    Column("proposed_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger),
)

ahead = Table(
    "ahead",
    metadata,
    # What a device says it holds of a role beyond what this server serves: a repository that a backup took back.
    Column("role", String(40), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("device", String(63), nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)

# --- rollouts --------------------------------------------------------------------------------------------------------

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("group", String(63), ForeignKey("groups.name"), nullable=False, index=True),
    Column("model", String(63), nullable=False),
    Column("stable", String(64), nullable=False),
    Column("candidate", String(64), nullable=False),
    Column("salt", String(32), nullable=False),
    Column("plan", JSON, nullable=False),  # stages, gates, windows as core.rollout.Plan
    Column(
        "state", String(20), nullable=False
    ),  # draft running paused completing completed rolling_back rolled_back aborted
    Column("stage", Integer, nullable=False, default=0),
    Column("stage_since_ms", BigInteger, nullable=False),  # the stage began or was resumed
    Column("cuts", JSON, nullable=False, default=dict),  # stratum -> decimal string, of the stage now running
    Column("created_by", String(100), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger),
    Column("reason", Text, nullable=False, default=""),
    Column("version", Integer, nullable=False, default=1),
    Column("entered_ms", BigInteger, nullable=False, server_default=text("0")),  # the stage began; no resume changes it
)

decisions = Table(
    "decisions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("rollout", String(63), ForeignKey("rollouts.id"), nullable=False, index=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("stage", Integer, nullable=False),
    Column("action", String(20), nullable=False),  # start advance hold pause resume complete abort roll_back
    Column("verdict", String(20), nullable=False),  # PASS FAIL INCONCLUSIVE NO_DATA or empty for a person's command
    Column("reason", Text, nullable=False),
    Column("evidence", JSON, nullable=False),
)

rollout_devices = Table(
    "rollout_devices",
    metadata,
    # The eligible devices frozen at stage start, for the judge.
    Column("rollout", String(63), ForeignKey("rollouts.id"), primary_key=True),
    Column("stage", Integer, primary_key=True),
    Column("device", String(63), primary_key=True),
    Column("arm", String(10), nullable=False),
    Column("stratum", String(200), nullable=False),
    Column("online", Boolean, nullable=False, default=True, server_default=text("TRUE")),  # at that moment
)

rollout_reports = Table(
    "rollout_reports",
    metadata,
    # What a device said of the rollout under way: kept when its events are taken, so that no look reads them.
    Column("rollout", String(63), ForeignKey("rollouts.id"), primary_key=True),
    Column("device", String(63), primary_key=True),
    Column("went_back", String(60), nullable=False),  # code with which it last went back or refused; "" for none
    Column("unable", String(60), nullable=False),  # code with which it last said that it cannot run the candidate
    Column("crashed_ms", BigInteger, nullable=False),  # a worker with the model last crashed or hung; 0 for never
)

looks = Table(
    "looks",
    metadata,
    # What the judge read, what it said, what it kept: enough to say the same again.
    Column("rollout", String(63), ForeignKey("rollouts.id"), primary_key=True),
    Column("stage", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("information", Float, nullable=False),
    Column("evidence", LargeBinary, nullable=False),  # zlib of MessagePack of core.judge.Look
    Column("ruling", JSON, nullable=False),
    Column("memory", LargeBinary, nullable=False),  # zlib of MessagePack of core.judge.Memory
)

# --- telemetry -------------------------------------------------------------------------------------------------------

streams = Table(
    "streams",
    metadata,
    # One outbox life of one device. Everything up to and including upto is committed, tombstoned or quarantined.
    Column("device", String(63), primary_key=True),
    Column("epoch", String(32), primary_key=True),
    Column("upto", BigInteger, nullable=False, default=0),
    Column("high", BigInteger, nullable=False, default=0),  # greatest seq in the ledger: above it all is new
    Column("first_ms", BigInteger, nullable=False),
    Column("last_ms", BigInteger, nullable=False),
    Column("records", BigInteger, nullable=False, default=0),
    Column("duplicates", BigInteger, nullable=False, default=0),
    Column("conflicts", BigInteger, nullable=False, default=0),
    Column("tombstoned", BigInteger, nullable=False, default=0),
)

ledger = Table(
    "ledger",
    metadata,
    # Each (device, epoch, seq) once, with the digest of what was taken. A row covers low..seq: one record has low = seq; what
    # a merged record or a tombstone replaced is one row per range, however long, with that record's digest. No two overlap.
    Column("device", String(63), primary_key=True),
    Column("epoch", String(32), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("low", BigInteger, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("kind", String(12), nullable=False),  # window event sample tombstone, replaced tombstoned quarantined
    sqlite_with_rowid=False,
)

windows = Table(
    "windows",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device", String(63), nullable=False),
    Column("epoch", String(32), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("received_ms", BigInteger, nullable=False, index=True),
    Column("model", String(63), nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("variant", String(63), nullable=False),
    Column("arm", String(10), nullable=False),
    Column("rollout", String(63), nullable=False),
    Column("stage", Integer, nullable=False),
    Column(
        "start_ms", BigInteger, nullable=False
    ),  # on the server's clock, as ``anchors`` places it; the body has the device's
    Column("end_ms", BigInteger, nullable=False),
    Column("ok", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),  # failed
    Column("body", LargeBinary, nullable=False),
    Column(
        "timed", String(8), nullable=False, server_default="device"
    ),  # how the end is known: device boot heard received
    Index("windows_by_model", "model", "bundle", "received_ms"),
    Index("windows_by_device", "device", "received_ms"),
)

boots = Table(
    "boots",
    metadata,
    # What to add to milliseconds since a boot of a device.
    Column("device", String(63), primary_key=True),
    Column("boot_id", String(32), primary_key=True),
    Column("synced_ms", BigInteger),  # by its own synchronised clock
    Column("heard_ms", BigInteger),  # by when it was heard
    Column("last_ms", BigInteger, nullable=False),
)

evidence = Table(
    "evidence",
    metadata,
    # Sums per device and key, kept as records arrive. With rollout = '' and stage = 0 they are the pre-period.
    Column("device", String(63), primary_key=True),
    Column("model", String(63), primary_key=True),
    Column("bundle", String(64), primary_key=True),
    Column("variant", String(63), primary_key=True),
    Column("arm", String(10), primary_key=True),
    Column("rollout", String(63), primary_key=True),
    Column("stage", Integer, primary_key=True),
    Column("windows", BigInteger, nullable=False),
    Column("ok", BigInteger, nullable=False),
    Column("invalid", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("shed", BigInteger, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("latency", LargeBinary, nullable=False),  # MessagePack of Exponential, total
    Column("labelled", BigInteger, nullable=False, default=0),
    Column("wrong", BigInteger, nullable=False, default=0),
    # What this device had counted of the rollout's stable bundle before it entered this (rollout, stage): the judge's
    # pre-period. The entry is the lowest position (epoch, seq) seen under the key; records before it that come late count.
    Column("entered_epoch", String(32), nullable=False, default=""),
    Column("entered_seq", BigInteger, nullable=False, default=0),
    Column("pre_ok", BigInteger, nullable=False, default=0),
    Column("pre_failed", BigInteger, nullable=False, default=0),
    Column("pre_labelled", BigInteger, nullable=False, default=0),
    Column("pre_wrong", BigInteger, nullable=False, default=0),
    Column("first_ms", BigInteger, nullable=False),
    Column("last_ms", BigInteger, nullable=False),
    # Boot and CLOCK_BOOTTIME of the entry, and what was counted within the rollout's guard after it: MessagePack, see evidence.
    Column("entered_boot", String(32), nullable=False, default="", server_default=text("''")),
    Column("entered_ns", BigInteger, nullable=False, default=0, server_default=text("0")),
    Column("early", LargeBinary),
    Index("evidence_by_rollout", "rollout", "stage"),
    Index("evidence_by_bundle", "bundle"),
)

profiles = Table(
    "profiles",
    metadata,
    # Merged windows of one bundle and variant per bucket of time, kept as records arrive. The bucket is the device's wall clock
    # where it is synchronised, else the time of receipt.
    Column("bundle", String(64), primary_key=True),
    Column("variant", String(63), primary_key=True),
    Column("bucket_ms", BigInteger, primary_key=True),
    Column("model", String(63), nullable=False),
    Column("span_ms", BigInteger, nullable=False),
    Column("windows", BigInteger, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("predicted", BigInteger, nullable=False),  # rows whose calibrated confidence is in estimated
    Column("estimated", BigInteger, nullable=False),  # CBPE: sum of round(p * 2**20)
    Column("matched", BigInteger, nullable=False),
    Column("late", BigInteger, nullable=False),
    Column("unknown", BigInteger, nullable=False),
    Column("duplicate", BigInteger, nullable=False),
    Column("conflicting", BigInteger, nullable=False),
    Column("confusion", LargeBinary, nullable=False),  # MessagePack list, [true][predicted]; empty without labels
    Column("updated_ms", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),  # features and outputs as profiles.encode writes them
    Column("lags", LargeBinary),  # MessagePack, true class -> histogram of seconds; none without any
    Index("profiles_by_bucket", "bundle", "bucket_ms"),
    Index("profiles_by_update", "updated_ms"),
)

explanations = Table(
    "explanations",
    metadata,
    # What was explained of one bundle and variant per bucket of its profiles; only of buckets in which something was.
    Column("bundle", String(64), primary_key=True),
    Column("variant", String(63), primary_key=True),
    Column("bucket_ms", BigInteger, primary_key=True),
    Column("chosen", BigInteger, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("dropped", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),  # by feature, as attributions.encode writes it
)

shadows = Table(
    "shadows",
    metadata,
    # What a device paired of a bundle that answered and a candidate in its shadow, kept as records arrive.
    Column("device", String(63), primary_key=True),
    Column("bundle", String(64), primary_key=True),
    Column("candidate", String(64), primary_key=True),
    Column("model", String(63), nullable=False),
    Column("pairs", BigInteger, nullable=False),
    Column("agreed", BigInteger, nullable=False),
    Column("first_ms", BigInteger, nullable=False),
    Column("last_ms", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),  # MessagePack of the contract's Shadow
    Index("shadows_by_model", "model", "candidate", "bundle", "device"),
)

label_sums = Table(
    "label_sums",
    metadata,
    # Late labels per device and bucket: intervals must know which labels come from one device.
    Column("bundle", String(64), primary_key=True),
    Column("bucket_ms", BigInteger, primary_key=True),
    Column("device", String(63), primary_key=True),
    Column("labelled", BigInteger, nullable=False),
    Column("wrong", BigInteger, nullable=False),
)

drift_evaluations = Table(
    "drift_evaluations",
    metadata,
    # The last look at each bundle, with every number it rests on.
    Column("bundle", String(64), primary_key=True),
    Column("model", String(63), nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("verdict", String(20), nullable=False),  # DRIFT STEADY NO_DATA
    Column("reason", Text, nullable=False),
    Column("n", BigInteger, nullable=False),
    Column("from_ms", BigInteger),
    Column("to_ms", BigInteger),
    Column("spans", Integer, nullable=False),
    Column("subjects", Integer, nullable=False),
    Column("evaluation", JSON, nullable=False),  # last: lists do without it
    Index("drift_evaluations_by_model", "model", "bundle"),
)

drift_findings = Table(
    "drift_findings",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("model", String(63), nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("subject", Text, nullable=False),  # feature:<name> or output:<name>
    Column("since_ms", BigInteger, nullable=False),  # start of the first span that had drifted
    Column("opened_ms", BigInteger, nullable=False),
    Column("closed_ms", BigInteger),
    Column("closed_because", Text, nullable=False, default=""),
    Column("updated_ms", BigInteger, nullable=False),
    Column("numbers", JSON, nullable=False),
    Index("drift_findings_by_bundle", "bundle", "closed_ms"),
)

events = Table(
    "events",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device", String(63), nullable=False),
    Column("received_ms", BigInteger, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("name", String(60), nullable=False),
    Column("code", String(60), nullable=False),
    Column("data", JSON, nullable=False),
    Index("events_by_device", "device", "id"),
    Index("events_by_name", "name", "id"),
)

samples = Table(
    "samples",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device", String(63), nullable=False),
    Column("received_ms", BigInteger, nullable=False),
    Column("model", String(63), nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("body", LargeBinary, nullable=False),
)

log_requests = Table(
    "log_requests",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device", String(63), nullable=False),
    Column("asked_by", String(100), nullable=False),
    Column("asked_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger),  # null: the device has not answered
    Column("fault", String(60), nullable=False, default=""),  # why its answer was not taken
    Column("size", BigInteger, nullable=False, default=0),  # bytes of the lines
    Column("body", LargeBinary),  # the lines, gzip
    Index("log_requests_by_device", "device", "id"),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device", String(63), nullable=False, index=True),
    Column("received_ms", BigInteger, nullable=False),
    Column("topic", String(200), nullable=False),
    Column("code", String(60), nullable=False),
    Column("detail", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),  # at most 64 KiB are kept
    Column("size", BigInteger, nullable=False),
    Column("share", Float, nullable=False, default=1.0),  # of the messages of this kind that were kept
)

ingest_counters = Table(
    "ingest_counters",
    metadata,
    Column("device", String(63), primary_key=True),
    Column("name", String(60), primary_key=True),  # malformed, oversized, foreign, conflict, ...
    Column("n", BigInteger, nullable=False),
)
