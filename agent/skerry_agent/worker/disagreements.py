"""Samples of pairs that disagree: what was asked, what was answered, what the bundle in shadow says.

They are kept while the group's ``sample_rate`` is above 0, ``per_hour`` of them at most, the first that come; the rest is counted. A
feature that either bundle marks ``pii`` is left out, or stands as a keyed hash, before anything leaves this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from skerry_contract import manifest as m
from skerry_contract import window as w
from skerry_contract import wire
from skerry_runtime.tensors import Tensors

from skerry_agent import workerwire as ww
from skerry_agent.worker.choosing import Row
from skerry_agent.worker.plan import OutputColumn, Plan, plan_of
from skerry_agent.worker.sampling import HOUR_NS, sample_of
from skerry_agent.worker.tee import Keyed

WHY = "shadow"


class Disagreements:
    """Called by one thread at a time.

    Args:
        manifest, digest: of the candidate.
        send: takes ``Sampled`` messages to the supervisor, from any thread.
    """

    def __init__(
        self, manifest: m.Manifest, digest: str, rules: ww.SamplingRules, *, send: Callable[[ww.Sampled], None]
    ) -> None:
        self._model = manifest.model
        self._plan = plan_of(manifest)
        self._digest = digest
        self._rules = rules
        self._send = send
        self._hour = 0
        self._kept = 0
        self.follow(rules)

    def follow(self, rules: ww.SamplingRules) -> None:
        """Keeps by other rules from now on; of what was kept in this hour the larger number counts."""
        self._rules = rules
        self._begin_hour(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        self._kept = max(self._kept, rules.kept.get(f"{self._model} {WHY}", 0))

    def _begin_hour(self, at_ns: int) -> None:
        hour = at_ns // HOUR_NS
        if hour > self._hour:
            self._hour, self._kept = hour, 0

    def keep(
        self,
        keyed: Keyed,
        ident: str,
        at: w.Instant,
        row: int,
        asked: Tensors,
        answered: Tensors,
        found: Tensors,
        distance: int,
    ) -> str:
        """Keeps a pair, of several rows the one given. Returns the tally that it counts in; empty when none are kept.

        Args:
            keyed: under which key it was answered, and what is personal there.
            ident: of the prediction.
            distance: see ``window.Shadow``.
        """
        if not self._rules.rate or not self._plan.width:
            return ""
        self._begin_hour(at.boot_ns)
        if self._kept >= self._rules.per_hour:
            return "samples.bounded"
        self._kept += 1
        plan = _private(self._plan, keyed)
        values = _values(plan, asked, answered, row)
        mine = {o.name: _outputs(o, found[o.name][row]) for o in plan.outputs}
        further = {
            "shadow": self._digest,
            "distance": distance,
            "candidate": {
                o.name: mine[o.name] if o.raw else {"class": int(mine[o.name][0]), "confidence": mine[o.name][1]}
                for o in plan.outputs
            },
        }
        sample = sample_of(
            plan,
            Row(0, at.boot_ns, values, -1, WHY),
            key=keyed.key,
            at=at,
            ident=ident,
            rules=self._rules,
            further=further,
        )
        self._send(ww.Sampled(body=wire.encode(sample)))
        return f"samples.{WHY}"


def _private(plan: Plan, keyed: Keyed) -> Plan:
    """The plan with what the serving bundle calls personal as well: by name, or by where it stands."""
    names = {name for name, _, _ in keyed.personal}
    places = {(where, column) for _, where, column in keyed.personal}
    return msgspec.structs.replace(
        plan,
        features=tuple(
            msgspec.structs.replace(f, pii=f.pii or f.name in names or (f.input, f.column) in places)
            for f in plan.features
        ),
    )


def _values(plan: Plan, asked: Tensors, answered: Tensors, row: int) -> npt.NDArray[np.float64]:
    values: list[float] = []
    for feature in plan.features:
        array = asked[feature.input]
        one = array[row] if row < len(array) else np.full(array.shape[1:], np.nan)
        values.append(float(one[feature.column] if array.ndim > 1 else one))
    for output in plan.outputs:
        values += _outputs(output, answered[output.name][row])
    return np.array(values, np.float64)


def _outputs(output: OutputColumn, probabilities: npt.NDArray[Any]) -> list[float]:
    """As the plan lays them out."""
    if output.raw:
        return [float(p) for p in probabilities]
    return [float(probabilities.argmax()), float(probabilities.max())]
