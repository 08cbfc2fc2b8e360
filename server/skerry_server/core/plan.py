"""The plan of a rollout: its stages, the gates that every stage must keep, and how it is judged.

A plan is fixed when the rollout is made. Reading one takes builtins (JSON from the API or the database) and names every
fault it finds at once.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from skerry_server.core.judge_plan import Judge, read_judge
from skerry_server.core.reader import Reader

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

    @property
    def compared(self) -> bool:
        """Whether devices stay outside, so that there is something to compare with."""
        return self.share is None or self.share < 1


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
    """See the module.

    Attributes:
        stratified: a stage takes its part of every stratum.
        judge: candidates are compared with controls, beside the gates; None: the gates alone decide.
        repeats: how many of the stages with controls are others begun anew.
    """

    stages: tuple[Stage, ...]
    gates: Gates = Gates()
    stratified: bool = False
    judge: Judge | None = None
    repeats: int = 0

    @property
    def compared(self) -> int:
        """How many stages with controls were planned: a stage begun anew leaves the judge's designs of the others as they were."""
        return sum(stage.compared for stage in self.stages) - self.repeats

    def is_judged(self, stage: int) -> bool:
        """Whether the judge rules on a stage: one that has controls, or, where none has, each."""
        if self.judge is None or stage >= len(self.stages):
            return False
        return self.stages[stage].compared or self.compared == 0

    def to_builtins(self) -> dict[str, Any]:
        """The JSON form, which ``read_plan`` reads."""
        judge = None if self.judge is None else self.judge.to_builtins()
        return asdict(self) | {"stages": [asdict(stage) for stage in self.stages], "judge": judge}


def begun_anew(plan: Plan, stage: int) -> Plan | None:
    """The plan with a stage once more after it; None when it has as many as a plan may have."""
    if len(plan.stages) >= MAX_STAGES:
        return None
    again = plan.stages[stage]
    stages = (*plan.stages[: stage + 1], again, *plan.stages[stage + 1 :])
    return replace(plan, stages=stages, repeats=plan.repeats + again.compared)


def whole_fleet(plan: Plan) -> Plan:
    """The plan of a model's first bundle: there is nothing to keep beside it or compare it with, so one stage holds everyone."""
    last = plan.stages[-1]
    only = Stage(
        share=1.0,
        min_devices=last.min_devices,
        min_inferences=last.min_inferences,
        min_seconds=last.min_seconds,
        max_seconds=last.max_seconds,
    )
    return Plan(stages=(only,), gates=plan.gates, stratified=plan.stratified)


def read_plan(value: object) -> Plan:
    """Reads and checks a plan.

    Raises:
        BadPlan: with every fault found.
    """
    faults: list[str] = []
    reader = Reader(value, "plan", faults)
    raw_stages = reader.value.pop("stages", None)
    gates = _read_gates(reader.value.pop("gates", {}), faults)
    stratified = reader.flag("stratified")
    repeats = reader.count("repeats", 0, 0, MAX_STAGES) or 0
    raw_judge = reader.value.pop("judge", None)
    judge = None if raw_judge is None else read_judge(raw_judge, faults)
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
        if judge is not None and not judge.small_fleet and not any(stage.compared for stage in stages):
            faults.append(
                "plan.judge: every stage holds everyone, so there is nothing to compare with; set small_fleet"
            )
    if faults:
        raise BadPlan(faults)
    return Plan(stages=stages, gates=gates, stratified=stratified, judge=judge, repeats=repeats)


def read_new_plan(value: object) -> Plan:
    """As ``read_plan``, and refuses a judge that could never see or never pass. Plans that were stored before are read without this.

    Raises:
        BadPlan: with every fault found.
    """
    plan = read_plan(value)
    faults = _hopeless(plan)
    if faults:
        raise BadPlan(faults)
    return plan


def _hopeless(plan: Plan) -> list[str]:
    judge = plan.judge
    faults: list[str] = []
    if judge is None:
        return faults
    for i, stage in enumerate(plan.stages):
        where = f"plan.stages[{i}]"
        if stage.compared and stage.devices is not None and stage.devices < judge.min_devices:
            faults.append(
                f"{where}.devices: the judge compares no fewer than {judge.min_devices} candidates, and would say NO_DATA for ever; "
                f"got {stage.devices}. Take more, or a smaller plan.judge.min_devices"
            )
        if plan.is_judged(i) and judge.end_s is not None and judge.end_s >= stage.max_seconds:
            faults.append(
                f"plan.judge.end_s: wanted less than {where}.max_seconds ({stage.max_seconds:g}), got {judge.end_s:g}: the deadline "
                "would pause each such stage before it could pass"
            )
    return faults


def _read_stage(raw: object, where: str, faults: list[str]) -> Stage:
    reader = Reader(raw, where, faults)
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
    reader = Reader(raw, "plan.gates", faults)
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
