"""Tiny real bundles for tests: ONNX graphs made by hand, so that building one takes milliseconds.

The classifier is an exact nearest-centroid rule written as a two-layer network: class ``k`` lives near ``centres()[k]``, a
row drawn there is predicted right, and every expectation is worked out in numpy, not by the runtime under test.

``build_bundle`` takes a ``kind``:

* ``classifier``: float network, output ``probabilities`` with labels. ``int8``: the same, statically quantized (QDQ).
* ``identity``: ``y = x``, no labels.
* ``damaged``: the model file is cut in half (the manifest agrees with the damaged bytes).
* ``unknown-operator``: a node that no runtime knows.
* ``crash-on-load``: kills the runtime with SIGFPE while it loads (x86 only: INT32_MIN / -1 in constant folding).
* ``crash-on-rows``: the classifier, which passes its proof and dies with SIGFPE on a row with ``floor(x[0]) == CRASH_VALUE``.
* ``slow-on-rows``: the classifier, which loops once for each unit by which the largest ``x[0]`` is above ``SLOW_ABOVE``: a
  large value hangs it for hours, in native code.
* ``slow``: the classifier, which loops ``SLOW_TURNS`` times for every request: some 5 ms.
* ``always-one``: predicts the first class whatever comes; its golden cases expect the truth.
* ``quiet-defect``: always says the first class, and its golden outputs say so too: only the recall shows it.
* ``wrong-golden``: the classifier, with golden outputs that do not fit it.
* ``float-as-int8``, ``dynamic-as-int8``: declared int8, but float or dynamically quantized inside.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper
from skerry_contract import canonical, sealed
from skerry_contract import manifest as mf

CRASH_VALUE = 666
SLOW_ABOVE = 1000.0
SLOW_TURNS = 5000
INT32_MIN = -(2**31)
KINDS = (
    "classifier", "int8", "identity", "damaged", "unknown-operator", "crash-on-load", "crash-on-rows", "slow-on-rows",
    "slow",    "always-one", "quiet-defect", "wrong-golden", "float-as-int8", "dynamic-as-int8",
)  # fmt: skip


def centres(n_features: int = 4, classes: int = 3, seed: int = 0) -> np.ndarray:
    """Where each class lives, float64[classes, n_features]; at least about 3 apart. Needs ``classes <= 2 * n_features``."""
    found = np.random.default_rng(seed).normal(0.0, 0.15, (classes, n_features))
    for k in range(classes):
        found[k, k % n_features] += 3.0 if k < n_features else -3.0
    return found.astype(np.float32).astype(np.float64)


def rows(
    n: int, n_features: int = 4, classes: int = 3, *, seed: int = 0, draw: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Rows near the centres of ``seed`` and their classes: float32[n, n_features], int64[n]. ``draw`` is another seed."""
    rng = np.random.default_rng(draw)
    truth = np.arange(n) % classes
    x = centres(n_features, classes, seed)[truth] + rng.normal(0.0, 0.25, (n, n_features))
    return x.astype(np.float32), truth


def probabilities(x: np.ndarray, classes: int = 3, seed: int = 0) -> np.ndarray:
    """What the float classifier answers, worked out in numpy: float32[n, classes]."""
    c = centres(x.shape[1], classes, seed)
    logits = 2.0 * x.astype(np.float64) @ c.T - (c * c).sum(1)
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).astype(np.float32)


def labels(classes: int = 3) -> tuple[str, ...]:
    """The class names: ``class-0`` and so on."""
    return tuple(f"class-{k}" for k in range(classes))


def build_bundle(
    folder: str | Path,
    model: str = "gas",
    version: str = "1.0.0",
    kind: str = "classifier",
    n_features: int = 4,
    *,
    classes: int = 3,
    seed: int = 0,
    transforms: bool = False,
    n_golden: int = 12,
    minimum_recall: float = 0.8,
    padding: int = 0,
    further: Mapping[str, bytes] | None = None,
    changes: dict[str, Any] | None = None,
    content_key: bytes | None = None,
) -> str:
    """Writes a bundle into ``folder`` (made when missing).

    Args:
        folder: the bundle's folder, ``manifest.json`` and the files it lists.
        kind: see the module.
        transforms: the application sends ``10 * x + 5`` and gets a ``label`` output beside the probabilities: a ``scale``
            step before and a ``labels`` step after the network. Not with ``identity``.
        n_golden: golden cases, one row each; classes in turn.
        padding: a further file of that many pseudo-random bytes, to give a download something to do.
        further: more files by path, with what is in them.
        changes: fields of the manifest to replace, as builtins, e.g. ``{"min_agent": "9.9.9"}``.
        content_key: the manifest is of an encrypted bundle; the folder holds its files in the clear.

    Returns:
        The bundle's digest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}, wanted one of {KINDS}")
    classifies = kind != "identity"
    truth_labels = labels(classes)
    x, truth = rows(max(n_golden, 1), n_features, classes, seed=seed, draw=99)
    expected = probabilities(x, classes, seed) if classifies else x
    if kind == "quiet-defect":
        expected = np.repeat(_one_hot(0, classes), len(x), axis=0)
    elif kind == "wrong-golden":
        expected = expected[:, ::-1].copy()
    raw = (10.0 * x.astype(np.float64) + 5.0).astype(np.float32) if transforms else x
    output_name = "probabilities" if classifies else "y"

    golden_lines = []
    for i in range(len(x)):
        outputs = [_json_tensor(output_name, "FP32", expected[i : i + 1])]
        if transforms and classifies:
            outputs.append(_json_tensor("label", "BYTES", np.array([truth_labels[int(expected[i].argmax())]], object)))
        case: dict[str, Any] = {"inputs": [_json_tensor("x", "FP32", raw[i : i + 1])], "outputs": outputs}
        if classifies:
            case["label"] = truth_labels[int(truth[i])]
        golden_lines.append(json.dumps(case, sort_keys=True, separators=(",", ":")))

    written = {
        "model.onnx": onnx_bytes(kind, n_features, classes, seed),
        "golden.jsonl": ("\n".join(golden_lines) + "\n").encode(),
    }
    if padding:
        written["padding.bin"] = np.random.default_rng([seed, padding]).bytes(padding)
    written |= further or {}
    for name, data in written.items():
        (folder / name).write_bytes(data)
    files = tuple(_file(n, d, content_key) for n, d in sorted(written.items()))

    quantized = kind in ("int8", "float-as-int8", "dynamic-as-int8")
    outputs_spec = [mf.Tensor(name=output_name, datatype="FP32", shape=(-1, classes if classifies else n_features),
                              labels=truth_labels if classifies else ())]  # fmt: skip
    steps = mf.Transforms()
    if transforms and classifies:
        outputs_spec.append(mf.Tensor(name="label", datatype="BYTES", shape=(-1,)))
        steps = mf.Transforms(
            pre=(
                mf.Transform(op="scale", input="x", params={"mean": [5.0] * n_features, "scale": [10.0] * n_features}),
            ),
            post=(
                mf.Transform(op="labels", input="probabilities", output="label", params={"labels": list(truth_labels)}),
            ),
        )
    manifest = mf.Manifest(
        schema=mf.SCHEMA,
        model=model,
        version=version,
        created="2026-01-01T00:00:00Z",
        owner=mf.Owner(name="Test Owner", contact="owner@example.org"),
        licence="Apache-2.0",
        variants=(
            mf.Variant(
                id="onnx-int8" if quantized else "onnx-fp32",
                runtime="onnx",
                precision="int8" if quantized else "fp32",
                model="model.onnx",
                files=files,
                golden=mf.Golden(
                    cases="golden.jsonl",
                    tolerance={"FP32": 0.1 if quantized else 1e-4},
                    minimum_recall=dict.fromkeys(truth_labels, minimum_recall) if classifies else {},
                ),
                needs=mf.Needs(
                    rss_mb=200, disk_mb=1 + (padding + sum(map(len, (further or {}).values()))) // 1_000_000
                ),
            ),
        ),
        inputs=(mf.Tensor(name="x", datatype="FP32", shape=(-1, n_features)),),
        outputs=tuple(outputs_spec),
        features=_features(n_features, transforms),
        transforms=steps,
        reference=_reference(n_features, classes, seed, transforms, classifies),
        slo=mf.Slo(latency_p95_ms=50.0, success=0.99),
        provenance=mf.Provenance(commit="0" * 40, trainer="tests/models.py"),
    )
    if content_key is not None:
        encryption = mf.Encryption(scheme=sealed.SCHEME, key_id=sealed.key_id(content_key))
        manifest = msgspec.structs.replace(manifest, encryption=encryption, requires=("encrypted",))
    data = mf.encode(manifest)
    if changes:
        data = canonical.encode({**json.loads(data), **changes})
        mf.parse(data)
    (folder / mf.MANIFEST_FILE).write_bytes(data)
    return mf.digest(data)


def seal(data: bytes, content_key: bytes) -> bytes:
    """A file as it leaves the machine where its bundle is built."""
    return b"".join(sealed.seal(io.BytesIO(data), content_key, hashlib.sha256(data).hexdigest(), AESGCM))


def _file(path: str, data: bytes, content_key: bytes | None) -> mf.File:
    plain = mf.Plain(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    if content_key is None:
        return mf.File(path=path, sha256=plain.sha256, size=plain.size)
    stored = seal(data, content_key)
    return mf.File(path=path, sha256=hashlib.sha256(stored).hexdigest(), size=len(stored), plain=plain)


def onnx_bytes(kind: str, n_features: int = 4, classes: int = 3, seed: int = 0) -> bytes:
    """The model file of a kind."""
    if kind == "damaged":
        good = onnx_bytes("classifier", n_features, classes, seed)
        return good[: len(good) // 2]
    maker = {
        "identity": _identity,
        "int8": _quantized,
        "dynamic-as-int8": _dynamic,
        "crash-on-load": _crash_on_load,
        "crash-on-rows": _crash_on_rows,
        "slow-on-rows": _slow_on_rows,
        "slow": _slow,
        "unknown-operator": _unknown_operator,
        "always-one": _constant_class,
        "quiet-defect": _constant_class,
    }.get(kind, _classifier)
    nodes, initializers, output, width, domains = maker(n_features, classes, seed)
    graph = h.make_graph(
        nodes,
        kind,
        [h.make_tensor_value_info("x", T.FLOAT, ["n", n_features])],
        [h.make_tensor_value_info(output, T.FLOAT, ["n", width])],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [h.make_opsetid("", 17), *(h.make_opsetid(d, 1) for d in domains)]
    return h.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="skerry-tests").SerializeToString()


def write_onnx(
    path: str | Path, kind: str = "classifier", n_features: int = 4, classes: int = 3, seed: int = 0
) -> Path:
    """Writes a bare model file, for tests that build the bundle themselves."""
    onnx_path = Path(path)
    onnx_path.write_bytes(onnx_bytes(kind, n_features, classes, seed))
    return onnx_path


def _weights(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    # relu(x) - relu(-x) = x, so [I, -I] then [2C, -2C] is the linear rule 2 C x - |C|^2 with a hidden layer in between.
    c = centres(n, classes, seed)
    eye = np.eye(n)
    w1 = np.hstack([eye, -eye]).astype(np.float32)
    w2 = np.vstack([2.0 * c.T, -2.0 * c.T]).astype(np.float32)
    return w1, np.zeros(2 * n, np.float32), w2, (-(c * c).sum(1)).astype(np.float32)


def _classifier(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    w1, b1, w2, b2 = _weights(n, classes, seed)
    nodes = [
        h.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        h.make_node("Relu", ["h"], ["r"]),
        h.make_node("Gemm", ["r", "w2", "b2"], ["logits"]),
        h.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    return nodes, {"w1": w1, "b1": b1, "w2": w2, "b2": b2}, "probabilities", classes, []


def _identity(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    return [h.make_node("Identity", ["x"], ["y"])], {}, "y", n, []


def _quantized(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    w1, b1, w2, b2 = _weights(n, classes, seed)
    x, _ = rows(200, n, classes, seed=seed, draw=7)
    hidden = np.maximum(x @ w1 + b1, 0)
    logits = hidden @ w2 + b2
    zero8 = np.array(0, np.int8)
    values: dict[str, np.ndarray] = {"zero8": zero8}
    nodes: list[Any] = []

    def scale_of(name: str, data: np.ndarray) -> float:
        scale = np.float32(max(float(np.abs(data).max()) * 1.1, 1e-3) / 127)
        values[f"{name}_scale"] = np.array(scale, np.float32)
        return float(scale)

    def requantize(source: str, target: str, data: np.ndarray) -> float:
        scale = scale_of(target, data)
        nodes.append(h.make_node("QuantizeLinear", [source, f"{target}_scale", "zero8"], [f"{target}_q"]))
        nodes.append(h.make_node("DequantizeLinear", [f"{target}_q", f"{target}_scale", "zero8"], [target]))
        return scale

    def weight(name: str, data: np.ndarray) -> float:
        scale = scale_of(name, data)
        values[f"{name}_q"] = np.clip(np.rint(data / scale), -127, 127).astype(np.int8)
        nodes.append(h.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale", "zero8"], [name]))
        return scale

    def bias(name: str, data: np.ndarray, scale: float) -> None:
        values[f"{name}_q"] = np.rint(data / scale).astype(np.int32)
        values[f"{name}_scale"] = np.array(scale, np.float32)
        values[f"{name}_zero"] = np.array(0, np.int32)
        nodes.append(h.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"], [name]))

    sx = requantize("x", "xd", x)
    bias("b1", b1, sx * weight("w1", w1))
    nodes.append(h.make_node("Gemm", ["xd", "w1", "b1"], ["h"]))
    nodes.append(h.make_node("Relu", ["h"], ["r"]))
    sr = requantize("r", "rd", hidden)
    bias("b2", b2, sr * weight("w2", w2))
    nodes.append(h.make_node("Gemm", ["rd", "w2", "b2"], ["l"]))
    requantize("l", "ld", logits)
    nodes.append(h.make_node("Softmax", ["ld"], ["probabilities"], axis=1))
    return nodes, values, "probabilities", classes, []


def _dynamic(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    c = centres(n, classes, seed)
    scale = np.float32(np.abs(2 * c).max() / 127)
    values = {
        "w": np.clip(np.rint(2 * c.T / scale), -127, 127).astype(np.int8),
        "ws": np.array(scale, np.float32),
        "wz": np.array(0, np.int8),
        "b": (-(c * c).sum(1)).astype(np.float32),
    }
    nodes = [
        h.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        h.make_node("MatMulInteger", ["xq", "w", "xz", "wz"], ["i"]),
        h.make_node("Cast", ["i"], ["f"], to=T.FLOAT),
        h.make_node("Mul", ["xs", "ws"], ["s"]),
        h.make_node("Mul", ["f", "s"], ["m"]),
        h.make_node("Add", ["m", "b"], ["logits"]),
        h.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    return nodes, values, "probabilities", classes, []


def _crash_on_load(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    nodes, values, output, width, _ = _classifier(n, classes, seed)
    nodes[-1] = h.make_node("Softmax", ["logits"], ["p"], axis=1)
    nodes += [
        h.make_node("Div", ["low", "minus"], ["d"]),
        h.make_node("Cast", ["d"], ["df"], to=T.FLOAT),
        h.make_node("Mul", ["df", "nothing"], ["z"]),
        h.make_node("Add", ["p", "z"], [output]),
    ]
    values |= {
        "low": np.array([INT32_MIN], np.int32),
        "minus": np.array([-1], np.int32),
        "nothing": np.zeros(1, np.float32),
    }
    return nodes, values, output, width, []


def _crash_on_rows(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    nodes, values, output, width, _ = _classifier(n, classes, seed)
    nodes[-1] = h.make_node("Softmax", ["logits"], ["p"], axis=1)
    nodes += [
        h.make_node("Gather", ["x", "first"], ["c"], axis=1),
        h.make_node("Floor", ["c"], ["cf"]),
        h.make_node("Equal", ["cf", "value"], ["hit"]),
        h.make_node("Where", ["hit", "minus", "plus"], ["divisor"]),
        h.make_node("Div", ["low", "divisor"], ["d"]),
        h.make_node("Cast", ["d"], ["df"], to=T.FLOAT),
        h.make_node("Mul", ["df", "nothing"], ["z"]),
        h.make_node("Add", ["p", "z"], [output]),
    ]
    values |= {
        "first": np.array([0], np.int64),
        "value": np.array([CRASH_VALUE], np.float32),
        "low": np.array([INT32_MIN], np.int32),
        "minus": np.array([-1], np.int32),
        "plus": np.array([1], np.int32),
        "nothing": np.zeros(1, np.float32),
    }
    return nodes, values, output, width, []


def _slow(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    nodes, values, *rest = _slow_on_rows(n, classes, seed)
    return nodes, {**values, "above": np.array(-SLOW_TURNS, np.float32)}, *rest


def _slow_on_rows(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    nodes, values, output, width, _ = _classifier(n, classes, seed)
    nodes[-1] = h.make_node("Softmax", ["logits"], ["p"], axis=1)
    scalar = [
        h.make_tensor_value_info(name, kind, []) for name, kind in (("i", T.INT64), ("c", T.BOOL), ("v", T.FLOAT))
    ]
    turn = h.make_graph(
        [h.make_node("Identity", ["c"], ["go_on"]), h.make_node("Cos", ["v"], ["next"])],
        "turn",
        scalar,
        [h.make_tensor_value_info("go_on", T.BOOL, []), h.make_tensor_value_info("next", T.FLOAT, [])],
    )
    nodes += [
        h.make_node("Gather", ["x", "first"], ["c0"], axis=1),
        h.make_node("ReduceMax", ["c0"], ["largest"], keepdims=0),
        h.make_node("Sub", ["largest", "above"], ["more"]),
        h.make_node("Max", ["more", "nothing"], ["turns"]),
        h.make_node("Cast", ["turns"], ["count"], to=T.INT64),
        h.make_node("Loop", ["count", "", "nothing"], ["looped"], body=turn),
        h.make_node("Mul", ["looped", "nothing"], ["z"]),
        h.make_node("Add", ["p", "z"], [output]),
    ]
    values |= {
        "first": np.array([0], np.int64),
        "above": np.array(SLOW_ABOVE, np.float32),
        "nothing": np.array(0, np.float32),
    }
    return nodes, values, output, width, []


def _unknown_operator(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    nodes, values, output, width, _ = _classifier(n, classes, seed)
    nodes[1] = h.make_node("FluxCapacitor", ["h"], ["r"], domain="org.example.unknown")
    return nodes, values, output, width, ["org.example.unknown"]


def _constant_class(n: int, classes: int, seed: int) -> tuple[list[Any], dict[str, np.ndarray], str, int, list[str]]:
    nodes = [
        h.make_node("MatMul", ["x", "zeros"], ["flat"]),
        h.make_node("Add", ["flat", "one_hot"], ["probabilities"]),
    ]
    values = {"zeros": np.zeros((n, classes), np.float32), "one_hot": _one_hot(0, classes)}
    return nodes, values, "probabilities", classes, []


def _one_hot(k: int, classes: int) -> np.ndarray:
    found = np.zeros((1, classes), np.float32)
    found[0, k] = 1.0
    return found


def _json_tensor(name: str, datatype: str, value: np.ndarray) -> dict[str, Any]:
    return {"name": name, "shape": list(value.shape), "datatype": datatype, "data": value.ravel().tolist()}


def _features(n: int, transforms: bool) -> tuple[mf.Feature, ...]:
    a, b = (10.0, 5.0) if transforms else (1.0, 0.0)
    return tuple(
        mf.Feature(
            name=f"f{i}",
            input="x",
            column=i,
            range=(-10.0 * a + b, 10.0 * a + b),
            edges=tuple(a * e + b for e in (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0)),
            centre=b,
            scale=a,
        )
        for i in range(n)
    )


def _reference(n: int, classes: int, seed: int, transforms: bool, classifies: bool) -> mf.Reference:
    x, truth = rows(300, n, classes, seed=seed, draw=3)
    raw = 10.0 * x + 5.0 if transforms else x
    columns = {}
    for feature in _features(n, transforms):
        values = raw[:, feature.column].astype(np.float64)
        counts = np.bincount(np.searchsorted(feature.edges, values, side="right"), minlength=len(feature.edges) + 1)
        q = np.clip(np.rint((values - feature.centre) / feature.scale * 4096), -(2**20), 2**20).astype(np.int64)
        moments = (len(q), int(q.sum()), int((q * q).sum()))
        columns[feature.name] = mf.ReferenceColumn(counts=tuple(int(c) for c in counts), moments=moments)
    if not classifies:
        return mf.Reference(n=len(x), features=columns)
    predicted = probabilities(x, classes, seed).argmax(1)
    counts = np.bincount(predicted, minlength=classes)
    return mf.Reference(
        n=len(x),
        features=columns,
        outputs={"probabilities": mf.ReferenceColumn(counts=tuple(int(c) for c in counts))},
        validated_error=dict.fromkeys(labels(classes), 0.0),
        accuracy=float((predicted == truth).mean()),
    )
