"""Makes the demo's bundles: classifiers that prove themselves, and one that proves itself and crashes all the same.

Each bundle holds the same network twice, as int8 ONNX and as int8 TFLite; the device chooses. The reference is the ONNX
variant's, the golden cases are each variant's own.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skerry_cli import bundle
from skerry_cli.demo import data, quantization, reference, sabotage, tflite, training

MODEL = "gas"
ONNX, TFLITE = "onnx-int8", "tflite-int8"
VARIANTS = {"onnx": ONNX, "tflite": TFLITE}
"""Runtime -> variant."""
_CASES_PER_GAS = 6
_TOLERANCE = 0.05
_RECALL_MARGIN = 0.2
_LOWEST: dict[str, dict[str, str]] = {"onnx": {"min": "1.17"}, "tflite": {}}
"""LiteRT began to count anew after tflite-runtime 2.14, so one number cannot name a lowest version of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A bundle with what its training measured.

    Attributes:
        accuracy: share right on the held-out rows, by variant.
        model_bytes: size of each variant's graph.
    """

    bundle: bundle.Bundle
    trained: training.Trained
    accuracy: dict[str, float]
    model_bytes: dict[str, int]


def make_bundle(out: Path, *, version: str, batches: tuple[int, ...], created: str, seed: int = 0) -> Made:
    """Trains on the batches, quantizes, and builds the bundle at ``out``.

    Raises:
        Usage: a batch that is not carried, or ``out`` is not empty.
    """
    trained = training.train(batches, seed=seed)
    return _build(out, trained, quantization.quantize(trained), version=version, created=created)


def make_crashing_bundle(
    out: Path, *, version: str, batches: tuple[int, ...], live: data.Readings, created: str, seed: int = 0
) -> tuple[Made, sabotage.Trigger]:
    """A bundle whose proof holds and whose ONNX runtime dies on some live rows; its TFLite variant is sound.

    Raises:
        Failed: no column tells live rows from training rows.
    """
    trained = training.train(batches, seed=seed)
    trigger = sabotage.find_trigger(trained, live)
    model = sabotage.plant(quantization.quantize(trained), trigger)
    return _build(out, trained, model, version=version, created=created), trigger


def _build(out: Path, trained: training.Trained, onnx: bytes, *, version: str, created: str) -> Made:
    held_out = trained.held_out
    rows = trained.standardise(held_out.x)
    made = {ONNX: onnx, TFLITE: tflite.quantize(trained)}
    answers = {ONNX: quantization.answer(onnx, rows), TFLITE: tflite.answer(made[TFLITE], rows)}
    accuracy = {name: round(float((given.argmax(axis=1) == held_out.y).mean()), 6) for name, given in answers.items()}
    watched = reference.columns(trained.fitted)
    with tempfile.TemporaryDirectory(prefix="skerry-bundle-") as folder:
        source = Path(folder)
        variants = []
        for runtime, name in VARIANTS.items():
            cases, recall = _golden(held_out, answers[name])
            (source / f"model.{runtime}").write_bytes(made[name])
            (source / f"golden-{runtime}.jsonl").write_text(cases, encoding="utf-8")
            variants.append(_variant(name, runtime, recall))
        spec = _spec(trained, variants, answers[ONNX], watched, version)
        spec["provenance"]["metrics"] |= {f"accuracy {name}": share for name, share in accuracy.items()}
        built = bundle.build_bundle(spec, source=source, out=out, created=created)
    return Made(
        bundle=built,
        trained=trained,
        accuracy=accuracy,
        model_bytes={name: len(model) for name, model in made.items()},
    )


def _variant(name: str, runtime: str, recall: dict[str, float]) -> dict[str, Any]:
    return {
        "id": name,
        "runtime": runtime,
        **_LOWEST[runtime],
        "precision": "int8",
        "model": f"model.{runtime}",
        "files": [f"model.{runtime}", f"golden-{runtime}.jsonl"],
        "golden": {"cases": f"golden-{runtime}.jsonl", "tolerance": {"FP32": _TOLERANCE}, "minimum_recall": recall},
        "needs": {"rss_mb": 64, "disk_mb": 1},
    }


def _golden(held_out: data.Readings, answers: NDArray[np.float32]) -> tuple[str, dict[str, float]]:
    """Cases as JSON lines, and the recall that they must keep. Raw rows in, the quantized model's answers out."""
    predicted = answers.argmax(axis=1)
    lines: list[str] = []
    recall: dict[str, float] = {}
    for k, name in enumerate(held_out.classes):
        rows = np.flatnonzero(held_out.y == k)[:_CASES_PER_GAS]
        if not len(rows):
            continue
        for row in rows:
            lines.append(json.dumps(_case(held_out.x[row], answers[row], name)))
        share = float((predicted[rows] == k).mean())
        recall[name] = round(max(0.0, share - _RECALL_MARGIN), 3)
    return "\n".join(lines) + "\n", recall


def _case(x: NDArray[np.float32], answer: NDArray[np.float32], label: str) -> dict[str, Any]:
    def tensor(name: str, values: NDArray[np.float32]) -> dict[str, Any]:
        return {"name": name, "shape": [1, len(values)], "datatype": "FP32", "data": [float(v) for v in values]}

    return {
        "inputs": [tensor(quantization.INPUT, x)],
        "outputs": [tensor(quantization.OUTPUT, answer)],
        "label": label,
    }


def _spec(
    trained: training.Trained,
    variants: list[dict[str, Any]],
    answers: NDArray[np.float32],
    watched: tuple[reference.Column, ...],
    version: str,
) -> dict[str, Any]:
    readings, output = quantization.INPUT, quantization.OUTPUT
    names = ", ".join(map(str, trained.batches))
    width = trained.fitted.x.shape[1]
    return {
        "model": MODEL,
        "version": version,
        "owner": {"name": "Skerry demo", "contact": "demo@localhost"},
        "licence": "Apache-2.0; trained on data under CC BY 4.0",
        "card": f"Which of six gases 16 metal-oxide sensors smell. Trained on batch {names} of: {data.SOURCE}.",
        "variants": variants,
        "inputs": [{"name": readings, "datatype": "FP32", "shape": [-1, width]}],
        "outputs": [
            {
                "name": output,
                "datatype": "FP32",
                "shape": [-1, answers.shape[1]],
                "labels": list(trained.fitted.classes),
            }
        ],
        "features": reference.features(watched, readings),
        "transforms": {
            "pre": [
                {
                    "op": "scale",
                    "input": readings,
                    "params": {
                        "mean": [float(v) for v in trained.mean],
                        "scale": [float(v) for v in trained.scale],
                    },
                }
            ]
        },
        "reference": reference.reference(trained.held_out, answers, watched, output),
        "slo": {"latency_p95_ms": 1000.0, "success": 0.999},
        "provenance": {
            "trainer": "scikit-learn MLPClassifier (64, 32); int8 by onnxruntime and by ai-edge-quantizer, both static",
            "datasets": {
                f"gas-drift-batches-{'-'.join(map(str, trained.batches))}": data.load(trained.batches).sha256()
            },
            "metrics": {"rows": float(len(trained.fitted)), "held_out_rows": float(len(trained.held_out))},
        },
    }
