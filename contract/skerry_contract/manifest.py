"""The bundle manifest: one model, for one or more runtimes, with what it needs to prove itself.

A bundle is a folder with ``manifest.json`` and the files it lists. Its identity is the sha256 of the canonical manifest,
which in turn names every file by sha256: who trusts the digest trusts the bundle. Beside the manifest may lie
``model.sig``, an OpenSSF Model Signing signature, which is not part of the identity.

Parsing takes bytes and decides; it opens no file. Unknown fields are kept in the bytes, and so in the identity.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import msgspec

from skerry_contract import canonical, ids, layout, sealed
from skerry_contract.errors import Malformed, UnsupportedVersion, misfit_in
from skerry_contract.reading import ready

SCHEMA = 1
MAX_BYTES = 1 << 20
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "model.sig"
MOST_STREAMS = 4096
MOST_STATE_ELEMENTS = 1 << 20

Runtime = Literal["onnx", "tflite"]
GuardPolicy = Literal["", "count", "reject", "impute", "fallback"]
ABILITIES: frozenset[str] = frozenset({"guards", "states", "after", "encrypted"})
"""What a manifest may ask for that an agent of the first release lacks: who uses one names it in ``requires``."""
Precision = Literal["int8", "fp16", "fp32", "mixed"]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]
DATATYPES: tuple[str, ...] = get_args(Datatype)


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Owner(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """Who answers for the model."""

    name: str
    contact: str


class Plain(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What an encrypted file is once it is opened; ``size`` in bytes."""

    sha256: str
    size: int


class File(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """A file of the bundle. ``path`` is relative to its folder.

    Attributes:
        sha256, size: of what is stored, sent and kept at rest: of an encrypted bundle the ciphertext. Bytes.
        plain: of an encrypted bundle, the file itself.
    """

    path: str
    sha256: str
    size: int
    plain: Plain | None = None

    @property
    def content(self) -> Plain:
        """What the model's runtime reads."""
        return self.plain or Plain(sha256=self.sha256, size=self.size)


class Golden(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """How a variant proves itself on the device that will run it.

    Attributes:
        cases: path of a JSON-lines file in the bundle. Each line is one case in the shapes of the Open Inference Protocol:
            ``{"inputs": [{name, shape, datatype, data}], "outputs": [...], "label": "..."?}``. Inputs are raw, before transforms.
        tolerance: greatest absolute difference per datatype, e.g. ``{"FP32": 0.02}``; a datatype not named must be equal.
        minimum_recall: per class label, the least share of labelled cases that must be predicted right.
    """

    cases: str
    tolerance: dict[str, float] = {}
    minimum_recall: dict[str, float] = {}


class Needs(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What a variant needs of a device, in MB (1e6 bytes)."""

    rss_mb: int
    disk_mb: int


class Variant(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """The same model for one runtime and a set of architectures.

    Attributes:
        id: name within the bundle, e.g. ``onnx-int8``.
        runtime: ``onnx`` or ``tflite``.
        min: lowest runtime version that may run it, e.g. ``1.17``; empty for any.
        arch: machine names as ``uname -m`` gives them; empty for any.
        precision: what the graph is; ``int8`` is checked at validation.
        model: path of the model file, one of ``files``.
        files: all files the variant needs, golden cases included.
    """

    id: str
    runtime: Runtime
    min: str = ""
    arch: tuple[str, ...] = ()
    precision: Precision = "fp32"
    model: str
    files: tuple[File, ...]
    golden: Golden
    needs: Needs


class Tensor(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """An input or output as the application sees it: raw, before transforms in, after transforms out.

    Attributes:
        shape: -1 for a dimension that varies; the first is the batch.
        labels: for a classifier's probability output, the class of each column.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()


class Feature(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One watched column of an input.

    Attributes:
        input: name of the input tensor; column: index in its last axis.
        range: smallest and largest plausible value, or None.
        nullable: whether NaN is allowed.
        pii: values never leave the device, samples drop them.
        ttl_s: age after which a value is stale, seconds; 0 for never.
        edges: inner bin edges, ascending; ``len + 1`` bins.
        centre, scale: for the quantized moments; scale > 0.
        on_null, on_outside, on_stale: what a NaN, a value outside ``range``, one older than ``ttl_s`` does to its request.
            Empty: a NaN is refused unless ``nullable``, the others are counted. ``impute`` puts ``impute`` in its place,
            ``fallback`` has the manifest's fallback model answer.
        impute: the value; needed where a policy is ``impute``.
    """

    name: str
    input: str
    column: int
    unit: str = ""
    range: tuple[float, float] | None = None
    nullable: bool = False
    pii: bool = False
    ttl_s: float = 0.0
    edges: tuple[float, ...] = ()
    centre: float = 0.0
    scale: float = 1.0
    on_null: GuardPolicy = ""
    on_outside: GuardPolicy = ""
    on_stale: GuardPolicy = ""
    impute: float | None = None


class StateTensor(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """A tensor that the model hands from one inference of a stream to the next; applications neither send nor get it.

    Attributes:
        input: of the model file; output: of the model file, which becomes ``input`` of the stream's next inference.
        shape: of one stream's state, fixed; it begins as zeros.
    """

    input: str
    output: str
    datatype: Datatype
    shape: tuple[int, ...]


class Streams(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """How a stateful model keeps its clients' streams apart (``sequence_id`` of the Open Inference Protocol's requests).

    Attributes:
        states: tensors handed on.
        internal: the runtime itself holds the state (a TFLite file with variables): every stream has an interpreter.
            With neither, only ``transforms`` look back.
        most: streams kept; the one that was quiet longest goes first. idle_s: after so long it goes anyway.
    """

    states: tuple[StateTensor, ...] = ()
    internal: bool = False
    most: int = 16
    idle_s: float = 60.0


class Explanations(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """Which answers are explained, by occlusion against the reference medians.

    Attributes:
        share: of requests, chosen by hash; 0 for none.
        audit: class labels whose every answer is explained.
        medians: by feature, what takes a value's place.
    """

    share: float = 0.0
    audit: tuple[str, ...] = ()
    medians: dict[str, float] = {}


class Slice(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """A part of the traffic that is counted apart: rows whose feature lies in ``[low, high)``."""

    name: str
    feature: str
    low: float
    high: float


class Transform(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One declarative step, executed alike in training and on the device.

    Attributes:
        op: ``scale`` (params mean, scale) and others as the runtime defines them.
        input: tensor it reads; output: tensor it writes, the same when empty.
    """

    op: str
    input: str
    output: str = ""
    params: dict[str, Any] = {}


class Transforms(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """Steps before and after the model, in order."""

    pre: tuple[Transform, ...] = ()
    post: tuple[Transform, ...] = ()


class ReferenceColumn(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """Counts of one feature or output on held-out data: on its edges, plus nulls and integer moments [n, sum, squares]."""

    counts: tuple[int, ...]
    null: int = 0
    moments: tuple[int, int, int] = (0, 0, 0)


class Reference(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What the model saw and did on held-out data.

    Attributes:
        n: rows.
        features: by feature name; outputs: by output name, per class for a classifier.
        calibration: map of confidence to probability of being right, method and its parameters.
        validated_error: error rate per class label.
        accuracy: share right over all rows, or None without labels.
    """

    n: int
    features: dict[str, ReferenceColumn] = {}
    outputs: dict[str, ReferenceColumn] = {}
    calibration: dict[str, Any] = {}
    validated_error: dict[str, float] = {}
    accuracy: float | None = None


class Slo(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """Service levels. ``latency_p95_ms`` on the device, ``success`` share of requests, ``accuracy_drop`` absolute."""

    latency_p95_ms: float | None = None
    success: float | None = None
    accuracy_drop: float | None = None
    business_metric: str = ""


class Provenance(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """Where it came from. ``datasets``: name -> sha256; ``parent``: digest of the bundle it was made from."""

    commit: str = ""
    trainer: str = ""
    datasets: dict[str, str] = {}
    parent: str = ""
    metrics: dict[str, float] = {}


class Encryption(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """That every file of the bundle is encrypted, and under which content key (``sealed``).

    Attributes:
        scheme: ``aes-256-gcm-64k``; an agent that knows no other refuses a newer one by the manifest.
        key_id: of the content key, which itself is never in a manifest.
    """

    scheme: str
    key_id: str


class Manifest(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """See the module.

    Attributes:
        created: RFC 3339 UTC.
        requires: agent abilities without which it must not run.
        after: lowest version of the model that must have been confirmed on a device before this one; a device that confirmed none has
            nothing to carry over, and may take it at once. Empty: any.
        isolate: wants a worker of its own.
        fallback: model of the same inputs and outputs that answers where a guard says so.
        streams: of a stateful model.
        encryption: of an encrypted bundle.
    """

    schema: int
    model: str
    version: str
    created: str
    owner: Owner
    licence: str
    card: str = ""
    variants: tuple[Variant, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    features: tuple[Feature, ...] = ()
    slices: tuple[Slice, ...] = ()
    transforms: Transforms = Transforms()
    reference: Reference
    slo: Slo = Slo()
    provenance: Provenance = Provenance()
    min_agent: str = ""
    requires: tuple[str, ...] = ()
    after: str = ""
    isolate: bool = False
    fallback: str = ""
    streams: Streams | None = None
    explanations: Explanations = Explanations()
    encryption: Encryption | None = None

    def variant(self, variant_id: str) -> Variant:
        """The variant of that id. Raises ``KeyError``."""
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        raise KeyError(variant_id)

    def files(self) -> tuple[File, ...]:
        """Every file of every variant once, by path."""
        return tuple({file.path: file for variant in self.variants for file in variant.files}.values())


UNKNOWN_RUNTIME = "0"
"""Version of a runtime that no distribution names as its own: no minimum can be held against it."""


def runtime_suffices(version: str, minimum: str) -> bool:
    """Whether a runtime of this version fulfils a variant's ``min``. Admission and engine ask the same question here.

    A runtime's version need not be a semantic one: its leading dotted numbers count, and zeros at their end do not.

    >>> [runtime_suffices(have, "1.17.0") for have in ("1.17", "1.17rc1", "1.9.1", "1.16.9+cpu", "0")]
    [True, True, False, False, True]
    """
    return not minimum or version == UNKNOWN_RUNTIME or _leading(version) >= _leading(minimum)


def _leading(version: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest, checked as a reader would."""
    data = canonical.encode(manifest)
    parse(data)
    return data


def digest(data: bytes) -> ids.BundleDigest:
    """The identity of the bundle with this manifest."""
    return ids.BundleDigest(canonical.sha256(data))


def parse(data: bytes) -> Manifest:
    """Reads a manifest.

    Raises:
        Malformed: not canonical JSON, a field missing or of the wrong type, or a rule of the contract broken; the message says where.
        UnsupportedVersion: written by a newer program.
    """
    value = canonical.decode(data, what="manifest", max_bytes=MAX_BYTES)
    schema = value.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedVersion("manifest", schema, SCHEMA)
    try:
        manifest = msgspec.convert(value, Manifest)
    except msgspec.ValidationError as error:
        raise misfit_in("manifest", error, Manifest, value) from None
    _check(manifest)
    return manifest


def _require(condition: bool, where: str, expected: str) -> None:
    if not condition:
        raise Malformed("manifest", expected, where=where)


def _check(m: Manifest) -> None:
    _require(m.schema == SCHEMA, "$.schema", f"wanted {SCHEMA}, got {m.schema}")
    ids.model_name(m.model)
    ids.version_key(m.version)
    _unique([t.name for t in m.inputs], "$.inputs", nonempty=True)
    _unique([t.name for t in m.outputs], "$.outputs", nonempty=True)
    _unique([v.id for v in m.variants], "$.variants", nonempty=True)
    for i, variant in enumerate(m.variants):
        _check_variant(variant, f"$.variants[{i}]")
    seen: dict[str, File] = {}
    for variant in m.variants:
        for file in variant.files:
            _require(seen.setdefault(file.path, file) == file, "$.variants", f"{file.path} is listed twice and differs")
    for path in seen:
        folders = [path[:i] for i, c in enumerate(path) if c == "/"]
        _require(not any(folder in seen for folder in folders), "$.variants", f"{path} lies below another file")
    for kind, tensors in (("inputs", m.inputs), ("outputs", m.outputs)):
        for i, tensor in enumerate(tensors):
            _require(
                all(d == -1 or d > 0 for d in tensor.shape),
                f"$.{kind}[{i}].shape",
                f"wanted -1 or positive sizes, got {list(tensor.shape)}",
            )
    _check_encryption(m, list(seen.values()))
    _check_features(m)
    _check_abilities(m)


def _check_encryption(m: Manifest, files: list[File]) -> None:
    if m.encryption is None:
        plain = [file.path for file in files if file.plain is not None]
        _require(not plain, "$.encryption", f"wanted with files that are encrypted ({', '.join(plain)}), got none")
        return
    known = m.encryption.scheme == sealed.SCHEME
    _require(known, "$.encryption.scheme", f"wanted {sealed.SCHEME}, got {m.encryption.scheme[:60]!r}")
    ids.sha256_hex(m.encryption.key_id, what="$.encryption.key_id")
    for file in files:
        # One file in the clear, golden cases say, would give away what the others hide.
        _require(
            file.plain is not None, "$.variants", f"{file.path}: wanted plain of every file of an encrypted bundle"
        )
        assert file.plain is not None
        ids.sha256_hex(file.plain.sha256, what=f"$.variants {file.path} plain")
        size = sealed.sealed_size(file.plain.size) if file.plain.size >= 0 else -1
        _require(
            file.size == size,
            "$.variants",
            f"{file.path}: {file.plain.size} bytes are {size} encrypted, got {file.size}",
        )


def _check_variant(variant: Variant, where: str) -> None:
    ids.variant_id(variant.id)
    paths = [file.path for file in variant.files]
    _unique(paths, f"{where}.files", nonempty=True)
    for file in variant.files:
        layout.bundle_path(file.path)
        reserved = file.path.split("/")[0] in (MANIFEST_FILE, SIGNATURE_FILE)
        _require(
            not reserved, f"{where}.files", f"wanted names but {MANIFEST_FILE} and {SIGNATURE_FILE}, got {file.path}"
        )
        ids.sha256_hex(file.sha256, what=f"{where}.files {file.path}")
        _require(
            0 <= file.size <= 1 << 40, f"{where}.files", f"{file.path}: wanted 0 to {1 << 40} bytes, got {file.size}"
        )
    _require(
        variant.model in paths, f"{where}.model", f"wanted one of files ({', '.join(paths)}), got {variant.model!r}"
    )
    _require(
        variant.golden.cases in paths,
        f"{where}.golden.cases",
        f"wanted one of files ({', '.join(paths)}), got {variant.golden.cases!r}",
    )
    for name, value in variant.golden.tolerance.items():
        place = f"{where}.golden.tolerance"
        _require(name in DATATYPES, place, f"wanted datatypes ({', '.join(DATATYPES)}), got {name!r}")
        _require(0 <= value < math.inf, place, f"{name}: wanted a finite number from 0, got {value}")
    for name, value in variant.golden.minimum_recall.items():
        _require(0 <= value <= 1, f"{where}.golden.minimum_recall", f"{name}: wanted 0 to 1, got {value}")
    _require(
        variant.needs.rss_mb > 0 and variant.needs.disk_mb >= 0,
        f"{where}.needs",
        f"wanted rss_mb above 0 and disk_mb from 0, got {variant.needs.rss_mb} and {variant.needs.disk_mb}",
    )


def _check_features(m: Manifest) -> None:
    _unique([f.name for f in m.features], "$.features", nonempty=False)
    inputs = {tensor.name: tensor for tensor in m.inputs}
    for i, feature in enumerate(m.features):
        where = f"$.features[{i}]"
        _require(
            feature.input in inputs,
            where,
            f"input: wanted one of $.inputs ({', '.join(inputs)}), got {feature.input!r}",
        )
        width = inputs[feature.input].shape[-1] if inputs[feature.input].shape else 1
        _require(
            feature.column >= 0 and (width == -1 or feature.column < width),
            where,
            f"column: wanted one of {width} columns of {feature.input}, from 0, got {feature.column}",
        )
        ascending = all(a < b for a, b in zip(feature.edges, feature.edges[1:], strict=False))
        _require(
            ascending and len(feature.edges) <= 255,
            f"{where}.edges",
            f"wanted at most 255 ascending edges, got {len(feature.edges)}{'' if ascending else ', not ascending'}",
        )
        _require(feature.scale > 0, f"{where}.scale", f"wanted > 0, got {feature.scale}")
        ordered = feature.range is None or feature.range[0] < feature.range[1]
        _require(ordered, f"{where}.range", f"wanted the smaller value first, got {feature.range}")
        _require(feature.ttl_s >= 0, f"{where}.ttl_s", f"wanted >= 0, got {feature.ttl_s}")
        column = m.reference.features.get(feature.name)
        fits = column is None or len(column.counts) == len(feature.edges) + 1
        _require(
            fits,
            f"$.reference.features.{feature.name}",
            f"wanted {len(feature.edges) + 1} counts, one more than edges, got {len(column.counts) if column else 0}",
        )
        for name in ("on_null", "on_outside", "on_stale"):
            policy = getattr(feature, name)
            _require(
                policy != "impute" or feature.impute is not None, f"{where}.{name}", "impute wants a value: impute"
            )
            _require(policy != "fallback" or bool(m.fallback), f"{where}.{name}", "fallback wants $.fallback")
        _require(
            feature.impute is None or math.isfinite(feature.impute),
            f"{where}.impute",
            f"wanted a finite number, got {feature.impute}",
        )
    known = {feature.name for feature in m.features}
    for part in m.slices:
        _require(part.feature in known, "$.slices", f"{part.name}: wanted the name of a feature, got {part.feature!r}")
        _require(
            part.low < part.high, "$.slices", f"{part.name}: wanted low below high, got {part.low} and {part.high}"
        )


def _check_abilities(m: Manifest) -> None:
    if m.fallback:
        ids.model_name(m.fallback)
        _require(
            m.fallback != m.model, "$.fallback", f"wanted another model than {m.model}: it cannot stand in for itself"
        )
    used: set[str] = set()
    if any(f.on_null or f.on_outside or f.on_stale for f in m.features):
        used.add("guards")
    if m.streams is not None:
        used.add("states")
        steps = bool(m.transforms.pre or m.transforms.post)
        _require(
            steps or m.streams.internal or bool(m.streams.states), "$.streams", "wanted states, or internal, or steps"
        )
        _check_streams(m.streams)
    if m.encryption is not None:
        used.add("encrypted")
    if m.after:
        used.add("after")
        earlier = ids.version_key(m.after) < ids.version_key(m.version)
        _require(earlier, "$.after", f"wanted a version below {m.version}, got {m.after}")
    _require(
        used <= set(m.requires),
        "$.requires",
        f"wanted {', '.join(sorted(used - set(m.requires)))} named, got {', '.join(m.requires) or 'none'}",
    )
    known = {feature.name for feature in m.features}
    explanations = m.explanations
    _require(0 <= explanations.share <= 1, "$.explanations.share", f"wanted 0 to 1, got {explanations.share}")
    _require(
        set(explanations.medians) <= known,
        "$.explanations.medians",
        f"wanted names of features, got {', '.join(sorted(set(explanations.medians) - known))}",
    )
    finite = all(map(math.isfinite, explanations.medians.values()))
    _require(finite, "$.explanations.medians", f"wanted finite numbers, got {dict(explanations.medians)}")
    labels = {label for tensor in m.outputs for label in tensor.labels}
    _require(
        set(explanations.audit) <= labels,
        "$.explanations.audit",
        f"wanted labels of an output ({', '.join(sorted(labels))}), got {', '.join(sorted(set(explanations.audit) - labels))}",
    )
    asked = bool(explanations.share or explanations.audit)
    _require(
        bool(explanations.medians) or not asked,
        "$.explanations.medians",
        "wanted those of the features to explain, got none",
    )


def _check_streams(streams: Streams) -> None:
    where = "$.streams"
    _require(not (streams.states and streams.internal), where, "wanted states, or internal, and not both")
    _unique([state.input for state in streams.states], f"{where}.states", nonempty=False)
    _unique([state.output for state in streams.states], f"{where}.states", nonempty=False)
    for state in streams.states:
        size = math.prod(state.shape)
        fits = all(d > 0 for d in state.shape) and size <= MOST_STATE_ELEMENTS and state.datatype != "BYTES"
        _require(
            fits, f"{where}.states", f"{state.input}: wanted a fixed shape of at most {MOST_STATE_ELEMENTS} numbers"
        )
    _require(1 <= streams.most <= MOST_STREAMS, f"{where}.most", f"wanted 1 to {MOST_STREAMS}, got {streams.most}")
    _require(0 < streams.idle_s <= 86_400, f"{where}.idle_s", f"wanted up to a day, got {streams.idle_s}")


def _unique(names: list[str], where: str, *, nonempty: bool) -> None:
    _require(not nonempty or bool(names), where, "wanted at least one, got none")
    _require(
        len(set(names)) == len(names),
        where,
        f"wanted each name once, got {', '.join(sorted({n for n in names if names.count(n) > 1}))} twice",
    )


ready(Manifest, Transform)
