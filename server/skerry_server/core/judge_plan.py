"""The part of a plan that says how a rollout is judged, and the design of one of its stages.

Alpha is given per rollout and divided evenly over the stages in which arms can be compared, so that a longer plan is not sent back by
chance more often. A stage of everyone has no controls: only the absolute gates hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from skerry_server.core.judge_values import Design, Guardrail, Kind, Unit
from skerry_server.core.reader import Reader

KINDS: dict[str, Kind] = {
    "labelled_errors": "rate",
    "failures": "rate",
    "latency_p95": "level",
    "trouble": "incidence",
}
"""Wrong answers among labelled ones; failed and shed requests among all; p95 in milliseconds; devices that went back, crashed or fell silent."""

MOST_ALPHA = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Rail:
    """One guardrail of a plan. ``alpha`` is for the whole rollout; the rest as in ``judge_values.Guardrail``.

    ``limit`` None: labelled errors are held to the validated figure, failures and p95 to the plan's gates, where there are such.
    ``past``: whether each device is held against its own past. Without it devices are compared as they are now: for a stage that
    begins just after the world moved, when the pasts of devices come from different worlds. ``negligible`` is for rates only.
    """

    name: str
    alpha: float
    margin: float
    limit: float | None = None
    min_n: int = 0
    past: bool = True
    negligible: float = 0.0


DEFAULTS = (
    Rail(name="labelled_errors", alpha=0.02, margin=1.5, min_n=100, negligible=0.001),
    Rail(name="failures", alpha=0.01, margin=2.0, min_n=100, negligible=0.001),
    Rail(name="latency_p95", alpha=0.005, margin=1.25, min_n=100),
    Rail(name="trouble", alpha=0.005, margin=0.2),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """How a rollout is judged.

    Attributes:
        look_s: seconds between looks.
        end_s, end_labels: the planned end of each stage: seconds after its start, or labels on candidates. At most one is set;
            without either a stage can fail and never pass.
        half_s: without a planned end, after so many seconds half of alpha is spent.
        min_devices: devices with data that each arm must have.
        guard_s: windows that begin so soon after a device's entry into a stage are not compared.
        silent_s: a device not heard of for so long is in trouble.
        small_fleet: a stage may pass although its fleet was too small to compare.
    """

    guardrails: tuple[Rail, ...] = DEFAULTS
    look_s: float = 60.0
    end_s: float | None = None
    end_labels: int | None = None
    half_s: float = 86_400.0
    min_devices: int = 2
    guard_s: float = 30.0
    silent_s: float = 300.0
    small_fleet: bool = False

    @property
    def planned(self) -> bool:
        """Whether stages have a planned end."""
        return self.end_s is not None or self.end_labels is not None

    def information(self, elapsed_s: float, labels: int) -> float:
        """How far a stage is: 1 at its planned end.

        Args:
            elapsed_s: since it started.
            labels: on candidates, so far.
        """
        if self.end_labels is not None:
            return labels / self.end_labels
        return elapsed_s / (self.end_s if self.end_s is not None else self.half_s)

    def to_builtins(self) -> dict[str, Any]:
        """The JSON form, which ``read_judge`` reads."""
        rails = {rail.name: asdict(rail) for rail in self.guardrails}
        for name, rail in rails.items():
            del rail["name"]
            if KINDS[name] != "rate":
                del rail["negligible"]
        return asdict(self) | {"guardrails": rails}


def read_judge(raw: object, faults: list[str]) -> Judge:
    """Reads the section; what is wrong is added to ``faults``."""
    reader = Reader(raw, "plan.judge", faults)
    rails = _read_rails(reader.value.pop("guardrails", None), faults)
    judge = Judge(
        guardrails=rails,
        look_s=reader.number("look_s", 60.0, 0.1, 86_400) or 60.0,
        end_s=reader.number("end_s", None, 1, 365 * 86_400),
        end_labels=reader.count("end_labels", None, 1, 10**12),
        half_s=reader.number("half_s", 86_400.0, 1, 365 * 86_400) or 86_400.0,
        min_devices=reader.count("min_devices", 2, 1, 10_000_000) or 2,
        guard_s=reader.number("guard_s", 30.0, 0, 86_400) or 0.0,
        silent_s=reader.number("silent_s", 300.0, 1, 365 * 86_400) or 300.0,
        small_fleet=reader.flag("small_fleet"),
    )
    reader.end()
    if judge.end_s is not None and judge.end_labels is not None:
        faults.append("plan.judge: wanted at most one of end_s and end_labels")
    if sum(rail.alpha for rail in rails) > MOST_ALPHA + 1e-12:
        faults.append(f"plan.judge.guardrails: alpha adds up to more than {MOST_ALPHA:g}")
    return judge


def _read_rails(raw: object, faults: list[str]) -> tuple[Rail, ...]:
    if raw is None:
        return DEFAULTS
    where = "plan.judge.guardrails"
    if not isinstance(raw, dict) or not raw:
        faults.append(f"{where}: wanted an object with at least one of {', '.join(KINDS)}")
        return DEFAULTS
    usual = {rail.name: rail for rail in DEFAULTS}
    found = []
    for name, value in raw.items():
        if name not in KINDS:
            faults.append(f"{where}.{name}: no such guardrail; there are {', '.join(KINDS)}")
            continue
        reader, of = Reader(value, f"{where}.{name}", faults), usual[name]
        incidence = KINDS[name] == "incidence"
        rail = Rail(
            name=name,
            alpha=reader.number("alpha", of.alpha, 1e-6, MOST_ALPHA) or of.alpha,
            margin=reader.number("margin", of.margin, 0 if incidence else 1.001, 1 if incidence else 100) or 0.0,
            limit=reader.number("limit", None, 0, 1 if KINDS[name] != "level" else 3_600_000),
            min_n=reader.count("min_n", of.min_n, 0, 10**12) or 0,
            past=reader.flag("past", of.past),
            negligible=(reader.number("negligible", of.negligible, 0, 0.1) or 0.0) if KINDS[name] == "rate" else 0.0,
        )
        reader.end()
        found.append(rail)
    return tuple(found) or DEFAULTS


def design_of(
    judge: Judge, *, rollout: str, stage: int, compared: int, units: Sequence[Unit], limits: dict[str, float]
) -> Design:
    """The design of one stage.

    Args:
        compared: how many stages of the plan have controls, this one included.
        limits: absolute limits by guardrail, for those of which the plan sets none.
    """
    return Design(
        rollout=rollout,
        stage=stage,
        units=tuple(units),
        guardrails=tuple(
            Guardrail(
                name=rail.name,
                kind=KINDS[rail.name],
                alpha=rail.alpha / compared,
                margin=rail.margin,
                limit=rail.limit if rail.limit is not None else limits.get(rail.name),
                min_n=rail.min_n,
                negligible=rail.negligible,
            )
            for rail in judge.guardrails
        ),
        planned=judge.planned,
        min_devices=judge.min_devices,
    )
