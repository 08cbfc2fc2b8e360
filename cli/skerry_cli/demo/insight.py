"""What the server says of drift, accuracy and verdicts, asked as a person would, kept for the summary and put into words."""

from __future__ import annotations

import time
from typing import Any

from skerry_cli.client import quote
from skerry_cli.demo.application import TRUTH_AFTER_S
from skerry_cli.demo.fleet import SETTINGS
from skerry_cli.demo.models import MODEL
from skerry_cli.demo.run import Run
from skerry_cli.explaining import explain_stage

SETTLED_S = TRUTH_AFTER_S[1] + SETTINGS["window_s"]
"""So long after the world has changed no label of the world before arrives any more."""
_LABELS = 300
_WAIT_S = 60.0
_STRONGEST = 3


def accuracy(run: Run, step: str, version: str, *, batch: int, since_s: float = 0.0) -> dict[str, Any]:
    """Waits until the server has enough labels of a version, tells its accuracy and notes it.

    Args:
        step: what this is called in the summary; batch: what the applications read.
        since_s: seconds since 1970; labels that came before are left out.

    Raises:
        Failed: too few labels come.
    """

    def labelled() -> dict[str, Any] | None:
        items = run.fleet.api.items("/api/v1/accuracy", model=MODEL, since_ms=int(since_s * 1000))
        found = next((item for item in items if item["version"] == version), None)
        n = found["measured"]["labelled"] if found else 0
        run.screen.progress(f"{n} of {_LABELS} labels on answers of {version}")
        return found if n >= _LABELS else None

    found = run.fleet.wait(f"{_LABELS} labels on answers of {version}", labelled, _WAIT_S, every_s=1.0)
    share, estimate = found["measured"]["accuracy"], found["estimate"]["estimate"]
    low, high = share[share["shown"]]
    noted = {
        "step": step,
        "version": version,
        "batch": batch,
        "accuracy": round(share["value"], 4),
        "interval": [round(low, 4), round(high, 4)],
        "interval_kind": share["shown"],
        "labels": share["n"],
        "estimate_cbpe": None if estimate is None else round(estimate, 4),
    }
    run.notes.steps.append(noted)
    guess = "" if estimate is None else f"; an estimate without labels (CBPE) says {estimate:.1%}"
    run.screen.say(
        f"{version} on batch {batch}: {share['value']:.1%} right (95 % interval {low:.1%} to {high:.1%}, {share['n']} labels){guess}."
    )
    return noted


def drift(run: Run, version: str) -> dict[str, Any] | None:
    """The last look for drift at a version; None before the first."""
    found = run.fleet.api.items("/api/v1/drift", model=MODEL)
    return next((item for item in found if item["version"] == version), None)


def strongest(findings: list[dict[str, Any]]) -> list[str]:
    """The findings with the largest population stability index, in words."""

    def psi(finding: dict[str, Any]) -> float:
        return float(finding["numbers"]["now"].get("psi_corrected") or 0.0)

    ordered = sorted(findings, key=psi, reverse=True)[:_STRONGEST]
    return [f"{finding['subject']} (PSI {psi(finding):.2f})" for finding in ordered]


def wait_until(run: Run, at_s: float, what: str) -> None:
    """Waits for a time (seconds since 1970), with progress."""
    while (left := at_s - time.time()) > 0:
        run.screen.progress(f"{what}: {left:.0f} s more")
        time.sleep(min(1.0, left))


def verdict(run: Run, rollout: str, *, action: str, wanted: str) -> dict[str, Any]:
    """What the judge said of a rollout's first stage, recomputed by the server from stored evidence; noted and told.

    Args:
        action: of the decision that followed from it; wanted: the verdict that this must have been.
    """
    path = f"/api/v1/rollouts/{quote(rollout)}"
    explained = explain_stage(run.fleet.api, rollout, 0)
    decided = next((d for d in run.fleet.api.items(f"{path}/decisions") if d["action"] == action), None)
    ruling = explained["ruling"] or {"verdict": "", "findings": []}
    findings = {found["guardrail"]: found for found in ruling["findings"]}
    errors = findings.get("labelled_errors", {})
    said = str((decided or {}).get("verdict", ""))
    noted = {
        "verdict": said,
        "decided_ms": (decided or {}).get("at_ms"),
        "reasons": list(ruling.get("reasons", ())),
        "looks": len(explained["looks"]),
        "candidates": explained["arms"].get("candidate", []),
        "ratio": errors.get("ratio"),
        "upper": errors.get("upper"),
        "detectable_ratio": errors.get("detectable_ratio"),
        "assignments": errors.get("assignments"),
        "recomputed_alike": explained["identical"],
    }
    run.notes.judged[rollout] = noted
    run.must(said == wanted == ruling["verdict"], f"{rollout} is judged {wanted}; it was {said or 'not judged'}")
    run.must(bool(explained["identical"]), f"every ruling on {rollout} comes out the same from stored evidence")
    smallest = errors.get("detectable_ratio")
    run.screen.say(
        f"Recomputed from stored evidence, all {noted['looks']} looks rule the same. "
        + (
            f"The smallest effect that this look could see with 80 % chance: {smallest:.2f} times the errors."
            if smallest
            else "How small an effect it could see cannot be told."
        )
    )
    return noted
