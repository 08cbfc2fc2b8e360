"""Which values of a request are counted: the columns of a recorder's ring, derived once from the manifest.

A plan is written into the ring's header, so that a ring left by a dead worker can be folded without its bundle. It holds
only what folding needs; what it leaves out of a manifest is never counted.
"""

from __future__ import annotations

import itertools

import msgspec
from skerry_contract import manifest as m

RAW_CLASSES = 32
"""Up to this many classes the probabilities are stored as they are, and the predicted class is found while folding."""

# float32 holds these exactly; a feature of another datatype makes the ring store float64.
_NOT_EXACT = frozenset({"INT64", "UINT64", "BYTES"})
_FITS_FLOAT32 = frozenset({"BOOL", "UINT8", "UINT16", "INT8", "INT16", "FP16", "FP32"})


class FeatureColumn(msgspec.Struct, frozen=True, kw_only=True):
    """One watched feature: where it comes from and how it is binned.

    ``low``/``high``: plausible range, None for any. ``pii``: its values leave the device only as counts.
    """

    name: str
    input: str
    column: int
    edges: tuple[float, ...] = ()
    centre: float = 0.0
    scale: float = 1.0
    low: float | None = None
    high: float | None = None
    pii: bool = False


class OutputColumn(msgspec.Struct, frozen=True, kw_only=True):
    """One classifier output of ``classes`` probabilities.

    Attributes:
        labels: names of the classes.
        knots_x, knots_y: calibration as a piecewise linear map from confidence to probability of being right;
            empty when the manifest has none.
    """

    name: str
    classes: int
    labels: tuple[str, ...] = ()
    knots_x: tuple[float, ...] = ()
    knots_y: tuple[float, ...] = ()

    @property
    def raw(self) -> bool:
        """Whether all probabilities are stored; else the predicted class and its confidence."""
        return self.classes <= RAW_CLASSES

    @property
    def width(self) -> int:
        """Stored values per row."""
        return self.classes if self.raw else 2


class SliceColumn(msgspec.Struct, frozen=True, kw_only=True):
    """Rows whose feature number ``feature`` lies in ``[low, high)``."""

    name: str
    feature: int
    low: float
    high: float


class Explain(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows are explained: ``share`` of all by hash, and all of the classes ``audit`` of the first output."""

    share: float = 0.0
    audit: tuple[int, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The values stored per row: features in order, then outputs in order.

    Attributes:
        wide: float64 values instead of float32.
        whole: inputs of which every column is watched, in order.
        direct: every input and output is stored whole and in the type it comes in, so that a row is its bytes.
        explain: None when the manifest asks for none.
        complete: what is stored of a row's features is all that the model was given.
    """

    features: tuple[FeatureColumn, ...] = ()
    outputs: tuple[OutputColumn, ...] = ()
    slices: tuple[SliceColumn, ...] = ()
    wide: bool = False
    whole: tuple[str, ...] = ()
    direct: bool = False
    explain: Explain | None = None
    complete: bool = False

    @property
    def width(self) -> int:
        """Values per row."""
        return len(self.features) + sum(output.width for output in self.outputs)

    @property
    def dtype(self) -> str:
        """The stored type as numpy names it, little-endian."""
        return "<f8" if self.wide else "<f4"


def plan_of(manifest: m.Manifest) -> Plan:
    """The plan of a manifest.

    Features of text inputs (``BYTES``) and of inputs with more than two dimensions have no row to be counted in and are
    left out.
    """
    inputs = {tensor.name: tensor for tensor in manifest.inputs}
    watched = [
        f
        for f in manifest.features
        if len(inputs[f.input].shape) in (1, 2)
        and inputs[f.input].datatype != "BYTES"
        and (len(inputs[f.input].shape) == 2 or f.column == 0)
    ]
    # Grouped by input, so that whole rows are copied at once.
    watched.sort(key=lambda f: [tensor.name for tensor in manifest.inputs].index(f.input))
    number = {f.name: i for i, f in enumerate(watched)}
    wide = any(inputs[f.input].datatype not in _FITS_FLOAT32 for f in watched)
    whole = tuple(
        tensor.name
        for tensor in manifest.inputs
        if [f.column for f in watched if f.input == tensor.name] == list(range(_width(tensor)))
    )
    classifiers = [tensor for tensor in manifest.outputs if tensor.labels and len(tensor.shape) == 2]
    sources = [tensor for tensor in manifest.inputs if any(f.input == tensor.name for f in watched)] + classifiers
    return Plan(
        features=tuple(
            FeatureColumn(
                name=f.name,
                input=f.input,
                column=f.column,
                edges=f.edges,
                centre=f.centre,
                scale=f.scale,
                low=f.range[0] if f.range else None,
                high=f.range[1] if f.range else None,
                pii=f.pii,
            )
            for f in watched
        ),
        outputs=tuple(
            OutputColumn(name=tensor.name, classes=len(tensor.labels), labels=tensor.labels, **_knots(manifest, tensor))
            for tensor in classifiers
        ),
        slices=tuple(
            SliceColumn(name=s.name, feature=number[s.feature], low=s.low, high=s.high)
            for s in manifest.slices
            if s.feature in number
        ),
        wide=wide,
        whole=whole,
        direct=bool(sources)
        and all(tensor.datatype == ("FP64" if wide else "FP32") for tensor in sources)
        and all(tensor.name in whole for tensor in sources if tensor.name in inputs and not tensor.labels)
        and all(len(tensor.labels) <= RAW_CLASSES for tensor in classifiers),
        explain=_explain(manifest, classifiers),
        complete=all(tensor.name in whole and tensor.datatype not in _NOT_EXACT for tensor in manifest.inputs),
    )


def _explain(manifest: m.Manifest, classifiers: list[m.Tensor]) -> Explain | None:
    wanted = manifest.explanations
    labels = classifiers[0].labels if classifiers else ()
    audit = tuple(i for i, label in enumerate(labels) if label in wanted.audit)
    return Explain(share=wanted.share, audit=audit) if wanted.share or audit else None


def _width(tensor: m.Tensor) -> int:
    return tensor.shape[-1] if len(tensor.shape) == 2 else 1


def _knots(manifest: m.Manifest, tensor: m.Tensor) -> dict[str, tuple[float, ...]]:
    calibration = manifest.reference.calibration
    if calibration.get("output", tensor.name) != tensor.name:
        return {}
    x, y = calibration.get("x"), calibration.get("y")
    if not (isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y) > 0):
        return {}
    if any(a >= b for a, b in itertools.pairwise(x)):
        return {}
    return {"knots_x": tuple(float(v) for v in x), "knots_y": tuple(min(1.0, max(0.0, float(v))) for v in y)}
