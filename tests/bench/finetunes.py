"""Models and what a little more training makes of them: pairs of files for benchmarks of deltas, trained here, the same each time.

The digits of scikit-learn; a network of two hidden layers, exported by skl2onnx as an engineer would. "Low rate" is training
that goes on for three epochs at a tenth or a hundredth of the rate it had.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LOW_RATE = ("tenth-rate-adam", "tenth-rate-sgd", "hundredth-rate-sgd", "hundredth-rate-adam")
"""All weights trained further at a low rate: what ``delta_finetune`` is about, the worst of them its figure."""
DRAWN = ("large-trees-grown", "weights-beside")
"""Too large to be trained here in passing: numbers are drawn, the files are as exporters write them."""
NAMES = ("last-layer", *LOW_RATE, "int8-recalibrated", "int8-per-channel", "trees-grown")


def pairs(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Name, base and target of each fine-tune; made when they are not there."""
    if not all((folder / f"{name}-new.onnx").is_file() for name in NAMES):
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _train(folder)
    for name in DRAWN:
        if not (folder / f"{name}-new.onnx").is_file():
            _put(folder, name, *(_large_trees() if name == DRAWN[0] else _weights_beside()))
    for name in (*NAMES, *DRAWN):
        yield name, folder / f"{name}-old.onnx", folder / f"{name}-new.onnx"


def _train(folder: Path) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    first, later = slice(0, 1200), slice(600, None)
    adam = _network("adam", 1e-3).fit(x[first], y[first])
    sgd = _network("sgd", 5e-2).fit(x[first], y[first])

    last = copy.deepcopy(adam)
    _further(last, x[later], y[later], 1e-4)
    for part in ("coefs_", "intercepts_"):
        getattr(last, part)[:-1] = getattr(adam, part)[:-1]
    low, lower, low_sgd, lower_sgd = (copy.deepcopy(one) for one in (adam, adam, sgd, sgd))
    _further(low, x[later], y[later], 1e-4)
    _further(lower, x[later], y[later], 1e-5)
    _further(low_sgd, x[later], y[later], 5e-3)
    _further(lower_sgd, x[later], y[later], 5e-4)
    whole = {
        "adam": adam,
        "sgd": sgd,
        "last": last,
        "low": low,
        "lower": lower,
        "low_sgd": low_sgd,
        "lower_sgd": lower_sgd,
    }
    models = {name: _export(model, x) for name, model in whole.items()}
    int8 = {
        (name, per): _quantized(models[name], x[rows], per)
        for name, rows in (("adam", first), ("low", later))
        for per in (False, True)
    }
    made = {
        "last-layer": (models["adam"], models["last"]),
        "tenth-rate-adam": (models["adam"], models["low"]),
        "hundredth-rate-adam": (models["adam"], models["lower"]),
        "tenth-rate-sgd": (models["sgd"], models["low_sgd"]),
        "hundredth-rate-sgd": (models["sgd"], models["lower_sgd"]),
        "int8-recalibrated": (int8["adam", False], int8["low", False]),
        "int8-per-channel": (int8["adam", True], int8["low", True]),
        "trees-grown": _trees(x, y),
    }
    for name, (old, new) in made.items():
        _put(folder, name, old, new)


def _put(folder: Path, name: str, old: bytes, new: bytes) -> None:
    (folder / f"{name}-old.onnx").write_bytes(old)
    (folder / f"{name}-new.onnx").write_bytes(new)


def _network(solver: str, rate: float) -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((512, 512), solver=solver, learning_rate_init=rate, max_iter=30, random_state=3)


def _further(network: Any, x: np.ndarray, y: np.ndarray, rate: float) -> None:
    network.learning_rate_init = rate
    network._optimizer.learning_rate_init = network._optimizer.learning_rate = rate
    for _ in range(3):
        network.partial_fit(x, y)


def _export(model: Any, x: np.ndarray) -> bytes:
    from skl2onnx import to_onnx

    exported: bytes = to_onnx(model, x[:1], options={"zipmap": False}, target_opset={"": 17, "ai.onnx.ml": 3},
                              name="digits").SerializeToString(deterministic=True)  # fmt: skip
    return exported


def _quantized(model: bytes, rows: np.ndarray, per_channel: bool) -> bytes:
    import tempfile

    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts = iter([rows[i : i + 64] for i in range(0, len(rows), 64)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {onnx.load_from_string(model).graph.input[0].name: part}

    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
            work = Path(name)
            (work / "float.onnx").write_bytes(model)
            quantize_static(
                str(work / "float.onnx"), str(work / "int8.onnx"), Rows(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            return (work / "int8.onnx").read_bytes()
    finally:
        logging.disable(logging.NOTSET)


def _trees(x: np.ndarray, y: np.ndarray) -> tuple[bytes, bytes]:
    from sklearn.ensemble import GradientBoostingClassifier

    trees = GradientBoostingClassifier(n_estimators=100, max_depth=4, warm_start=True, random_state=3)
    trees.fit(x, y > 4)
    old = _export(trees, x)
    trees.n_estimators = 110
    trees.fit(x, y > 4)
    return old, _export(trees, x)


def _large_trees() -> tuple[bytes, bytes]:
    """A boosted ensemble of 400 trees of depth eight, 7 MB, and twenty trees more."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(3)
    inner, leaves = 255, 256
    places = np.arange(inner + leaves)
    branch = places < inner
    trees = [
        (
            np.where(branch, rng.integers(0, 200, len(places)), 0).tolist(),
            np.where(branch, rng.normal(size=len(places)), 0).astype(np.float32).tolist(),
            (rng.normal(size=leaves) / 100).astype(np.float32).tolist(),
        )
        for _ in range(420)
    ]

    def ensemble(count: int) -> bytes:
        grown = trees[:count]
        node = helper.make_node(
            "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1,
            nodes_treeids=[number for number in range(count) for _ in places], nodes_nodeids=places.tolist() * count,
            nodes_featureids=[one for tree in grown for one in tree[0]], nodes_values=[one for tree in grown for one in tree[1]],
            nodes_modes=[mode for _ in grown for mode in ["BRANCH_LEQ"] * inner + ["LEAF"] * leaves],
            nodes_truenodeids=np.where(branch, 2 * places + 1, 0).tolist() * count,
            nodes_falsenodeids=np.where(branch, 2 * places + 2, 0).tolist() * count,
            target_treeids=[number for number in range(count) for _ in range(leaves)],
            target_nodeids=places[inner:].tolist() * count, target_ids=[0] * leaves * count,
            target_weights=[one for tree in grown for one in tree[2]],
        )  # fmt: skip
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n]) for name, n in (("x", 200), ("y", 1)))
        made: bytes = helper.make_model(helper.make_graph([node], "trees", [x], [y])).SerializeToString()
        return made

    return ensemble(400), ensemble(420)


def _weights_beside() -> tuple[bytes, bytes]:
    """What lies in ``model.onnx.data``: 5 MB of floats, all of them moved by some tenths of a per cent of their spread."""
    rng = np.random.default_rng(3)
    old = (rng.normal(size=1_300_000) / 20).astype(np.float32)
    return old.tobytes(), (old + rng.normal(size=len(old)) / 5000).astype(np.float32).tobytes()
