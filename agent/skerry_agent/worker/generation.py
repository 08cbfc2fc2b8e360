"""Loading and proving the models of one generation.

Each bundle is opened with every hash checked again (flash rots, and a slot may be months old), loaded, proved on its golden
cases, and timed. The first model that fails fails the generation, with a code of the update vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from skerry_contract import window as w
from skerry_runtime import proof
from skerry_runtime.acceleration import CPU, Acceleration
from skerry_runtime.bundle import open_bundle
from skerry_runtime.errors import BundleFault
from skerry_runtime.runner import Runner, load
from skerry_runtime.tensors import Tensors

from skerry_agent import workerwire as ww
from skerry_agent.worker.calls import link_fallbacks
from skerry_agent.worker.model import Model
from skerry_agent.worker.notes import noted
from skerry_agent.worker.plan import plan_of
from skerry_agent.worker.recorder import Recorder

TIMED_RUNS = 9
TIMED_S = 0.2

# Codes of the runtime that the update vocabulary does not have.
_CODES = {
    "file_missing": "model_damaged",
    "file_unlisted": "model_damaged",
    "not_a_file": "model_damaged",
    "transform_invalid": "malformed_manifest",
    "out_of_memory": "not_enough_memory",
    "model_failed": "runtime_crashed",
    "transform_failed": "golden_failed",
}


class CannotServe(Exception):
    """A model cannot be loaded or proved. ``code`` is of the update vocabulary."""

    def __init__(self, model: str, code: str, detail: str) -> None:
        self.model = model
        self.code = code
        self.detail = detail
        super().__init__(f"{model}: {code}: {detail}")


def load_generation(
    start: ww.Start,
    *,
    send: Callable[[ww.Message], None],
    later: Callable[[Callable[[], None]], object],
    note: int | None = None,
) -> tuple[dict[str, Model], tuple[ww.Proved, ...]]:
    """Loads and proves every model, and makes their rings.

    Args:
        note: descriptor of shared memory in which to say which model is in work.

    Raises:
        CannotServe: for the first model that fails.
    """
    acceleration = msgspec.convert(start.acceleration, Acceleration)
    models: dict[str, Model] = {}
    proved: list[ww.Proved] = []
    for served in start.models:
        began = time.monotonic()
        send(ww.Loading(model=served.name))
        try:
            runner, found, infer_us = load_and_prove(served, acceleration)
            manifest = runner.bundle.manifest
            recorder = Recorder(
                key_of(served, arm=served.arm, rollout=served.rollout, stage=served.stage),
                plan_of(manifest),
                ring=served.ring,
                boot_id=start.boot_id,
                send=send,
                later=later,
                predictions=start.label_predictions if start.label_age_s > 0 else 0,
            )
        except (BundleFault, MemoryError, OSError) as error:
            raise CannotServe(served.name, *code_of(error)) from error
        models[served.name] = Model(
            served.name, served.version, manifest, runner, recorder, infer_us=infer_us, fell_back=bool(runner.fallback)
        )
        proved.append(
            ww.Proved(
                name=served.name,
                proof=ww.Proof(
                    cases=found.cases, passed=found.passed, max_abs_diff=found.max_abs_diff, recall=found.recall
                ),
                load_ms=(time.monotonic() - began) * 1e3,
                infer_us=infer_us,
                runs_on=runner.engine.runs_on,
                fallback=runner.fallback,
            )
        )
    if note is not None:
        noted(models, note)
    link_fallbacks(models)
    return models, tuple(proved)


def code_of(error: Exception) -> tuple[str, str]:
    """Why a model cannot be loaded or proved: (code of the update vocabulary, detail)."""
    match error:
        case CannotServe():
            return error.code, error.detail
        case BundleFault():
            return _CODES.get(error.code, error.code), error.detail
        case MemoryError():
            return "not_enough_memory", "loading the model"
    return "runtime_crashed", f"{type(error).__name__}: {error}"


def key_of(served: ww.Served, *, arm: str, rollout: str, stage: int) -> w.Key:
    """The window key of a served model."""
    return w.Key(served.name, served.digest, served.variant, arm, rollout, stage)


def load_and_prove(served: ww.Served, acceleration: Acceleration = CPU) -> tuple[Runner, proof.Proof, float]:
    """One model, its proof, and the median time of a golden case, microseconds.

    Raises:
        CannotServe, BundleFault, MemoryError, OSError: see ``code_of``.
    """
    bundle = open_bundle(served.path, digest=served.digest, variants=[served.variant])
    if (bundle.manifest.model, bundle.manifest.version) != (served.name, served.version):
        raise CannotServe(
            served.name,
            "malformed_manifest",
            f"wanted {served.name} {served.version}, it is {bundle.manifest.model} {bundle.manifest.version}",
        )
    runner = load(bundle, served.variant, acceleration=acceleration)
    found = proof.prove(runner)
    if not found.ok and runner.engine.runs_on != ("cpu",):
        # An accelerator that answers otherwise is none for this model; whether the model is sound, the CPU tells.
        why = f"{', '.join(runner.engine.runs_on)} fails the golden cases: {found.detail}"
        runner = load(bundle, served.variant, acceleration=acceleration.on_cpu())
        runner.fallback = why
        found = proof.prove(runner)
    if not found.ok:
        raise CannotServe(served.name, "golden_failed", found.detail)
    return runner, found, _median_us(runner, proof.read_cases(bundle, runner.variant)[0].inputs)


def _median_us(runner: Runner, inputs: Tensors) -> float:
    times: list[int] = []
    infer = runner.steady()
    end = time.monotonic() + TIMED_S
    while len(times) < TIMED_RUNS and (not times or time.monotonic() < end):
        before = time.perf_counter_ns()
        infer(inputs)
        times.append(time.perf_counter_ns() - before)
    # Not statistics.median: its module and what that imports would be the worker's for life, for one number.
    return sorted(times)[len(times) // 2] / 1e3
