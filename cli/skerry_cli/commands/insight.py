"""``skerry drift``, ``skerry accuracy``, ``skerry attributions`` and ``skerry samples``: what the fleet's counts say about a model, in plain words."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from skerry_cli import output
from skerry_cli.client import quote
from skerry_cli.commands.publish import find_bundle
from skerry_cli.commands.session import session
from skerry_cli.errors import Usage

Since = Annotated[
    int | None,
    typer.Option(
        "--since-ms", help="From then on, ms since 1970; the last 24 hours when left out, 0 for all there is."
    ),
]
Until = Annotated[int | None, typer.Option("--until-ms", help="Only what was counted before then, ms since 1970.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Model = Annotated[str | None, typer.Option("--model", help="Only this model.")]
_MOST_SHOWN = 20
_UNITS = {
    "probability": "in the probability of the class that was predicted",
    "scale": "in the variant's own scale of its golden answers",
}
_SPAN_MS = 24 * 3_600_000


def drift(
    context: typer.Context,
    model: Model = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", help="MODEL@VERSION or digest: every number of the last look at it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Says which features and outputs have moved away from the reference, since when and how far."""
    api = session(context).api
    if bundle is not None:
        found = api.get(f"/api/v1/drift/{quote(find_bundle(api, bundle)['digest'])}")
        if as_json:
            output.show_json(found)
        else:
            _show_numbers(found)
        return
    items = list(api.items("/api/v1/drift", model=model))
    if as_json:
        output.show_json({"items": items})
        return
    if not items:
        output.say(f"Nothing has been looked at yet{_of(model)}.")
    for item in items:
        for line in drift_text(item):
            output.say(line)


def accuracy(
    context: typer.Context,
    model: Model = None,
    since_ms: Since = None,
    until_ms: Until = None,
    as_json: AsJson = False,
) -> None:
    """Shows how often each version is right, from labels with intervals, and the label-free estimate beside it."""
    # Over a version's whole life a fall is lost among the labels of better days.
    since_ms = _beginning(since_ms, until_ms)
    items = _counted(context, "accuracy", model, since_ms, until_ms, as_json)
    if items is None:
        return
    span = _span(since_ms, until_ms)
    output.say(f"Counted {span}." if items else f"Nothing was counted{_of(model)} {span}.")
    for item in items:
        for line in accuracy_text(item):
            output.say(line)
        rows = [
            (
                one["label"],
                _percent(one["recall"]),
                one["recall"]["n"],
                _percent(one["precision"]),
                one["precision"]["n"],
                _lag(one["lag"]),
            )
            for one in item["measured"]["classes"]
        ]
        if item["measured"]["labelled"] and rows:
            output.show_table(
                "per class; intervals take labels as independent (Wilson)",
                ("class", "recall", "of", "precision", "of", "label after, median to p99"),
                rows,
            )


def attributions(
    context: typer.Context,
    model: Model = None,
    since_ms: Since = None,
    until_ms: Until = None,
    as_json: AsJson = False,
) -> None:
    """Shows what each feature had to do with a version's answers, of those that devices explained, and how many they did."""
    since_ms = _beginning(since_ms, until_ms)
    items = _counted(context, "attributions", model, since_ms, until_ms, as_json)
    if items is None:
        return
    span = _span(since_ms, until_ms)
    if not items:
        output.say(f"No answer was explained{_of(model)} {span}; a manifest's explanations.share says how many are.")
        return
    output.say(f"Explained {span}.")
    for item in items:
        for one in item["variants"]:
            for line in attributions_text(item, one):
                output.say(line)
            rows = [(f["feature"], _number(f["mean"]), f"{f['share']:.1%}") for f in one["features"][:_MOST_SHOWN]]
            if rows:
                title = f"mean absolute attribution, {_UNITS[item['unit']]}"
                output.show_table(title, ("feature", "mean", "of all"), rows)
            if len(one["features"]) > _MOST_SHOWN:
                output.say(f"  and {len(one['features']) - _MOST_SHOWN} weaker; --json shows all.")


def _counted(
    context: typer.Context, what: str, model: str | None, since_ms: int, until_ms: int | None, as_json: bool
) -> list[dict[str, Any]] | None:
    """What the server counted in a span; None when it was shown as JSON already."""
    api = session(context).api
    items = list(api.items(f"/api/v1/{what}", model=model, since_ms=since_ms, until_ms=until_ms))
    if as_json:
        output.show_json({"items": items})
        return None
    return items


def _beginning(since_ms: int | None, until_ms: int | None) -> int:
    if until_ms is not None and until_ms <= (since_ms or 0):
        raise Usage(f"wanted --until-ms after --since-ms, got {since_ms or 0} to {until_ms}")
    if since_ms is None:
        return max(0, (until_ms if until_ms is not None else int(time.time() * 1000)) - _SPAN_MS)
    return since_ms


def _span(since_ms: int, until_ms: int | None) -> str:
    return f"from {output.when(since_ms) if since_ms else 'the beginning'} to {output.when(until_ms) if until_ms else 'now'}"


def attributions_text(item: dict[str, Any], one: dict[str, Any]) -> list[str]:
    """How much of one variant's answers was explained, in lines."""
    coverage = "" if one["coverage"] is None else f" ({one['coverage']:.2%})"
    title = f"{item['model']} {item['version']} ({output.short(item['bundle'])}), {one['variant']}"
    lines = [f"{title}: {one['explained']} of {one['answered']} answered rows explained{coverage}"]
    left = one["chosen"] - one["explained"] - one["dropped"]
    if one["dropped"] or left > 0:
        lines.append(
            f"  of {one['chosen']} chosen, {one['dropped']} were dropped and {max(0, left)} are to come or lost"
        )
    return lines


def samples(
    context: typer.Context,
    model: Model = None,
    device: Annotated[str | None, typer.Option("--device", help="Only of this device.")] = None,
    as_json: AsJson = False,
) -> None:
    """Shows single answers that devices kept whole: a share of all, and what was strange."""
    items = list(session(context).api.items("/api/v1/telemetry/samples", model=model, device=device))
    if as_json:
        output.show_json({"items": items})
        return
    if not items:
        output.say(f"No samples came{_of(model)}; the group's setting sample_rate says whether devices keep any.")
        return
    rows = [
        (output.when(one["at_ms"]), one["device"], one["why"], one["prediction_id"], _short_values(one))
        if "why" in one
        else (output.when(one["received_ms"]), one["device"], "unreadable", "", "")
        for one in items
    ]
    output.show_table("samples; --json shows all of each", ("at", "device", "why", "prediction", "inputs"), rows)


def _short_values(sample: dict[str, Any]) -> str:
    shown = [f"{name}={_number(value)}" for name, value in list(sample["inputs"].items())[:3]]
    return " ".join([*shown, "..."] if len(sample["inputs"]) > 3 else shown)


def _of(model: str | None) -> str:
    return "" if model is None else f" of the model {model}"


def drift_text(item: dict[str, Any]) -> list[str]:
    """One bundle's drift in lines."""
    title = f"{item['model']} {item.get('version') or output.short(item['bundle'])}: {item['verdict']}"
    span = f" ({item['n']} rows up to {output.when(item['to_ms'])})" if item["to_ms"] else ""
    lines = [f"{title}: {item['reason']}{span}."]
    for one in _by_effect(item["findings"])[:_MOST_SHOWN]:
        said = "; ".join(one["numbers"].get("reasons", ()))
        lines.append(f"  {one['subject']}, since {output.when(one['since_ms'])}: {said}")
    if len(item["findings"]) > _MOST_SHOWN:
        lines.append(f"  and {len(item['findings']) - _MOST_SHOWN} more; --json shows all.")
    return lines


def _by_effect(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def strength(one: dict[str, Any]) -> float:
        signs = one["numbers"].get("now", {}).get("signs", ())
        return max((abs(sign["effect"]) / sign["limit"] for sign in signs), default=0.0)

    return sorted(findings, key=strength, reverse=True)


def _show_numbers(found: dict[str, Any]) -> None:
    names = ("n", "psi", "psi_corrected", "js", "ks", "shift_sd", "null_rate", "p")
    # Of several variants the one that explained most.
    explained = max(found["attributions"], key=lambda one: one["explained"], default={"features": ()})
    shares = {f"feature:{one['feature']}": f"{one['share']:.1%}" for one in explained["features"]}
    output.say(f"{found['model']} {output.short(found['bundle'])}: {found['verdict']}: {found['reason']}.")
    output.show_table(
        "",
        ("subject", "state", "spans", *names, *(("attribution",) if shares else ())),
        [
            (
                one["subject"],
                "drift" if one["drifted"] else one["now"]["state"],
                f"{one['spans_drifted']}/{one['spans']}",
                *(_number(one["now"][name]) for name in names),
                *((shares.get(one["subject"], "-"),) if shares else ()),
            )
            for one in found["evaluation"]["subjects"]
        ],
    )
    for one in found["findings"]:
        end = f"closed {output.when(one['closed_ms'])}: {one['closed_because']}" if one["closed_ms"] else "open"
        output.say(f"{one['subject']}: since {output.when(one['since_ms'])}, {end}")


def _number(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def accuracy_text(item: dict[str, Any]) -> list[str]:
    """One bundle's accuracy in lines: measured, estimate, validated."""
    measured, estimate = item["measured"], item["estimate"]
    share, labels = measured["accuracy"], item["labels"]
    coverage = "" if measured["coverage"] is None else f", {measured['coverage']:.1%} of {measured['answered']} answers"
    lines = [f"{item['model']} {item['version']} ({output.short(item['bundle'])})"]
    if share["value"] is None:
        lines.append(f"  measured: no value: {measured['missing']}{coverage}")
    else:
        kind = {
            "by_device": f"by device, {_devices_text(share)}",
            "wilson": "Wilson; takes labels as independent",
        }[share["shown"]]
        low, high = share[share["shown"]]
        lines.append(
            f"  measured: {share['value']:.1%}, 95% interval {low:.1%} to {high:.1%} ({kind}); "
            f"{measured['labelled']} labels{coverage}"
        )
    lines += [f"  note: {note}" for note in measured.get("notes", ())]
    if any(labels[name] for name in labels if name != "matched"):
        lines.append("  labels: " + ", ".join(f"{n} {name}" for name, n in labels.items()))
    if estimate["estimate"] is None:
        lines.append("  estimate: none (too few rows, or the bundle has no calibration)")
    else:
        lines.append(f"  estimate: {estimate['estimate']:.1%} without labels (CBPE; blind to concept drift)")
    if item["validated_accuracy"] is not None:
        lines.append(f"  validated: {item['validated_accuracy']:.1%} on the bundle's held-out rows")
    return lines


def _devices_text(share: dict[str, Any]) -> str:
    devices, effective = share["devices"], share.get("effective_devices")
    if effective is None or effective > 0.8 * devices:
        return f"{devices} devices"
    return f"{devices} devices of unequal counts, which say as much as {effective:.1f}"


def _lag(lag: dict[str, Any]) -> str:
    return "-" if not lag["n"] else f"{_duration(lag['p50_s'])} to {_duration(lag['p99_s'])}"


def _duration(seconds: float) -> str:
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _percent(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "-"
    low, high = share[share["shown"]]
    return f"{share['value']:.1%} ({low:.1%} to {high:.1%})"
