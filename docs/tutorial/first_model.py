"""Trains a small classifier for the tutorial and writes what `skerry bundle build` needs.

Usage: python first_model.py FOLDER VERSION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from skl2onnx import to_onnx
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split


def tensor(name: str, rows: np.ndarray) -> dict:
    """A tensor as the Open Inference Protocol writes it."""
    return {"name": name, "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel().tolist()}


def main(folder: Path, version: str) -> None:
    """Trains, exports, and writes model, golden cases and spec."""
    iris = load_iris()
    x, y = iris.data.astype(np.float32), iris.target
    x_train, x_held, y_train, y_held = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    model = LogisticRegression(max_iter=1000).fit(x_train, y_train)

    folder.mkdir(parents=True, exist_ok=True)
    graph = to_onnx(model, x_train[:1], options={"zipmap": False}, target_opset=17)
    graph.graph.output.pop(0)  # keep the probabilities, drop the label
    (folder / "model.onnx").write_bytes(graph.SerializeToString())

    # Golden cases: rows that the model has not seen, with the answers the exported model gives. Every device replays them.
    session = ort.InferenceSession(str(folder / "model.onnx"))
    answers = session.run(["probabilities"], {"X": x_held})[0]
    labels = [str(name) for name in iris.target_names]
    with (folder / "golden.jsonl").open("w") as cases:
        for row, answer, label in zip(x_held[:15], answers[:15], y_held[:15], strict=True):
            case = {"inputs": [tensor("X", row[None])], "outputs": [tensor("probabilities", answer[None])]}
            cases.write(json.dumps(case | {"label": labels[label]}) + "\n")

    right = answers.argmax(axis=1) == y_held
    spec = {
        "model": "iris",
        "version": version,
        "owner": {"name": "You", "contact": "you@example.org"},
        "licence": "BSD-3-Clause",
        "variants": [
            {
                "id": "onnx",
                "runtime": "onnx",
                "model": "model.onnx",
                "files": ["model.onnx", "golden.jsonl"],
                "golden": {"cases": "golden.jsonl", "tolerance": {"FP32": 0.001}},
                "needs": {"rss_mb": 64, "disk_mb": 1},
            }
        ],
        "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3], "labels": labels}],
        "reference": {"n": len(y_held), "accuracy": float(right.mean())},
    }
    (folder / "spec.json").write_text(json.dumps(spec, indent=2))
    print(f"{folder}: accuracy {right.mean():.3f} on {len(y_held)} held-out rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
