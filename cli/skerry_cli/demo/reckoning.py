"""The end of the demo: what the applications counted against what the server counted, the invariants, the table, the file."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from skerry_cli.client import quote
from skerry_cli.demo.application import Counts
from skerry_cli.demo.fleet import RATE, Fleet
from skerry_cli.demo.models import MODEL, VARIANTS
from skerry_cli.demo.run import SECOND, Run

SUMMARY = "summary.json"
_SETTLE_S = 40.0
_BELLS = ("start", "advance", "complete", "resume")


def server_counts(fleet: Fleet, device: str | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the server counted of the model per device, bundle, arm, rollout and stage; and what it took of each outbox."""
    answer = fleet.api.get("/api/v1/telemetry/counts", model=MODEL, device=device)
    items, streams = list(answer["items"]), list(answer["streams"])
    while answer.get("next"):
        answer = fleet.api.get("/api/v1/telemetry/counts", model=MODEL, device=device, after=answer["next"])
        items += answer["items"]
    return items, streams


def reckon(run: Run) -> dict[str, Any]:
    """Stops the applications, waits for the last windows, and compares; returns the summary and notes what does not hold."""
    fleet, screen = run.fleet, run.screen
    screen.heading("The reckoning")
    listed = dict(sorted(fleet.listed().items()))
    versions_now = {device: fleet.running(item)[0] for device, item in listed.items()}
    variants_now = {device: fleet.variant(item) for device, item in listed.items()}
    screen.progress("stopping the applications")
    fleet.processes.stop(f"app-{device}" for device in fleet.devices)
    told = {device: fleet.counts(device) for device in fleet.devices}
    answered = sum(counts.answered for counts in told.values())
    labels = _labels(told)
    items, streams = _settled(run, answered, labels["matched"])
    labels["counted_by_server"] = sum(row["labelled"] for row in items)
    lost, twice, differences = compare(told, items)
    misplaced = compare_labels(told, items)
    failures, in_crash = _failures(run, told)
    bells = _bell_times(run)
    summary: dict[str, Any] = {
        "devices": len(fleet.devices),
        "rows_drawn": f"of the batch that each step names, with replacement, seed {fleet.seed}, about {RATE:g} a second per device",
        "inferences": {
            "asked_by_applications": sum(counts.attempts for counts in told.values()),
            "answered": answered,
            "counted_by_server": sum(row["ok"] for row in items),
            "lost": lost,
            "counted_twice": twice,
            "differences": differences,
        },
        "server": {
            "invalid": sum(row["invalid"] for row in items),
            "failed": sum(row["failed"] for row in items),
            "shed": sum(row["shed"] for row in items),
            "records": sum(row["records"] for row in streams),
            "records_sent_again_and_taken_once": sum(row["duplicates"] for row in streams),
            "conflicts": sum(row["conflicts"] for row in streams),
        },
        "failed_requests": {
            "during_swaps": len(failures),
            "by_the_crashing_bundle": len(in_crash),
            "what": [text for _, _, text in (*failures, *in_crash)][:20],
        },
        "labels": {**labels, "differences": misplaced},
        "drift": run.notes.drift,
        "accuracy": run.notes.steps,
        "judged": run.notes.judged,
        "bad_version": run.notes.bad_version,
        "versions": versions_now,
        "variants": variants_now,
        "share_right": _share_right(told),
        "held_out_accuracy": run.notes.accuracy,
        "first_stage": run.notes.first_stage,
        "without_network": run.notes.offline,
        "refusals": [
            {
                "offered": refusal.offered,
                "device": refusal.device,
                "code": refusal.code,
                "detail": refusal.detail,
                "kept": refusal.kept,
                "answers_since": refusal.answered_since,
            }
            for refusal in run.notes.refusals
        ],
        "bell_to_confirmed_s": bells,
        "slowest_answer_ms": round(max((counts.slowest_ms for counts in told.values()), default=0.0), 1),
        "seconds": round(run.screen.elapsed_s, 1),
    }
    end = End(
        told=told,
        items=items,
        failures=[text for _, _, text in failures],
        versions=versions_now,
        variants=variants_now,
        wanted_variants={device: VARIANTS[fleet.runtime(device)] for device in fleet.devices},
        refused=len(run.notes.refusals),
        wanted_refusals=run.notes.expected_refusals,
        confirmed_after_bells=bells["n"],
    )
    for holds, invariant in invariants(end):
        run.must(holds, invariant)
    summary["broken"] = list(run.notes.broken)
    summary["ok"] = not run.notes.broken
    return summary


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """What the invariants are about.

    Attributes:
        told: by the applications; items: the server's counts per device, bundle and key; failures: of requests during swaps.
        versions, variants: what each device runs at the end.
        confirmed_after_bells: confirmations by devices that had heard a bell.
    """

    told: dict[str, Counts]
    items: list[dict[str, Any]]
    failures: list[str]
    versions: dict[str, str]
    variants: dict[str, str]
    wanted_variants: dict[str, str]
    refused: int
    wanted_refusals: int
    confirmed_after_bells: int


def invariants(end: End) -> Iterator[tuple[bool, str]]:
    """What must be true at the end: whether it is, and what it is, in words."""
    lost, twice, _ = compare(end.told, end.items)
    labels, misplaced = _labels(end.told), compare_labels(end.told, end.items)
    others = {name: n for name, n in labels.items() if name not in ("sent", "matched", "requests_sent_again")}
    counted_as = {(row["device"], row["variant"]) for row in end.items}
    yield (
        all(counts.done for counts in end.told.values()),
        "every application ended in order and left its last count",
    )
    yield bool(end.told) and all(counts.answered for counts in end.told.values()), "every application got answers"
    yield lost == 0, f"no inference is lost; {lost} are"
    yield twice == 0, f"no inference is counted twice; {twice} are"
    yield not end.failures, f"no request fails during swaps; {len(end.failures)} did: {end.failures[:3]}"
    yield (
        labels["sent"] == labels["matched"],
        f"every label finds its answer; of {labels['sent']} these did not: {others}",
    )
    yield (
        not misplaced,
        f"every matched label is counted once, on the device and version that answered; these are not: {misplaced[:3]}",
    )
    yield set(end.versions.values()) == {SECOND}, f"every device ends on {SECOND}; they run {end.versions}"
    yield (
        end.refused == end.wanted_refusals,
        f"{end.wanted_refusals} bad bundles were refused; {end.refused} were",
    )
    yield (
        end.confirmed_after_bells >= 2 * len(end.told) - 1,
        f"every device online confirmed both models after a bell; {end.confirmed_after_bells} did",
    )
    yield (
        end.variants == end.wanted_variants,
        f"every device runs the variant of its runtime; they run {end.variants}",
    )
    yield (
        counted_as == set(end.wanted_variants.items()),
        f"every answer is counted under that variant; they are {counted_as}",
    )


def write(summary: dict[str, Any], folder: Path) -> Path:
    """Writes ``summary.json``; returns its path."""
    path = folder / SUMMARY
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return path


def show(run: Run, summary: dict[str, Any]) -> None:
    """The table."""
    counted, failed, bells = summary["inferences"], summary["failed_requests"], summary["bell_to_confirmed_s"]
    drift, bad = summary["drift"], summary["bad_version"]
    versions = Counter((version, summary["variants"][device]) for device, version in summary["versions"].items())
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="bold")
    for name, value in (
        ("inferences asked by the applications", counted["asked_by_applications"]),
        ("  answered", counted["answered"]),
        ("  counted by the server", counted["counted_by_server"]),
        ("  lost", counted["lost"]),
        ("  counted twice", counted["counted_twice"]),
        ("failed requests during swaps", failed["during_swaps"]),
        ("failed requests of the crashing bundle", failed["by_the_crashing_bundle"]),
        ("labels sent, matched", f"{summary['labels']['sent']}, {summary['labels']['matched']}"),
        ("  counted by the server", summary["labels"]["counted_by_server"]),
        *((f"right on batch {s['batch']}, by labels", _right(s)) for s in summary["accuracy"]),
        ("drift raised on batch 2 after", f"{drift['seconds']} s, {drift['findings']} features and outputs"),
        *((f"judged: {rollout}", _ruled(found)) for rollout, found in summary["judged"].items()),
        ("bad version: first answer to verdict", f"{bad['first_answer_to_verdict_s']} s"),
        ("  to the last online device back", f"{bad['first_answer_to_last_online_device_back_s']} s"),
        ("versions", ", ".join(f"{version} as {variant} on {n}" for (version, variant), n in sorted(versions.items()))),
        (
            "bell to confirmed, seconds",
            f"min {bells['min']}, median {bells['median']}, max {bells['max']} (n {bells['n']})",
        ),
        *(
            (f"refused: {refusal['offered']}", f"{refusal['code']} on {refusal['device']}")
            for refusal in summary["refusals"]
        ),
        ("seconds in all", summary["seconds"]),
    ):
        table.add_row(name, str(value))
    run.screen.console.print(table)


def _right(step: dict[str, Any]) -> str:
    low, high = step["interval"]
    guess = "" if step["estimate_cbpe"] is None else f"; CBPE {step['estimate_cbpe']:.1%}"
    return f"{step['version']}: {step['accuracy']:.1%} ({low:.1%} to {high:.1%}{guess})"


def _ruled(found: dict[str, Any]) -> str:
    smallest = found["detectable_ratio"]
    return f"{found['verdict']}; it could see {smallest:.2f} times the errors" if smallest else str(found["verdict"])


def _labels(told: dict[str, Counts]) -> dict[str, int]:
    """What the applications sent, by what the agents took it for. ``sent`` once each, however often it had to be sent."""
    outcomes: Counter[str] = Counter()
    for counts in told.values():
        outcomes.update(counts.labels)
    found = {"sent": sum(outcomes.values()), "matched": outcomes.pop("matched", 0)}
    return {**found, **outcomes, "requests_sent_again": sum(counts.label_retries for counts in told.values())}


def _settled(run: Run, answered: int, matched: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The server's counts when they reach what was answered and stay there, or as they are when they do not."""
    deadline = time.monotonic() + _SETTLE_S
    reached = 0.0
    while True:
        items, streams = server_counts(run.fleet)
        counted, labelled = sum(row["ok"] for row in items), sum(row["labelled"] for row in items)
        run.screen.progress(
            f"{counted} of {answered} answers and {labelled} of {matched} labels have arrived at the server"
        )
        now = time.monotonic()
        if counted >= answered and labelled >= matched:
            # A record that came twice would show after the first: a little longer, to see it.
            reached = reached or now
            if now - reached > 3.0:
                return items, streams
        if now > deadline:
            return items, streams
        time.sleep(0.5)


def compare(told: dict[str, Counts], items: list[dict[str, Any]]) -> tuple[int, int, list[dict[str, Any]]]:
    """Per device and version: answers the server lacks, answers it has too many, and where."""
    counted: dict[tuple[str, str], int] = {}
    for row in items:
        key = str(row["device"]), str(row["version"])
        counted[key] = counted.get(key, 0) + int(row["ok"])
    given = {
        (device, version): tally[0] for device, counts in told.items() for version, tally in counts.versions.items()
    }
    lost = twice = 0
    differences = []
    for device, version in sorted({*counted, *given}):
        there, here = counted.get((device, version), 0), given.get((device, version), 0)
        lost += max(0, here - there)
        twice += max(0, there - here)
        if there != here:
            differences.append({"device": device, "version": version, "answered": here, "counted": there})
    return lost, twice, differences


def compare_labels(told: dict[str, Counts], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per device and version that answered: where the labels that the agent matched are not those that the server counted."""
    counted: Counter[tuple[str, str]] = Counter()
    for row in items:
        counted[str(row["device"]), str(row["version"])] += int(row["labelled"])
    matched = Counter(
        {(device, version): n for device, counts in told.items() for version, n in counts.matched.items()}
    )
    return [
        {"device": key[0], "version": key[1], "matched": matched[key], "counted": counted[key]}
        for key in sorted({*counted, *matched})
        if matched[key] != counted[key]
    ]


def _failures(run: Run, told: dict[str, Counts]) -> tuple[list[tuple[str, float, str]], list[tuple[str, float, str]]]:
    others: list[tuple[str, float, str]] = []
    crashed: list[tuple[str, float, str]] = []
    for device, counts in told.items():
        for at, text in counts.failures:
            crash = run.notes.crash
            inside = crash is not None and device == crash[0] and crash[1] <= at <= crash[2]
            (crashed if inside else others).append((device, float(at), str(text)))
    return others, crashed


def _bell_times(run: Run) -> dict[str, Any]:
    """Seconds from a bell (the decision's time on the server) to the device's own confirmation, per device and bundle.

    Both clocks are this machine's. A device without a network is left out: it heard its bell when it came back, or confirmed unheard.
    """
    fleet = run.fleet
    bells: dict[str, list[int]] = {}
    for rollout in run.notes.rollouts:
        candidate = fleet.api.get(f"/api/v1/rollouts/{quote(rollout)}")["candidate"]
        for decision in fleet.api.items(f"/api/v1/rollouts/{quote(rollout)}/decisions"):
            if decision["action"] in _BELLS:
                bells.setdefault(candidate, []).append(int(decision["at_ms"]))
    found: list[float] = []
    for device in fleet.devices:
        seen: set[str] = set()
        for event in fleet.events(device):
            data = event.get("data") or {}
            digest = str(data.get("digest", ""))
            confirmed = str(data.get("state", "")).startswith("confirmed") and not event["code"]
            rung = [at for at in bells.get(digest, ()) if at <= int(event["at_ms"])]
            if event["name"] != "update" or not confirmed or digest in seen or not rung:
                continue
            seen.add(digest)
            if (device, digest) in run.notes.away:
                continue
            found.append((int(event["at_ms"]) - max(rung)) / 1000)
    if not found:
        return {"n": 0, "min": None, "median": None, "max": None}
    return {
        "n": len(found),
        "min": round(min(found), 2),
        "median": round(statistics.median(found), 2),
        "max": round(max(found), 2),
    }


def _share_right(told: dict[str, Counts]) -> dict[str, float]:
    sums: dict[str, list[int]] = {}
    for counts in told.values():
        for version, (answered, right) in counts.versions.items():
            tally = sums.setdefault(version, [0, 0])
            tally[0] += answered
            tally[1] += right
    return {version: round(right / answered, 4) for version, (answered, right) in sorted(sums.items()) if answered}
