"""What the judge reads, keeps and says: frozen values with a JSON form, so that stored looks replay.

Every reading is a whole number and a column has one entry per unit, in the order of ``Design.units``. Levels (a p95, a mean) are
natural logarithms in steps of 2**-20: ``level_of`` makes one. Nothing here computes a verdict.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import msgspec
from skerry_contract.reading import ready

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "NO_DATA"]
Kind = Literal["rate", "level", "incidence"]

LEVEL_STEPS = 1 << 20


def level_of(value: float) -> int:
    """A positive value as a level: its natural logarithm in steps of 2**-20.

    >>> level_of(1.0), level_of(math.e) == LEVEL_STEPS
    (0, True)
    """
    return round(math.log(value) * LEVEL_STEPS)


class _Value:
    """JSON form of a value, and back."""

    __slots__ = ()

    def to_builtins(self) -> dict[str, Any]:
        """Maps, lists, numbers, texts; bytes as base64."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    @classmethod
    def from_builtins(cls, value: object) -> Self:
        """Raises ``msgspec.ValidationError``, naming the field, when it is none."""
        return msgspec.convert(value, cls)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit(_Value):
    """A device as it was frozen at the start of the stage.

    Attributes:
        stratum: devices are compared within it only.
        candidate: its arm.
    """

    device: str
    stratum: str = ""
    candidate: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Guardrail(_Value):
    """One thing that the candidate must not make worse.

    Attributes:
        kind: ``rate``: events among trials, such as wrong answers among labelled ones. ``level``: one number per device, such
            as the logarithm of its p95. ``incidence``: whether the device is in trouble at all, by intention to treat.
        alpha: chance of a false FAIL that this guardrail may spend in this stage.
        margin: what the candidate must stay below to PASS: a ratio for rates and levels, a difference of shares for incidence.
        limit: absolute limit for fleets too small to compare: a rate, a value, a share. None: not watched then.
        min_n: trials (or requests behind the levels) that each arm must have.
        negligible: a rate so small that no ratio to the controls matters: at the planned end the candidates also PASS when the 95 % bound
            of their own rate is not above it. 0: never. For rates only.
    """

    name: str
    kind: Kind
    alpha: float
    margin: float
    limit: float | None = None
    min_n: int = 0
    negligible: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Design(_Value):
    """What was fixed before the first look.

    Attributes:
        rollout, stage: also what the reference assignments are drawn from.
        units: at most one per device.
        planned: the stage has a planned end, at information 1; only there can it PASS.
        min_devices: devices with data that each arm must have.
    """

    rollout: str
    stage: int
    units: tuple[Unit, ...]
    guardrails: tuple[Guardrail, ...]
    planned: bool = True
    min_devices: int = 2

    def __post_init__(self) -> None:
        """Raises ``ValueError``: a device or a name twice, or a number out of its range."""
        if len({unit.device for unit in self.units}) != len(self.units):
            raise ValueError("units: a device stands there twice")
        if len({rail.name for rail in self.guardrails}) != len(self.guardrails) or not self.guardrails:
            raise ValueError("guardrails: wanted at least one, each name once")
        for rail in self.guardrails:
            if not 0 < rail.alpha < 1:
                raise ValueError(f"guardrail {rail.name}: wanted 0 < alpha < 1, got {rail.alpha}")
            if rail.kind != "incidence" and not rail.margin > 1:
                raise ValueError(f"guardrail {rail.name}: wanted a margin above 1, got {rail.margin}")

    def __hash__(self) -> int:
        """Of what tells designs apart in practice: hashing thousands of units at each look would cost more than the look."""
        return hash((self.rollout, self.stage, len(self.units)))

    def fingerprint(self) -> str:
        """Sixteen hex digits of the design: a memory belongs to one design. The order of units does not matter."""
        units = sorted((unit.device, unit.stratum, unit.candidate) for unit in self.units)
        rails = [rail.to_builtins() for rail in self.guardrails]
        body = [self.rollout, self.stage, units, rails, self.planned, self.min_devices]
        return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading(_Value):
    """One guardrail's columns since the stage began.

    Attributes:
        n: rate: trials. level: requests behind it. incidence: 1 when the device counts. 0: no data of the device.
        x: rate: events. level: see ``level_of``. incidence: 1 when in trouble.
        pre_n, pre_x: the same before the rollout; ``pre_n`` 0 where there is none. Empty columns: none at all.
    """

    n: tuple[int, ...]
    x: tuple[int, ...]
    pre_n: tuple[int, ...] = ()
    pre_x: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Look(_Value):
    """One reading of evidence.

    Attributes:
        number: 1, 2, ...
        information: how far the stage is: 1 is its planned end. Without one, alpha is half spent at 1.
    """

    number: int
    information: float
    readings: dict[str, Reading]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tail(_Value):
    """What one guardrail keeps between looks.

    Attributes:
        removed: a bit per reference assignment, most significant first: those removed so far. Empty before the first.
        count: how many that are.
        failed_at: number of the look at which it failed; 0: it has not.
        settled: the answer of the one test for PASS, once it was made.
    """

    removed: bytes = b""
    count: int = 0
    failed_at: int = 0
    settled: Verdict | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory(_Value):
    """What the judge keeps between looks of one stage. ``Memory()`` before the first.

    Attributes:
        design: fingerprint of the design it belongs to; empty before the first look.
        looks: number of the last look; information: its.
    """

    design: str = ""
    looks: int = 0
    information: float = 0.0
    tails: dict[str, Tail] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm(_Value):
    """One arm in sum.

    Attributes:
        devices: with data; of: all that were frozen.
        n, x: sums of the reading (``x`` 0 for levels).
        value: rate, geometric mean of the levels, or share of devices in trouble. None without data.
    """

    devices: int
    of: int
    n: int
    x: int
    value: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding(_Value):
    """The verdict on one guardrail and every number it rests on.

    Attributes:
        reason: in plain words.
        missing: what a PASS still lacks.
        uncontrolled: there were too few assignments to compare; only the absolute limit was looked at.
        ratio: candidate over control, adjusted for devices; for incidence the difference of shares.
        upper: one-sided 95 % bound of ``ratio``; None: unbounded, or not to be had.
        detectable_ratio: the smallest true ratio that would be found at this look with 80 % chance, if all of alpha were spent.
        failed_at: number of the look at which it failed.
        assignments: reference assignments, the observed one included; removed: of them, so far; allowed: by the spending.
        at_least: assignments whose statistic is at least the observed one; at_least / assignments is the p-value of this look.
        common_factor: candidate and control together over what their pre-periods foretold.
        prior_mean, prior_cv: of the devices' rates in the pre-period.
    """

    guardrail: str
    kind: Kind
    verdict: Verdict
    reason: str
    candidate: Arm
    control: Arm
    alpha: float
    margin: float
    missing: tuple[str, ...] = ()
    uncontrolled: bool = False
    limit: float | None = None
    ratio: float | None = None
    upper: float | None = None
    detectable_ratio: float | None = None
    failed_at: int = 0
    assignments: int = 0
    allowed: int = 0
    removed: int = 0
    at_least: int | None = None
    statistic: float | None = None
    common_factor: float | None = None
    prior_mean: float | None = None
    prior_cv: float | None = None

    @property
    def unwatched(self) -> bool:
        """Too few devices to compare, and no absolute limit either: it says nothing."""
        return self.uncontrolled and self.limit is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling(_Value):
    """What the judge says at one look.

    Attributes:
        uncontrolled: at least one guardrail could not be compared: promotion needs a person's consent to that.
        missing: guardrail and what it lacks, as ``labelled_errors:planned_end``.
    """

    look: int
    information: float
    verdict: Verdict
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    uncontrolled: bool = False
    missing: tuple[str, ...] = ()


ready(Look, Memory, Ruling)
