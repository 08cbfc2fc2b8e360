"""One value of every format that leaves a process, with every field filled. Shipped values never change; see README.md."""

from __future__ import annotations

import msgspec
from skerry_contract import enrolment, group, manifest, opening, sealed, wire
from skerry_contract import histogram as h
from skerry_contract import window as w

NOW = w.Instant("00112233445566778899aabbccddeeff", 123_456_789_012, 1_700_000_000_000, True)
LATER = w.Instant("00112233445566778899aabbccddeeff", 423_456_789_012, 1_700_000_300_000, False)
KEY = w.Key(model="gas", bundle="ab" * 32, variant="onnx-int8", arm="candidate", rollout="r-20240101", stage=2)
EPOCH = "0123456789abcdef0123456789abcdef"

WINDOW = w.Window(
    key=KEY,
    start=NOW,
    end=LATER,
    counts=w.Counts(ok=9, invalid=1, failed=2, shed=3, rows=18, retries=1, cached=4, fallback=5),
    latency=w.Latency(
        total=h.exponential_of([0, 1, 2, 1_000, 100_000, 100_001, 2_000_000]),
        queue=h.exponential_of([0, 0, 5]),
        transform=h.rescale(h.exponential_of([10, 1_000]), 2),
        infer=h.exponential_of([90_000]),
    ),
    features={"s1": w.FeatureCounts((1, 2, 3), 4, 5, h.moments_of([-5, 0, 7, h.Q_LIMIT]))},
    outputs={"probabilities": w.OutputCounts((4, 5), h.moments_of([100, 200]), (1 << 20, 3 << 19))},
    slices={"night": w.SliceCounts(3, (1, 2))},
    labels=w.Labels(confusion=(3, 1, 0, 2), matched=6, late=1, unknown=2, duplicate=3, conflicting=4),
    resources={"rss_mb_max": 61, "rss_mb_n": 10, "rss_mb_sum": 600},
    merged=3,
)
EVENT = wire.Event(at=NOW, name="update", code="hash_mismatch", data={"model": "gas", "attempt": 2})
SAMPLE = wire.Sample(
    at=NOW, key=KEY, id="7f3a", why="random", inputs={"x": [1.5, -2.0]}, outputs={"probabilities": [0.25, 0.75]}
)
TOMBSTONE = wire.Tombstone(at=LATER, why="full", records=12, inferences=3400)
RECORDS = (
    wire.Record(seq=7, kind="window", body=wire.encode(WINDOW), replaces=((1, 2), (4, 6))),
    wire.Record(seq=8, kind="event", body=wire.encode(EVENT)),
    wire.Record(seq=9, kind="sample", body=wire.encode(SAMPLE)),
    wire.Record(seq=12, kind="tombstone", body=wire.encode(TOMBSTONE), replaces=((10, 11),)),
)
BATCH = wire.Batch(epoch=EPOCH, records=RECORDS)
STATE = wire.State(
    status="online",
    birth=5,
    agent="0.1.0",
    group="site",
    generation=3,
    boot_id="00112233445566778899aabbccddeeff",
    epoch=EPOCH,
    seq=12,
    stratum="x86_64/onnx-int8",
    arch="x86_64",
    abilities=("canary", "pins"),
    runtimes={"onnx": "1.32.0"},
    tuf={"root": 1, "timestamp": 7},
    running={"gas": wire.Running(digest="ab" * 32, version="1.1.0", variant="onnx-int8", state="trial")},
    update=wire.Update(
        model="gas", digest="ab" * 32, state="trial", since=NOW, code="golden_failed", detail="case 3", attempt=1
    ),
    lost={"ring": 2},
)
STATE_LATER = msgspec.structs.replace(STATE, at=LATER)
STATE_FETCHING = msgspec.structs.replace(STATE_LATER, progress=wire.Progress(done=123_456, size=7_890_123))
WILL = wire.State(status="offline", birth=5)
ACK = wire.Ack(epoch=EPOCH, upto=9, extra_ranges=((11, 12),), server_time=1_700_000_000.25, conflict=(10,))
BELL = wire.Bell(version=42)
SERVER_STATE = wire.ServerState(status="online", birth=3)

OLD = group.Target(digest="ab" * 32, version="1.0.0")
NEW = group.Target(digest="cd" * 32, version="1.1.0-rc.1")
GROUP = group.GroupDocument(
    schema=1,
    group="site",
    generation=3,
    requires=("canary", "pins"),
    models={
        "gas": group.ModelPlan(
            stable=OLD,
            fallback=group.Target(digest="ef" * 32, version="0.9.0"),
            rollout=group.Rollout(
                id="r-20240101",
                stage=2,
                candidate=NEW,
                salt="000102030405060708090a0b0c0d0e0f",
                cuts={"*": "9223372036854775808", "rpi4/onnx-int8": "18446744073709551616"},
                mode="shadow",
                selector={"tags": {"floor": "2"}},
                windows=({"days": "mon-fri", "from": "22:00", "to": "04:00"},),
                opens_at=1_700_000_000,
                layer="layer-1",
            ),
        )
    },
    pins={"00" * 16: {"gas": OLD}},
    settings=group.Settings(
        window_s=60.0, sample_rate=0.01, sync_s=120.0, jitter_s=5.0, max_kib_s=256, networks=("wifi",), trial_s=30.0,
        trial_inferences=50,
    ),
)  # fmt: skip

MODEL = manifest.File(path="model.onnx", sha256="12" * 32, size=12_345)
CASES = manifest.File(path="golden/cases.jsonl", sha256="34" * 32, size=678)
MANIFEST = manifest.Manifest(
    schema=1,
    model="gas",
    version="1.1.0-rc.1",
    created="2024-01-01T00:00:00Z",
    owner=manifest.Owner(name="Sensors", contact="sensors@example.org"),
    licence="CC-BY-4.0",
    card="Which gas is it?",
    variants=(
        manifest.Variant(
            id="onnx-int8",
            runtime="onnx",
            min="1.17",
            arch=("aarch64", "x86_64"),
            precision="int8",
            model="model.onnx",
            files=(MODEL, CASES),
            golden=manifest.Golden(cases="golden/cases.jsonl", tolerance={"FP32": 0.02}, minimum_recall={"ethanol": 0.9}),
            needs=manifest.Needs(rss_mb=60, disk_mb=1),
        ),
    ),
    inputs=(manifest.Tensor(name="x", datatype="FP32", shape=(-1, 2)),),
    outputs=(manifest.Tensor(name="probabilities", datatype="FP32", shape=(-1, 2), labels=("ethanol", "ammonia")),),
    features=(
        manifest.Feature(
            name="s1", input="x", column=1, unit="kOhm", range=(-10.0, 10.5), nullable=True, pii=True, ttl_s=30.0,
            edges=(0.0, 1.5), centre=0.5, scale=2.0,
        ),
    ),
    slices=(manifest.Slice(name="high", feature="s1", low=1.5, high=10.0),),
    transforms=manifest.Transforms(
        pre=(manifest.Transform(op="scale", input="x", output="x0", params={"mean": [0.5, 0.25], "scale": [1.0, 2.0]}),),
        post=(manifest.Transform(op="softmax", input="logits", output="probabilities"),),
    ),
    reference=manifest.Reference(
        n=100,
        features={"s1": manifest.ReferenceColumn(counts=(20, 30, 50), null=1, moments=(99, -12, 3456))},
        outputs={"probabilities": manifest.ReferenceColumn(counts=(40, 60), moments=(100, 1, 2))},
        calibration={"method": "isotonic", "x": [0.0, 1.0], "y": [0.1, 0.95]},
        validated_error={"ethanol": 0.05, "ammonia": 0.1},
        accuracy=0.925,
    ),
    slo=manifest.Slo(latency_p95_ms=5.0, success=0.999, accuracy_drop=0.05, business_metric="leaks found"),
    provenance=manifest.Provenance(
        commit="0" * 40, trainer="scikit-learn 1.9", datasets={"gas": "56" * 32}, parent="78" * 32, metrics={"f1": 0.9}
    ),
    min_agent="0.1.0",
    requires=("canary",),
)  # fmt: skip
FLOORS = {"gas": "1.0.0", "pump": "2.1.0-rc.3"}
FORCED_FLOORS = ({"gas": "2.0.0", "pump": "2.1.0-rc.3"}, {"gas": "1.2.0"})
TOKEN = enrolment.Enrolment(
    server_url="https://fleet.example.org:8443", token="k3y-Of_the.server", ca_sha256="9a" * 32, root_sha256="bc" * 32
)

LATER_MANIFEST = msgspec.structs.replace(
    MANIFEST,
    features=(
        msgspec.structs.replace(
            MANIFEST.features[0], on_null="impute", on_outside="fallback", on_stale="reject", impute=0.75
        ),
    ),
    requires=("guards", "states"),
    isolate=True,
    fallback="gas-spare",
    streams=manifest.Streams(
        states=(manifest.StateTensor(input="h", output="hn", datatype="FP32", shape=(2, 1, 128)),), most=4, idle_s=5.0
    ),
    explanations=manifest.Explanations(share=0.01, audit=("ammonia",), medians={"s1": 0.5}),
)
LATER_STREAMS = msgspec.structs.replace(
    LATER_MANIFEST, streams=manifest.Streams(internal=True), requires=("guards", "states")
)
ENCRYPTED_MANIFEST = msgspec.structs.replace(
    MANIFEST,
    version="1.2.0",
    variants=(
        msgspec.structs.replace(
            MANIFEST.variants[0],
            files=tuple(
                msgspec.structs.replace(
                    file,
                    sha256=stored,
                    size=sealed.sealed_size(file.size),
                    plain=manifest.Plain(sha256=file.sha256, size=file.size),
                )
                for file, stored in ((MODEL, "f1" * 32), (CASES, "f2" * 32))
            ),
        ),
    ),
    requires=("after", "encrypted"),
    after="1.0.0",
    encryption=manifest.Encryption(scheme=sealed.SCHEME, key_id="f3" * 32),
)
LATER_WINDOW = msgspec.structs.replace(
    WINDOW,
    tallies={"null.imputed": 3, "load.cold": 1, "cold_ms_max": 120},
    freshness=h.exponential_of([0, 250, 31_000]),
    attributions={"s1": h.moments_of([12, 4096])},
    shadows={
        "9a" * 32: w.Shadow(
            pairs=9,
            dropped={"busy": 2},
            agreed=8,
            distance=h.exponential_of([0, 1_500]),
            slower=h.exponential_of([20_000]),
            faster=h.exponential_of([7]),
            labelled=(3, 1, 0, 1),
        )
    },
    distinct=h.distinct_of([1, 1 << 60, 12345 << 8]),
)
LATER_LABELS = msgspec.structs.replace(
    WINDOW,
    labels=msgspec.structs.replace(WINDOW.labels, lags={1: h.exponential_of([0, 7, 86_400])}),
)
LATER_GROUP = msgspec.structs.replace(
    GROUP,
    models={
        name: msgspec.structs.replace(plan, shadow=group.Target(digest="ef" * 32, version="0.9.0"))
        for name, plan in GROUP.models.items()
    },
    settings=msgspec.structs.replace(GROUP.settings, shadow_share=0.5, shadow_cpu=0.125, shadow_c=70.0),
)
AFTER_MANIFEST = msgspec.structs.replace(LATER_MANIFEST, after="1.0.0", requires=("after", "guards", "states"))
WINDOWS_GROUP = msgspec.structs.replace(
    LATER_GROUP,
    requires=("canary", "pins", "windows"),
    models={"gas": msgspec.structs.replace(LATER_GROUP.models["gas"], via=(OLD,))},
    settings=msgspec.structs.replace(
        LATER_GROUP.settings, windows=(opening.Window(days=("fri", "sat"), start="22:00", end="04:00"),)
    ),
)
RULES_GROUP = msgspec.structs.replace(
    LATER_GROUP,
    requires=("canary", "networks", "opens_at", "pins", "windows"),
    models={"gas": msgspec.structs.replace(LATER_GROUP.models["gas"], via=(OLD,))},
    settings=msgspec.structs.replace(
        LATER_GROUP.settings,
        windows=(opening.Window(days=("fri", "sat"), start="22:00", end="04:00"),),
        opens_at=1_700_000_000,
    ),
)
HOURS_GROUP = msgspec.structs.replace(
    RULES_GROUP,
    requires=("canary", "fetch_windows", "networks", "opens_at", "pins", "windows"),
    settings=msgspec.structs.replace(
        RULES_GROUP.settings, fetch_windows=(opening.Window(days=("mon",), start="18:00", end="08:00"),)
    ),
)

CONTENT_KEYS = (bytes(range(32)), bytes(range(200, 232)))
"""Of a base and of a target."""
SEALED = b"what is in an encrypted file, or in a delta"
