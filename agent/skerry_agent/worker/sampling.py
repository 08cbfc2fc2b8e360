"""Rows that are kept whole and sent: a share by hash, and of what is strange a bounded number.

Nothing is kept while the group's ``sample_rate`` is 0. Reasons, in the order in which one row's is named: ``outside`` (a value out
of its feature's range, or none at all), ``uncertain`` (the two likeliest classes less than 0.1 apart), ``share`` (by hash,
see ``choosing``); later ``disagrees`` (a label names another class) and ``audit`` (an explained row of an audit class, with its
attributions). Of each reason at most ``per_hour`` are kept in an hour, the first that come, by whichever worker; the rest is counted
(``samples.bounded``). A sample holds the watched features and the classifier's outputs. Features marked ``pii`` are left out,
or stand as a keyed hash, before anything leaves this process.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from skerry_contract import window as w
from skerry_contract import wire

from skerry_agent import workerwire as ww
from skerry_agent.worker.choosing import Row, Rows, Tally, chosen
from skerry_agent.worker.model import Model
from skerry_agent.worker.plan import Plan

UNCERTAIN = 0.1
_Mask = npt.NDArray[np.bool_]
HOUR_NS = 3_600_000_000_000


class Sampling:
    """Not thread-safe: every call comes from the event loop's thread.

    Args:
        send: takes ``Sampled`` messages to the supervisor.
    """

    def __init__(
        self, models: Mapping[str, Model], rules: ww.SamplingRules, *, send: Callable[[ww.Sampled], None]
    ) -> None:
        self._models = models
        self._rules = rules
        self._send = send
        self._hour = 0
        self._kept: dict[str, int] = {}
        self.follow(rules)

    def follow(self, rules: ww.SamplingRules) -> None:
        """Keeps by other rules from now on; of what was kept in this hour the larger number counts."""
        self._rules = rules
        self._begin_hour(time.monotonic_ns())
        for name, n in rules.kept.items():
            self._kept[name] = max(n, self._kept.get(name, 0))

    def taker(self, name: str) -> Callable[[Rows, Tally], None] | None:
        """What looks at a model's rows; None when none are kept."""
        plan = self._models[name].recorder.plan
        if not self._rules.rate or not plan.width:
            return None
        return lambda rows, tally: self._look(name, rows, tally)

    def _look(self, name: str, rows: Rows, tally: Tally) -> None:
        if not self._rules.rate:
            return
        plan = self._models[name].recorder.plan
        outside, uncertain = strange(plan, rows.values)
        by_hash = chosen(rows.hashes, self._rules.rate)
        for why, mask in (
            ("outside", outside),
            ("uncertain", uncertain & ~outside),
            ("share", by_hash & ~outside & ~uncertain),
        ):
            if mask.any():
                room = self._room(name, why, int(rows.at_ns[-1]), int(np.count_nonzero(mask)), tally)
                mask[np.flatnonzero(mask)[room:]] = False
                for row in rows.take(mask, why):
                    self._keep(name, row)

    def disagreed(self, prefix: str, position: int) -> None:
        """A label names another class than was predicted: the row is kept if it is still in its ring."""
        for name, model in self._models.items():
            recorder = model.recorder
            if not self._rules.rate or recorder.prefix != prefix:
                continue
            values = recorder.values_at(position)
            if values is None:
                recorder.tally("samples.gone", 1)
                return
            at_ns = int(recorder.ring.meta["at_ns"][position % recorder.ring.capacity])
            if self._room(name, "disagrees", at_ns, 1, recorder.tally):
                self._keep(name, Row(position, at_ns, values.astype(np.float64), -1, "disagrees"))

    def audited(self, name: str, row: Row, attributions: dict[str, float]) -> None:
        """An answer of an audit class was explained."""
        if self._rules.rate and self._room(name, "audit", row.at_ns, 1, self._models[name].recorder.tally):
            self._keep(name, row._replace(why="audit"), {"attributions": attributions})

    def _room(self, name: str, why: str, at_ns: int, wanted: int, tally: Tally) -> int:
        self._begin_hour(at_ns)
        what = f"{name} {why}"
        kept = self._kept.get(what, 0)
        taken = min(wanted, max(0, self._rules.per_hour - kept))
        self._kept[what] = kept + taken
        if taken:
            tally(f"samples.{why}", taken)
        if wanted > taken:
            tally("samples.bounded", wanted - taken)
        return taken

    def _begin_hour(self, at_ns: int) -> None:
        # Never back: what was answered before the hour turned, and is folded after it, counts in the new one.
        hour = at_ns // HOUR_NS
        if hour > self._hour:
            self._hour = hour
            self._kept.clear()

    def _keep(self, name: str, row: Row, further: dict[str, Any] | None = None) -> None:
        recorder = self._models[name].recorder
        sample = sample_of(
            recorder.plan,
            row,
            key=recorder.key,
            at=recorder.ring.instant(row.at_ns),
            ident=f"{recorder.prefix}{row.position:x}",
            rules=self._rules,
            further=further or {},
        )
        self._send(ww.Sampled(body=wire.encode(sample)))


def strange(plan: Plan, values: npt.NDArray[np.floating]) -> tuple[_Mask, _Mask]:
    """(rows with a value outside its range or none, rows whose answer is uncertain)."""
    n = len(plan.features)
    features = values[:, :n].astype(np.float64)
    low = np.array([-np.inf if f.low is None else f.low for f in plan.features])
    high = np.array([np.inf if f.high is None else f.high for f in plan.features])
    outside = np.any((features < low) | (features > high) | np.isnan(features), axis=1)
    uncertain = np.zeros(len(values), np.bool_)
    if plan.outputs:
        output = plan.outputs[0]
        part = values[:, n : n + output.width].astype(np.float64)
        if not output.raw:
            uncertain = part[:, 1] < 0.5 + UNCERTAIN / 2
        elif output.classes > 1:
            top = np.partition(part, -2, axis=1)
            uncertain = top[:, -1] - top[:, -2] < UNCERTAIN
    return outside, uncertain


def sample_of(
    plan: Plan,
    row: Row,
    *,
    key: w.Key,
    at: w.Instant,
    ident: str,
    rules: ww.SamplingRules,
    further: dict[str, Any],
) -> wire.Sample:
    """The sample of a row, without personal data in the clear."""
    inputs: dict[str, Any] = {}
    for feature, value in zip(plan.features, row.values.tolist(), strict=False):
        if not feature.pii:
            inputs[feature.name] = value
        elif rules.personal == "hash":
            inputs[feature.name] = keyed_hash(rules.key, feature.name, value)
    outputs: dict[str, Any] = {}
    start = len(plan.features)
    for output in plan.outputs:
        part = row.values[start : start + output.width].tolist()
        start += output.width
        outputs[output.name] = part if output.raw else {"class": int(part[0]), "confidence": part[1]}
    return wire.Sample(at=at, key=key, id=ident, why=row.why, inputs=inputs, outputs=outputs, extra=further)


def keyed_hash(key: bytes, name: str, value: float) -> str:
    """Equal values of a feature have equal hashes on one device; without its key nobody can try values out."""
    return "hmac:" + hmac.new(key, f"{name}\0{value!r}".encode(), hashlib.sha256).hexdigest()[:32]
