"""What counting costs: one in-process inference with guard, timing, record and its share of the folds, against bare
``session.run`` of the same file with the same input, in alternating blocks."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from skerry_agent.worker.plan import plan_of
from skerry_agent.worker.recorder import Recorder
from skerry_contract import window as w
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load

from tests import models
from tests.bench.result import Result, median, percentile

FEATURES, CLASSES = 30, 6
BLOCK, ROUNDS = 4096, 25


def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        plain = _measure(Path(folder) / "plain", transforms=False)
        stepped = _measure(Path(folder) / "stepped", transforms=True)
    return Result(
        bench="infer_overhead",
        value=plain["added"],
        unit="us",
        peer="bare onnxruntime session.run",
        peer_value=plain["bare"],
        n=BLOCK * ROUNDS,
        note=(
            f"added mean incl. fold (CPU time), {FEATURES}-feature MLP; wall p50 +{plain['p50']:.2f} p99 +{plain['p99']:.2f}; "
            f"with transforms (scale, labels) mean +{stepped['added']:.2f} p50 +{stepped['p50']:.2f} "
            f"p99 +{stepped['p99']:.2f}; budget 3 without, 6 with transforms"
        ),
    )


def _measure(folder: Path, *, transforms: bool) -> dict[str, float]:
    digest = models.build_bundle(folder, n_features=FEATURES, classes=CLASSES, n_golden=CLASSES, transforms=transforms)
    bundle = open_bundle(folder, digest=digest)
    variant = bundle.manifest.variants[0]
    infer = load(bundle, variant).infer
    key = w.Key("gas", digest, variant.id, "none", "", 0)
    recorder = Recorder(
        key,
        plan_of(bundle.manifest),
        ring=str(folder / "ring"),
        boot_id="0" * 32,
        send=lambda cut: recorder.committed(cut.ring, cut.upto),
        later=lambda act: act(),
        predictions=65536,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(folder / variant.model), options, providers=["CPUExecutionProvider"])
    rows, _ = models.rows(64, FEATURES, CLASSES)
    raw = [np.ascontiguousarray((10 * r + 5 if transforms else r)[None], np.float32) for r in rows]
    bare_inputs = [{"x": np.ascontiguousarray(r[None])} for r in rows]
    inputs = [{"x": r} for r in raw]
    monotonic_ns = time.monotonic_ns

    def bare(feeds: dict[str, Any]) -> None:
        session.run(["probabilities"], feeds)

    def counted(feeds: dict[str, Any]) -> None:
        start = monotonic_ns()
        result = infer(feeds)
        now = monotonic_ns()
        recorder.ok(feeds, result.outputs, 1, now - start, 0, result.transform_ns, result.infer_ns, now)

    for act, feeds in ((bare, bare_inputs), (counted, inputs)):
        block(act, feeds)
    differences, bare_means, bare_each, counted_each = [], [], [], []
    for _ in range(ROUNDS):
        a, b = block(bare, bare_inputs), block(counted, inputs)
        differences.append(b - a)
        bare_means.append(a)
        bare_each += each_us(bare, bare_inputs)
        counted_each += each_us(counted, inputs)
    return {
        "added": median(differences),
        "bare": median(bare_means),
        "p50": percentile(counted_each, 0.5) - percentile(bare_each, 0.5),
        "p99": percentile(counted_each, 0.99) - percentile(bare_each, 0.99),
    }


def block(act: Any, feeds: list[dict[str, Any]]) -> float:
    """Mean microseconds of this thread's CPU per call over one block, the loop's own cost included in both.

    CPU time and not the wall's: nothing here waits, and a busy machine would otherwise be counted in.
    """
    begin = time.thread_time_ns()
    for _ in range(BLOCK // len(feeds)):
        for one in feeds:
            act(one)
    return (time.thread_time_ns() - begin) / BLOCK / 1e3


def each_us(act: Any, feeds: list[dict[str, Any]]) -> list[float]:
    """Microseconds of the wall of each call of a quarter of a block."""
    found = []
    clock = time.perf_counter_ns
    for _ in range(BLOCK // 4 // len(feeds)):
        for one in feeds:
            begin = clock()
            act(one)
            found.append((clock() - begin) / 1e3)
    return found
