"""A finding in plain words."""

from __future__ import annotations

from dataclasses import replace

from skerry_server.core.judge_values import Arm, Finding, Guardrail

Own = tuple[float, float] | None
_TRIALS = {"rate": "trials", "level": "requests", "incidence": "devices"}


def trials(rail: Guardrail) -> str:
    """What a guardrail counts."""
    return _TRIALS[rail.kind]


def with_reason(
    found: Finding, lacking: tuple[str, ...], *, look: int, ended: bool, planned: bool, own: Own = None
) -> Finding:
    """The finding with its reason.

    Args:
        lacking: which minimums are not met, in words.
        look: number of this one.
        ended: the planned end is reached.
        own: bound of the candidates' own rate, and what is negligible; None where nothing is.
    """
    if found.verdict == "FAIL" and found.failed_at != look:
        reason = f"failed at look {found.failed_at}"
    else:
        reason = _reason(found, lacking, ended=ended, planned=planned, own=own)
    return replace(found, reason=f"{found.guardrail}: {reason}")


def _reason(found: Finding, lacking: tuple[str, ...], *, ended: bool, planned: bool, own: Own) -> str:
    if lacking and found.verdict == "NO_DATA":
        return "; ".join(lacking)
    seen = f"{_arm(found, found.candidate)} on {_count(found.candidate.devices, 'candidate')}"
    if found.uncontrolled:
        return f"{seen}; {_alone(found, ended=ended)}"
    seen += f" beside {_arm(found, found.control)} on {_count(found.control.devices, 'control')}"
    if found.verdict == "FAIL":
        return (
            f"{seen}{_ratio(found)}; of {found.assignments} ways in which the arms could have fallen only {found.at_least} look "
            f"as bad, this one included, and up to {found.allowed} are held to be no chance by now"
        )
    if found.verdict == "PASS":
        if own is not None and own[0] <= own[1] and (found.upper is None or found.upper > found.margin):
            return (
                f"{seen}; the 95 % bound {own[0]:.3%} of the candidates' own rate is negligible: not above {own[1]:.3%}"
            )
        return f"{seen}{_ratio(found)}; {_bound(found)} is below the margin {_margin(found)}"
    if ended:
        return f"{seen}{_ratio(found)}; the planned end is reached, but {_short(found, own)}"
    until = "until the planned end" if planned else "and the stage has no planned end, so it can only fail"
    return f"{seen}{_ratio(found)}; no worse than chance allows{_seeing(found)}, {until}"


def _short(found: Finding, own: Own) -> str:
    bounded = found.upper is not None or found.kind == "incidence"
    what = f"{_bound(found)} was not below" if bounded else "no 95 % bound shows the ratio to be below"
    alone = ""
    if own is not None:
        alone = f", nor is the candidates' own rate shown to be negligible (bound {own[0]:.3%}, wanted {own[1]:.3%})"
    return f"{what} the margin {_margin(found)}{alone}"


def _alone(found: Finding, *, ended: bool) -> str:
    few = f"uncontrolled: {found.assignments} ways to divide the devices are fewer than 1/alpha = {1 / found.alpha:.0f}"
    if found.limit is None:
        return f"{few}, and no absolute limit is set"
    limit = _value(found, found.limit)
    if found.verdict == "FAIL":
        return f"{few}; above the absolute limit {limit}"
    if found.verdict == "PASS":
        return f"{few}; below the absolute limit {limit}"
    if ended:
        return f"{few}; not shown to be below the absolute limit {limit}"
    return f"{few}; not above the absolute limit {limit}, until the planned end"


def _arm(found: Finding, arm: Arm) -> str:
    if arm.value is None:
        return "nothing"
    if found.kind == "rate":
        return f"{arm.x} of {arm.n} ({arm.value:.2%})"
    if found.kind == "incidence":
        return f"{arm.x} of {arm.n} in trouble ({arm.value:.0%})"
    return f"{arm.value:.4g}"


def _value(found: Finding, value: float) -> str:
    return f"{value:.4g}" if found.kind == "level" else f"{value:.2%}"


def _ratio(found: Finding) -> str:
    if found.ratio is None or found.kind == "incidence":
        return ""
    return f", {found.ratio:.2f} times as much, device by device"


def _bound(found: Finding) -> str:
    if found.kind == "incidence":
        return f"the difference {found.ratio or 0:.0%}"
    return f"the 95 % bound {found.upper:.2f}" if found.upper is not None else "no 95 % bound"


def _margin(found: Finding) -> str:
    return f"{found.margin:.0%}" if found.kind == "incidence" else f"{found.margin:g}"


def _seeing(found: Finding) -> str:
    if found.kind == "incidence":
        return ""
    if found.detectable_ratio is None:
        return " (no effect could be told yet)"
    return f" (a factor of {found.detectable_ratio:.2f} could be told from it by now)"


def _count(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n} {what}s"
