"""Has what a model sees, or what it says, moved away from the reference in its bundle?

Theory of operation:

1. Buckets of merged windows, newest first, are gathered into *spans* in which half of the subjects or more have at least ``min_rows``
   values (``gather``). A busy model gives a span per bucket, a quiet one a span per day; none is ever judged on a handful of rows. Values
   are what was counted of the subjects; a device may say that it answered any number of rows.
2. In each span every *subject* (a feature, or the answers of an output) is compared with the reference (``measure``). A
   *sign* is one way of being different: another distribution (PSI, corrected for chance), another mean, more nulls, more
   values outside the plausible range. A sign counts when its effect is large enough **and** its p-value survives Benjamini
   and Hochberg over all subjects of the span. Neither alone is a reason: with many rows everything is significant, with few
   rows everything looks large.
3. A subject is drifted in a span with a sign, calm when every effect is below ``close_share`` of its limit (or below the limit
   and no more than chance), else between.
   Drift *opens* when ``persist`` of the last ``of`` spans are drifted, the newest among them, and *closes* when the last
   ``persist`` are calm (``evaluate``). What lies between neither opens nor closes, so nothing flaps.

What this does not say: whether the model is wrong. Labels say that; see ``accuracy``. Rows are taken as independent and the
reference as one season; docs/explanation/drift.md has the limits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from skerry_contract import window as w

from skerry_server.core import divergence as d
from skerry_server.core.profile import Profile, total

State = Literal["drifted", "between", "calm", "unknown"]
Verdict = Literal["DRIFT", "STEADY", "NO_DATA"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """When a difference matters.

    Attributes:
        min_rows: values of a subject in a span; min_reference: rows of the reference below which a subject is not judged.
        psi: corrected population stability index; shift_sd: of the mean, in standard deviations of the reference.
        null_rate, outside_rate: absolute shares. Up to ``tolerated_outside`` outside the plausible range is no evidence.
        false_rate: false discovery rate over the subjects of one span.
        persist, of: spans that must be drifted, of how many.
        close_share: share of a limit below which an effect is calm.
    """

    min_rows: int = 200
    min_reference: int = 50
    psi: float = 0.1
    shift_sd: float = 0.5
    null_rate: float = 0.05
    outside_rate: float = 0.05
    tolerated_outside: float = 0.01
    false_rate: float = 0.01
    persist: int = 3
    of: int = 5
    close_share: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Merged windows of ``from_ms`` up to ``to_ms``, milliseconds since 1970."""

    from_ms: int
    to_ms: int
    profile: Profile


class Sign(msgspec.Struct, frozen=True, kw_only=True):
    """One way of being different. ``p`` is corrected for the number of signs that the subject was asked for."""

    name: Literal["distribution", "mean", "nulls", "outside"]
    effect: float
    limit: float
    p: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One subject in one span.

    Attributes:
        subject: ``feature:<name>`` or ``output:<name>``.
        n, m: values of now and of the reference.
        psi, psi_corrected, js: see ``divergence``; None when there is nothing to compare.
        ks, ks_p: lower bound of the statistic, and its p-value; features only, classes have no order.
        shift_sd: of the feature's mean, or of the mean confidence of an output.
        null_rate, null_rate_reference, outside_rate: shares; features only.
        p: the smallest of the signs.
        signs: those that count; asked: all of them.
    """

    subject: str
    n: int
    m: int
    psi: float | None = None
    psi_corrected: float | None = None
    js: float | None = None
    ks: float | None = None
    ks_p: float | None = None
    shift_sd: float | None = None
    null_rate: float | None = None
    null_rate_reference: float | None = None
    outside_rate: float | None = None
    p: float = 1.0
    state: State = "unknown"
    signs: tuple[Sign, ...] = ()
    asked: tuple[Sign, ...] = ()


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one subject now.

    Attributes:
        now: in the newest span.
        drifted: whether drift is open after this evaluation; change: what this evaluation did to it.
        since_ms: start of the first drifted span of those looked at, when drifted.
        spans_drifted, spans: how many of the spans looked at.
        reasons: in words, strongest first.
    """

    subject: str
    now: Measured
    drifted: bool
    change: Literal["open", "close", ""] = ""
    since_ms: int | None = None
    spans_drifted: int = 0
    spans: int = 0
    reasons: tuple[str, ...] = ()


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a bundle. ``n``: rows of the newest span, which lies between ``from_ms`` and ``to_ms``."""

    verdict: Verdict
    reason: str
    n: int = 0
    from_ms: int | None = None
    to_ms: int | None = None
    spans: int = 0
    subjects: tuple[Subject, ...] = ()


def gather(manifest: m.Manifest, buckets: Iterable[Span], limits: Limits) -> list[Span]:
    """The newest ``of`` spans that hold enough values to be judged, oldest first. Without any subject by rows.

    Half of the subjects decide, neither the fullest nor the emptiest: a feature that no device counts must not hold the others up,
    and one that a single device counts a million times must not cut spans that are too short for the others.

    Args:
        buckets: newest first; no more are taken than needed.
    """
    spans: list[Span] = []
    waiting: list[Span] = []
    features = [feature.name for feature in _features(manifest)]
    outputs = [tensor.name for tensor in _outputs(manifest)]
    counted = [0] * (len(features) + len(outputs) or 1)
    for bucket in buckets:
        waiting.append(bucket)
        counted = list(map(operator.add, counted, _values(bucket.profile, features, outputs)))
        if sorted(counted)[len(counted) // 2] >= limits.min_rows:
            whole = total(part.profile for part in waiting)
            to_ms = max(part.to_ms for part in waiting)
            spans.append(Span(from_ms=bucket.from_ms, to_ms=to_ms, profile=whole))
            waiting, counted = [], [0] * len(counted)
            if len(spans) == limits.of:
                break
    return spans[::-1]


def _values(profile: Profile, features: Sequence[str], outputs: Sequence[str]) -> list[int]:
    """As ``Measured.n`` of each."""
    if not features and not outputs:
        return [profile.rows]
    of_features = (profile.features.get(name) for name in features)
    of_outputs = (profile.outputs.get(name) for name in outputs)
    return [
        *(part.moments.n + part.null if part else 0 for part in of_features),
        *(sum(part.counts) if part else 0 for part in of_outputs),
    ]


def _features(manifest: m.Manifest) -> list[m.Feature]:
    return [feature for feature in manifest.features if feature.name in manifest.reference.features]


def _outputs(manifest: m.Manifest) -> list[m.Tensor]:
    return [tensor for tensor in manifest.outputs if tensor.name in manifest.reference.outputs and tensor.labels]


def measure(manifest: m.Manifest, profile: Profile, limits: Limits) -> tuple[Measured, ...]:
    """Every subject of the manifest that has a reference, compared with it."""
    found = [
        _feature(feature, manifest.reference.features[feature.name], profile, limits) for feature in _features(manifest)
    ]
    found += [
        _output(tensor.name, manifest.reference.outputs[tensor.name], profile, limits) for tensor in _outputs(manifest)
    ]
    judged = [one for one in found if one.asked]
    cut = d.benjamini_hochberg([one.p for one in judged], limits.false_rate) if judged else -1.0
    return tuple(_with_state(one, cut, limits) for one in found)


def _feature(feature: m.Feature, reference: m.ReferenceColumn, profile: Profile, limits: Limits) -> Measured:
    now = profile.features.get(feature.name, w.FeatureCounts((0,) * len(reference.counts), 0, 0, h.Moments()))
    subject = f"feature:{feature.name}"
    n, values, before = now.moments.n + now.null, sum(now.counts), sum(reference.counts)
    known = Measured(subject=subject, n=n, m=before + reference.null)
    if n < limits.min_rows or known.m < limits.min_reference:
        return known
    nulls = d.rate_change(now.null, n, reference.null, known.m)
    signs = [Sign(name="nulls", effect=nulls.effect, limit=limits.null_rate, p=nulls.p)]
    numbers: dict[str, Any] = {"null_rate": now.null / n, "null_rate_reference": reference.null / known.m}
    if feature.range is not None:
        outside = d.excess_rate(now.outside, n, limits.tolerated_outside)
        signs.append(Sign(name="outside", effect=outside.effect, limit=limits.outside_rate, p=outside.p))
        numbers["outside_rate"] = outside.effect
    if values and before:
        ks = d.kolmogorov_smirnov(now.counts, reference.counts)
        numbers |= {"ks": ks.effect, "ks_p": ks.p}
    if feature.pii:
        # A device says of these only in which bin they fell; so both sides are looked at in that way.
        binned = h.binned_moments(reference.counts, feature.edges, feature.centre, feature.scale)
        reference = msgspec.structs.replace(reference, moments=(binned.n, binned.total, binned.squares))
    return _measured(known, now.counts, reference, now.moments, signs, numbers, limits)


def _output(name: str, reference: m.ReferenceColumn, profile: Profile, limits: Limits) -> Measured:
    now = profile.outputs.get(name, w.OutputCounts((0,) * len(reference.counts), h.Moments()))
    known = Measured(subject=f"output:{name}", n=sum(now.counts), m=sum(reference.counts))
    same = len(now.counts) == len(reference.counts)
    if known.n < limits.min_rows or known.m < limits.min_reference or not same:
        return known
    return _measured(known, now.counts, reference, now.moments, [], {}, limits)


def _measured(
    known: Measured,
    counts: Sequence[int],
    reference: m.ReferenceColumn,
    moments: h.Moments,
    signs: list[Sign],
    numbers: dict[str, Any],
    limits: Limits,
) -> Measured:
    if sum(counts) and sum(reference.counts):
        psi = d.psi(counts, reference.counts)
        numbers |= {"psi": psi.value, "psi_corrected": psi.corrected}
        numbers["js"] = d.jensen_shannon(counts, reference.counts)
        if len(counts) > 1:
            signs.append(Sign(name="distribution", effect=psi.corrected, limit=limits.psi, p=psi.p))
        n, summed, squares = reference.moments
        shift = d.mean_shift(moments, h.Moments(n=n, total=summed, squares=squares))
        if shift is not None:
            numbers["shift_sd"] = shift.effect
            signs.append(Sign(name="mean", effect=shift.effect, limit=limits.shift_sd, p=shift.p))
    # Bonferroni within the subject: it may be asked in several ways and is one hypothesis.
    asked = tuple(
        msgspec.structs.replace(sign, p=min(1.0, sign.p * len(signs)))
        for sign in sorted(signs, key=lambda sign: -_strength(sign))
    )
    return msgspec.structs.replace(known, asked=asked, p=min((sign.p for sign in asked), default=1.0), **numbers)


def _strength(sign: Sign) -> float:
    """The effect in units of its limit. A mean or a null rate may move either way; the others only grow."""
    return (abs(sign.effect) if sign.name in ("mean", "nulls") else sign.effect) / sign.limit


def _with_state(one: Measured, cut: float, limits: Limits) -> Measured:
    if not one.asked:
        return one
    signs = tuple(sign for sign in one.asked if _strength(sign) >= 1 and sign.p <= cut)
    calm = all(_is_calm(sign, limits) for sign in one.asked)
    state: State = "drifted" if signs else "calm" if calm else "between"
    return msgspec.structs.replace(one, signs=signs, state=state)


def _is_calm(sign: Sign, limits: Limits) -> bool:
    strength = _strength(sign)
    return strength < limits.close_share or (strength < 1 and sign.p > limits.false_rate)


def evaluate(
    manifest: m.Manifest, spans: Sequence[Span], opened: Collection[str], limits: Limits | None = None
) -> Evaluation:
    """What to open, keep and close, from the spans of one bundle.

    Args:
        spans: oldest first, as ``gather`` gives them.
        opened: subjects whose drift is open now.
    """
    limits = limits or Limits()
    if not spans:
        return Evaluation(verdict="NO_DATA", reason=f"no span of {limits.min_rows} rows yet")
    history: dict[str, list[tuple[Span, Measured]]] = {}
    for span in spans:
        for one in measure(manifest, span.profile, limits):
            history.setdefault(one.subject, []).append((span, one))
    subjects = tuple(_subject(looks, looks[-1][1].subject in opened, limits) for looks in history.values())
    newest = spans[-1]
    verdict, reason = _verdict(subjects, len(spans), limits)
    return Evaluation(
        verdict=verdict,
        reason=reason,
        n=newest.profile.rows,
        from_ms=newest.from_ms,
        to_ms=newest.to_ms,
        spans=len(spans),
        subjects=subjects,
    )


def _subject(looks: Sequence[tuple[Span, Measured]], opened: bool, limits: Limits) -> Subject:
    # A span that could not be judged is no evidence for either side.
    known = [(span, one) for span, one in looks if one.state != "unknown"][-limits.of :]
    states = [one.state for _, one in known]
    drifted = [span for span, one in known if one.state == "drifted"]
    opens = not opened and len(drifted) >= limits.persist and states[-1] == "drifted"
    closes = opened and len(states) >= limits.persist and set(states[-limits.persist :]) == {"calm"}
    now = known[-1][1] if known else looks[-1][1]
    stays = opens or (opened and not closes)
    return Subject(
        subject=now.subject,
        now=now,
        drifted=stays,
        change="open" if opens else "close" if closes else "",
        since_ms=drifted[0].from_ms if stays and drifted else None,
        spans_drifted=len(drifted),
        spans=len(known),
        reasons=(
            *((f"calm in each of the last {limits.persist} spans",) if closes else ()),
            *(in_words(sign, now) for sign in (now.signs or now.asked[:1])),
        ),
    )


def _verdict(subjects: Sequence[Subject], spans: int, limits: Limits) -> tuple[Verdict, str]:
    moved = [one for one in subjects if one.drifted]
    judged = [one for one in subjects if one.spans >= limits.persist]
    if moved:
        return "DRIFT", f"{len(moved)} of {len(subjects)} subjects have moved away from the reference"
    if not subjects:
        return "NO_DATA", "the bundle has no reference to compare with"
    if not judged:
        return "NO_DATA", (
            f"wanted {limits.persist} spans with at least {limits.min_rows} values and {limits.min_reference} in the "
            f"reference; the best subject has {max(one.spans for one in subjects)} of {spans}"
        )
    return "STEADY", f"none of {len(judged)} subjects has moved away from the reference for {limits.persist} spans"


_WORDS: dict[str, Callable[[Sign, Measured], str]] = {
    "distribution": lambda s, _: f"distribution: PSI {s.effect:.2f} beyond chance (limit {s.limit:g})",
    "mean": lambda s, _: f"mean: {s.effect:+.2f} sd of the reference (limit {s.limit:g})",
    "nulls": lambda s, now: (
        f"nulls: {now.null_rate or 0:.1%}, in the reference {now.null_rate_reference or 0:.1%} (limit {s.limit:.0%} apart)"
    ),
    "outside": lambda s, _: f"outside the plausible range: {s.effect:.1%} (limit {s.limit:.0%})",
}


def in_words(sign: Sign, now: Measured) -> str:
    """A sign as a person reads it."""
    return f"{_WORDS[sign.name](sign, now)}, p {'< 1e-9' if sign.p < 1e-9 else format(sign.p, '.2g')}"
