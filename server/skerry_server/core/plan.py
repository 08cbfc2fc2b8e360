"""The plan of a rollout: its stages, and the gates that every stage must keep.

A plan is fixed when the rollout is made. Reading one takes builtins (JSON from the API or the database) and names every
fault it finds at once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

MAX_STAGES = 20
Proof = Literal["trial", "golden"]


class BadPlan(ValueError):
    """The plan cannot be used. ``faults`` says where and what was expected, one each."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(faults))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        devices, share: exactly one is set: how many devices in all are candidates, or which part of the eligible ones, 0 to 1.
        min_devices: candidates that must be online and confirmed; None: every able candidate that is online or went offline since
            the stage began, at least one.
        min_inferences: requests that candidates must have answered in this stage, well or not.
        min_seconds: shortest stay.
        max_seconds: a stage that has not passed by then pauses the rollout.
    """

    devices: int | None = None
    share: float | None = None
    min_devices: int | None = None
    min_inferences: int = 0
    min_seconds: float = 0.0
    max_seconds: float = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """What a candidate must keep in every stage; None: not watched.

    Attributes:
        max_error_rate: share of requests that failed or were shed, among those answered, failed or shed.
        latency_p95_ms: on the device, from the request read to the reply made.
        max_invalid_rate: share of requests refused as invalid, among all.
        max_reverts: candidates that may go back or refuse before the rollout fails.
        require: ``trial``: a device counts as confirmed after a trial with enough traffic; ``golden``: the golden proof will do.
    """

    max_error_rate: float | None = 0.05
    latency_p95_ms: float | None = None
    max_invalid_rate: float | None = None
    max_reverts: int = 0
    require: Proof = "trial"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """See the module. ``stratified``: a stage takes its part of every stratum."""

    stages: tuple[Stage, ...]
    gates: Gates = Gates()
    stratified: bool = False

    def to_builtins(self) -> dict[str, Any]:
        """The JSON form, which ``read_plan`` reads."""
        return asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}


def whole_fleet(plan: Plan) -> Plan:
    """The plan of a model's first bundle: there is nothing to keep beside it, so one stage holds everyone."""
    last = plan.stages[-1]
    only = Stage(
        share=1.0,
        min_devices=last.min_devices,
        min_inferences=last.min_inferences,
        min_seconds=last.min_seconds,
        max_seconds=last.max_seconds,
    )
    return Plan(stages=(only,), gates=plan.gates, stratified=plan.stratified)


class _Reader:
    """Takes fields from a map and remembers what was wrong."""

    def __init__(self, value: object, where: str, faults: list[str]) -> None:
        self.where = where
        self.faults = faults
        self.value: dict[str, Any] = {}
        if isinstance(value, dict):
            self.value = dict(value)
        else:
            faults.append(f"{where}: wanted an object, got {type(value).__name__}")

    def number(self, name: str, default: float | None, low: float, high: float, *, whole: bool = False) -> float | None:
        value = self.value.pop(name, default)
        if value is None and default is None:
            return None
        fits = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and low <= value <= high
            and math.isfinite(value)
        )
        if not fits or (whole and not float(value).is_integer()):
            kind = "a whole number" if whole else "a number"
            self.faults.append(f"{self.where}.{name}: wanted {kind} from {low:g} to {high:g}, got {value!r}")
            return default
        return float(value)

    def count(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.number(name, default, low, high, whole=True)
        return None if value is None else int(value)

    def end(self) -> None:
        for name in sorted(map(str, self.value)):
            self.faults.append(f"{self.where}.{name}: no such field")


def read_plan(value: object) -> Plan:
    """Reads and checks a plan.

    Raises:
        BadPlan: with every fault found.
    """
    faults: list[str] = []
    reader = _Reader(value, "plan", faults)
    raw_stages = reader.value.pop("stages", None)
    gates = _read_gates(reader.value.pop("gates", {}), faults)
    stratified = reader.value.pop("stratified", False)
    if not isinstance(stratified, bool):
        faults.append(f"plan.stratified: wanted true or false, got {stratified!r}")
    reader.end()
    stages: tuple[Stage, ...] = ()
    if not isinstance(raw_stages, list | tuple) or not 1 <= len(raw_stages) <= MAX_STAGES:
        faults.append(f"plan.stages: wanted a list of 1 to {MAX_STAGES} stages")
    else:
        stages = tuple(_read_stage(raw, f"plan.stages[{i}]", faults) for i, raw in enumerate(raw_stages))
        for i, (a, b) in enumerate(itertools.pairwise(stages), 1):
            same_kind = (a.devices is None) == (b.devices is None)
            if same_kind and (b.devices or b.share or 0) < (a.devices or a.share or 0):
                faults.append(f"plan.stages[{i}]: a stage must not be smaller than the one before")
    if faults:
        raise BadPlan(faults)
    return Plan(stages=stages, gates=gates, stratified=bool(stratified))


def _read_stage(raw: object, where: str, faults: list[str]) -> Stage:
    reader = _Reader(raw, where, faults)
    before = len(faults)
    stage = Stage(
        devices=reader.count("devices", None, 1, 10_000_000),
        share=reader.number("share", None, 0, 1),
        min_devices=reader.count("min_devices", None, 1, 10_000_000),
        min_inferences=reader.count("min_inferences", 0, 0, 10**12) or 0,
        min_seconds=reader.number("min_seconds", 0.0, 0, 365 * 86_400) or 0.0,
        max_seconds=reader.number("max_seconds", 86_400.0, 1, 365 * 86_400) or 86_400.0,
    )
    reader.end()
    if len(faults) > before:
        return stage
    if (stage.devices is None) == (stage.share is None) or stage.share == 0:
        faults.append(f"{where}: wanted exactly one of devices and share, above 0")
    if stage.devices is not None and stage.min_devices is not None and stage.min_devices > stage.devices:
        faults.append(f"{where}.min_devices: wanted at most devices ({stage.devices}), got {stage.min_devices}")
    if stage.max_seconds < stage.min_seconds:
        faults.append(
            f"{where}.max_seconds: wanted at least min_seconds ({stage.min_seconds:g}), got {stage.max_seconds:g}"
        )
    return stage


def _read_gates(raw: object, faults: list[str]) -> Gates:
    reader = _Reader(raw, "plan.gates", faults)
    require = reader.value.pop("require", "trial")
    if require not in ("trial", "golden"):
        faults.append(f"plan.gates.require: wanted trial or golden, got {require!r}")
        require = "trial"
    # An explicit null switches the error gate off; a missing field keeps the default.
    unwatched = "max_error_rate" in reader.value and reader.value["max_error_rate"] is None
    if unwatched:
        del reader.value["max_error_rate"]
    gates = Gates(
        max_error_rate=None if unwatched else reader.number("max_error_rate", 0.05, 0, 1),
        latency_p95_ms=reader.number("latency_p95_ms", None, 0.001, 3_600_000),
        max_invalid_rate=reader.number("max_invalid_rate", None, 0, 1),
        max_reverts=reader.count("max_reverts", 0, 0, 10_000_000) or 0,
        require=require,
    )
    reader.end()
    return gates
