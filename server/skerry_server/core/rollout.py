"""What a rollout does next: a pure function of its state, its plan, recorded evidence and the time.

States: ``draft -> running <-> paused -> completing -> completed``, ``-> rolling_back -> rolled_back``, ``-> aborted``. A rollout
moves only on a verdict, a person's command or a deadline, and a deadline only pauses it. ``TRANSITIONS`` is the table.

Verdicts rest on absolute gates here: devices confirmed, inferences, error rate, p95, devices that went back. A stage is

* FAIL when a gate is broken by so much that nothing still to come within the minimum could mend it;
* PASS when every minimum is met, every gate kept and no candidate that must answer has fallen silent;
* INCONCLUSIVE while candidates that fell silent keep it from passing, and while the stage has not lasted long enough;
* NO_DATA while a minimum is not met for any other reason. Neither is ever a pass, however long it lasts.

An offline device does not count as confirmed. One that went offline before the stage began does not hold the stage up: it takes
the bundle when it returns. One that went offline **since** the stage began does, since the candidate may have killed it: its
silence is no evidence for the candidate. Where a plan names ``min_devices``, that number decides how many may be lost.

Completing is a stage of everyone with the last stage's minimums, counted anew: a fleet that falls silent in it does not pass.

Where the plan has a ``judge`` and the stage has controls, the judge's ruling on them is needed beside the gates (``core.judge``): its FAIL
fails the stage, and only its PASS lets the stage go.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from skerry_server.core.judge_values import Ruling
from skerry_server.core.plan import Gates, Plan, Stage

State = Literal["draft", "running", "paused", "completing", "completed", "rolling_back", "rolled_back", "aborted"]
Action = Literal[
    "start", "advance", "hold", "pause", "resume", "complete", "finish", "abort", "roll_back", "rolled_back"
]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "NO_DATA", ""]

TRANSITIONS: dict[tuple[State, Action], State] = {
    ("draft", "start"): "running",
    ("draft", "abort"): "aborted",
    ("running", "advance"): "running",
    ("running", "pause"): "paused",
    ("running", "complete"): "completing",
    ("running", "roll_back"): "rolling_back",
    ("running", "abort"): "aborted",
    ("paused", "resume"): "running",
    ("paused", "complete"): "completing",
    ("paused", "roll_back"): "rolling_back",
    ("paused", "abort"): "aborted",
    ("completing", "pause"): "paused",
    ("completing", "finish"): "completed",
    ("completing", "roll_back"): "rolling_back",
    ("completing", "abort"): "aborted",
    ("rolling_back", "rolled_back"): "rolled_back",
    ("rolling_back", "abort"): "aborted",
}
ACTIVE: frozenset[State] = frozenset({"draft", "running", "paused", "completing", "rolling_back"})
"""States in which a model of a group is taken: a second rollout of it must wait."""
OFFERING: frozenset[State] = frozenset({"running", "paused", "completing"})
"""States in which the group document names the candidate."""

COMMANDS: dict[Action, str] = {"abort": "abort", "pause": "pause", "resume": "resume", "roll_back": "roll back"}
"""What a person can ask for, in words; the other actions follow from evidence."""

SMALLEST_SAMPLE = 20
"""Rates and quantiles of fewer requests than this break no gate."""


class NotAllowed(Exception):
    """The table has no such transition. Names the state and what a person can ask for in it."""

    def __init__(self, state: State, action: Action, *, first: bool = False) -> None:
        self.state, self.action = state, action
        possible = [words for name, words in COMMANDS.items() if (state, name) in TRANSITIONS]
        if first and COMMANDS["roll_back"] in possible:
            possible.remove(COMMANDS["roll_back"])
        asked = COMMANDS.get(action, action)
        super().__init__(f"a rollout that is {state} cannot {asked}; it can {', '.join(possible) or 'do nothing more'}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What ``decide`` needs to know of a rollout.

    Attributes:
        stage: number of the stage now running, from 0; ``len(plan.stages)`` while completing.
        stage_since_ms: when that stage began or was resumed; its deadline counts from here.
        first: the model had no stable bundle before, so there is nothing to go back to.
    """

    id: str
    state: State
    stage: int
    stage_since_ms: int
    plan: Plan
    first: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is recorded of the stage now running. Counts of requests are of the candidate arm, in this stage only.

    Attributes:
        candidates: devices of the group below the cut; online: of them, connected now.
        silent: candidates that went offline since the stage began, and have not said that they are unable; silent_ids: the
            first of them by name, for people.
        confirmed: candidates online, heard of since the stage and the server's last session began, that answer with the
            candidate after a full trial; on_golden: on their golden proof alone.
        unheard: candidates online that were not heard of since then, whatever they said before.
        on_trial: candidates online whose trial runs.
        unable: candidates online that reported that they cannot run it (no variant, too little memory, ...).
        reverted: reason code -> candidates that went back or refused the bundle.
        disbelieved: devices that are no candidates and say that they went back from it or refused it: decides nothing.
        still: devices online that answer with the candidate, of all arms; rolling back ends at 0.
        p95_ms: None without any latency recorded.
    """

    candidates: int = 0
    online: int = 0
    silent: int = 0
    silent_ids: tuple[str, ...] = ()
    confirmed: int = 0
    on_golden: int = 0
    unheard: int = 0
    on_trial: int = 0
    unable: int = 0
    reverted: dict[str, int] = field(default_factory=dict)
    still: int = 0
    disbelieved: int = 0
    ok: int = 0
    invalid: int = 0
    failed: int = 0
    shed: int = 0
    p95_ms: float | None = None

    @property
    def inferences(self) -> int:
        """Requests that were answered, failed or were shed."""
        return self.ok + self.failed + self.shed

    def to_builtins(self) -> dict[str, Any]:
        """JSON form, kept with the decision."""
        found = {name: getattr(self, name) for name in self.__slots__}
        lists = {"reverted": dict(self.reverted), "silent_ids": list(self.silent_ids)}
        return {**found, **lists, "inferences": self.inferences}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do and why.

    Attributes:
        missing: what a stage still lacks, by name; a hold is worth recording again only when this or the verdict changes.
    """

    action: Action
    verdict: Verdict
    reason: str
    evidence: dict[str, Any]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The verdict on one stage."""

    verdict: Verdict
    reason: str
    missing: tuple[str, ...] = ()


def transition(state: State, action: Action, *, first: bool = False) -> State:
    """The state after the action.

    Args:
        first: the rollout brings the model's first bundle, so that a person cannot ask to roll back.

    Raises:
        NotAllowed: when the table has none.
    """
    if action == "hold":
        return state
    try:
        return TRANSITIONS[state, action]
    except KeyError:
        raise NotAllowed(state, action, first=first) from None


def broken_gate(gates: Gates, minimum: int, evidence: Evidence) -> str | None:
    """Why the candidate fails, or None. ``minimum`` is the stage's least number of inferences.

    Errors fail early when even a faultless rest of the minimum could not bring the rate back to its gate. The minimum is
    taken as ``SMALLEST_SAMPLE`` at least, so that one failed request out of one does not send a fleet back.
    """
    minimum = max(minimum, SMALLEST_SAMPLE)
    reverts = sum(evidence.reverted.values())
    if reverts > gates.max_reverts:
        codes = ", ".join(f"{code} on {n}" for code, n in sorted(evidence.reverted.items()))
        return f"{_devices(reverts)} went back or refused ({codes}); {gates.max_reverts} may"
    bad, n = evidence.failed + evidence.shed, evidence.inferences
    if gates.max_error_rate is not None and bad > gates.max_error_rate * max(n, minimum):
        return (
            f"{bad} of {n} requests failed ({_percent(bad, n)}; {evidence.failed} failed, {evidence.shed} shed), "
            f"the gate is {gates.max_error_rate:.2%}"
        )
    asked = n + evidence.invalid
    if gates.max_invalid_rate is not None and evidence.invalid > gates.max_invalid_rate * max(asked, minimum):
        return (
            f"{evidence.invalid} of {asked} requests were refused as invalid ({_percent(evidence.invalid, asked)}), "
            f"the gate is {gates.max_invalid_rate:.2%}"
        )
    p95, limit = evidence.p95_ms, gates.latency_p95_ms
    if limit is not None and p95 is not None and n >= minimum and p95 > limit:
        return f"p95 of {n} requests is {p95:.2f} ms, the gate is {limit:.2f} ms"
    return None


def judge_stage(
    stage: Stage, gates: Gates, evidence: Evidence, elapsed_s: float, *, completing: bool = False
) -> Finding:
    """The verdict on a stage that has run for ``elapsed_s`` seconds.

    Args:
        completing: every able candidate online must be confirmed, however few ``min_devices`` asks for.
    """
    broken = broken_gate(gates, stage.min_inferences, evidence)
    if broken is not None:
        return Finding(verdict="FAIL", reason=broken)
    proven = evidence.confirmed + (evidence.on_golden if gates.require == "golden" else 0)
    able = max(1, evidence.online - evidence.unable)
    if stage.min_devices is None:
        wanted = max(1, evidence.online - evidence.unable + evidence.silent)
    else:
        wanted = max(stage.min_devices, able) if completing else stage.min_devices
    silenced = evidence.silent > 0 and proven < wanted
    lacking: dict[str, str] = {}
    if silenced:
        lacking["silent"] = _fell_silent(evidence)
    if proven < (able if silenced and stage.min_devices is None else wanted):
        apart = ""
        if evidence.on_golden and gates.require == "trial":
            apart = f", {evidence.on_golden} more on their golden proof alone"
        lacking["devices"] = (
            f"{proven} of {wanted} devices confirmed{apart} ({evidence.candidates} candidates, {evidence.online} online, "
            f"{evidence.on_trial} on trial, {evidence.unable} unable, {evidence.unheard} not heard of since the stage began)"
        )
    if evidence.inferences < stage.min_inferences:
        lacking["inferences"] = f"{evidence.inferences} of {stage.min_inferences} inferences"
    if gates.latency_p95_ms is not None and evidence.p95_ms is None:
        lacking["latency"] = "no latency recorded yet"
    if lacking:
        verdict: Verdict = "INCONCLUSIVE" if silenced else "NO_DATA"
        return Finding(verdict=verdict, reason="; ".join(lacking.values()), missing=tuple(lacking))
    if elapsed_s < stage.min_seconds:
        reason = f"the stage lasts at least {stage.min_seconds:g} s, {elapsed_s:.1f} s have passed"
        return Finding(verdict="INCONCLUSIVE", reason=reason, missing=("seconds",))
    return Finding(verdict="PASS", reason=_kept(gates, evidence, proven, wanted))


def with_ruling(finding: Finding, ruling: Ruling | None, *, small_fleet: bool, fault: str = "") -> Finding:
    """The gates' finding and the judge's ruling together: both must let the stage go.

    Args:
        small_fleet: a ruling that could not compare may pass.
        fault: why the judge could not look; empty when it could.
    """
    if finding.verdict == "FAIL":
        return finding
    if fault:
        reason = f"the judge could not look ({fault}), only gates and deadline hold; {finding.reason}"
        return Finding(verdict="NO_DATA", reason=reason, missing=(*finding.missing, "judge"))
    if ruling is None:
        reason = f"the judge has not looked yet; {finding.reason}"
        return Finding(verdict="NO_DATA", reason=reason, missing=(*finding.missing, "look"))
    said = "; ".join(found.reason for found in ruling.findings if found.verdict == ruling.verdict)
    if ruling.verdict == "FAIL":
        return Finding(verdict="FAIL", reason=said)
    if ruling.verdict == "PASS" and ruling.uncontrolled and not small_fleet:
        reason = f"{said}; without a comparison a stage passes only in a rollout started with --small-fleet"
        return Finding(verdict="INCONCLUSIVE", reason=reason, missing=(*finding.missing, "small_fleet"))
    reason = f"{said}; {finding.reason}"
    if ruling.verdict == "PASS":
        return Finding(verdict=finding.verdict, reason=reason, missing=finding.missing)
    verdict: Verdict = "NO_DATA" if "NO_DATA" in (finding.verdict, ruling.verdict) else "INCONCLUSIVE"
    return Finding(verdict=verdict, reason=reason, missing=(*finding.missing, *ruling.missing))


def decide(
    rollout: Rollout, evidence: Evidence, now_ms: int, ruling: Ruling | None = None, *, fault: str = ""
) -> Decision:
    """The next move of a rollout, with its reason. Pure: the same values give the same decision.

    Args:
        now_ms: the server's clock, milliseconds since 1970, as ``stage_since_ms``.
        ruling: the judge's last on the stage now running.
        fault: why the judge could not look: then nothing passes, and gates and deadline work as ever.
    """
    record = evidence.to_builtins()
    if ruling is not None:
        record["look"] = {"number": ruling.look, "information": ruling.information, "verdict": ruling.verdict}
    if rollout.state == "rolling_back":
        if evidence.still:
            reason = f"{_devices(evidence.still)} online still answer with the candidate"
            return Decision(action="hold", verdict="", reason=reason, evidence=record, missing=("devices",))
        return Decision(
            action="rolled_back",
            verdict="",
            reason="no device online answers with the candidate any more",
            evidence=record,
        )
    if rollout.state not in OFFERING:
        return Decision(action="hold", verdict="", reason=f"the rollout is {rollout.state}", evidence=record)
    completing = rollout.stage >= len(rollout.plan.stages)
    stage = _completing_stage(rollout.plan) if completing else rollout.plan.stages[rollout.stage]
    elapsed_s = max(0.0, (now_ms - rollout.stage_since_ms) / 1000)
    finding = judge_stage(stage, rollout.plan.gates, evidence, elapsed_s, completing=completing)
    if rollout.plan.is_judged(rollout.stage):
        small_fleet = rollout.plan.judge is not None and rollout.plan.judge.small_fleet
        finding = with_ruling(finding, ruling, small_fleet=small_fleet, fault=fault)

    def made(action: Action, reason: str = finding.reason) -> Decision:
        return Decision(action=action, verdict=finding.verdict, reason=reason, evidence=record, missing=finding.missing)

    if finding.verdict == "FAIL":
        if not rollout.first:
            return made("roll_back")
        if rollout.state == "paused":
            return made("hold")
        return made("pause", f"{finding.reason}; this is the model's first bundle, so there is none to go back to")
    if rollout.state == "paused":
        return made("hold", f"paused; {finding.reason}")
    if finding.verdict == "PASS":
        if completing:
            return made("finish")
        return made("advance" if rollout.stage + 1 < len(rollout.plan.stages) else "complete")
    if elapsed_s >= stage.max_seconds:
        return made("pause", f"no verdict within {stage.max_seconds:g} s: {finding.reason}")
    return made("hold")


def _completing_stage(plan: Plan) -> Stage:
    """While completing everyone is a candidate. What was counted before it began does not speak for it.

    Devices that confirmed after a trial had traffic, so at least one request is wanted of them even where the plan names none.
    """
    last = plan.stages[-1]
    return Stage(
        share=1.0,
        min_devices=last.min_devices,
        min_inferences=max(last.min_inferences, 1 if plan.gates.require == "trial" else 0),
        max_seconds=last.max_seconds,
    )


def _kept(gates: Gates, evidence: Evidence, proven: int, wanted: int) -> str:
    bad, n = evidence.failed + evidence.shed, evidence.inferences
    parts = [f"{proven} devices confirmed (wanted {wanted})", f"{n} inferences, {bad} failed or shed"]
    if gates.max_error_rate is not None:
        parts[-1] += f" ({_percent(bad, n)}, gate {gates.max_error_rate:.2%})"
    if evidence.p95_ms is not None:
        gate = f", gate {gates.latency_p95_ms:g} ms" if gates.latency_p95_ms is not None else ""
        parts.append(f"p95 {evidence.p95_ms:.2f} ms{gate}")
    if evidence.silent:
        parts.append(f"{_devices(evidence.silent)} went offline since the stage began")
    reverts = sum(evidence.reverted.values())
    parts.append("no device went back" if not reverts else f"{_devices(reverts)} went back, {gates.max_reverts} may")
    if evidence.disbelieved:
        parts.append(f"{_devices(evidence.disbelieved)} outside the stage said so, which counts for nothing")
    return "; ".join(parts)


def _fell_silent(evidence: Evidence) -> str:
    named = ", ".join(evidence.silent_ids)
    rest = evidence.silent - len(evidence.silent_ids)
    names = f" ({named}{f' and {rest} more' if rest else ''})" if named else ""
    return f"{_devices(evidence.silent)} went offline since the stage began{names}; wanted back, or revoked or pinned"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "no requests"


def _devices(n: int) -> str:
    return "1 device" if n == 1 else f"{n} devices"
