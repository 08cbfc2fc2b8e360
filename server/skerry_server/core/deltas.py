"""Which deltas are worth making, which are worth keeping, and which go. Pure.

A delta leads from a file that devices report to run to a file of a bundle that they are, or will be, given. Deltas serve speed
alone: a device that finds none takes the whole file. So everything here is bounded, and what is in doubt is not made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec
from skerry_contract import bases
from skerry_contract.manifest import File, Manifest

State = Literal["waiting", "making", "ready", "useless", "failed"]
STATES: tuple[State, ...] = ("waiting", "making", "ready", "useless", "failed")

MOST_PAIRS = 256
"""That are thought of at a time; those that serve most devices come first."""
KEPT_SHARE = 0.9
"""Of the file: a delta above that is dropped. It would cost a device more time than the network spares it."""
KEEP_MS = 24 * 3_600_000
"""So long a delta stays that nobody will need any more: a device may be in the middle of it, or be moved back."""
NOTED_MS = 600_000
"""How exact it is known when a delta was last wanted."""
ATTEMPTS = 3
RETRY_MS = (600_000, 3_600_000)
"""Waits after the first and the second failure. What failed ``ATTEMPTS`` times waits for a person, or for a newer program."""


class Runs(msgspec.Struct, frozen=True, kw_only=True):
    """So many devices report to run a variant of a bundle, and are or will be given the bundles ``goals`` (digests)."""

    digest: str
    variant: str
    goals: tuple[str, ...]
    devices: int


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """What opens a pair of encrypted files, and what must then be in them.

    Attributes:
        base_bundle, target_bundle: digests of bundles whose content keys open them; the base's is empty where that is in the clear.
        base_plain, target_plain: sha256 of what is in them; target_size: bytes.
    """

    base_bundle: str
    base_plain: str
    target_bundle: str
    target_plain: str
    target_size: int


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A delta that is wanted: from a file to a file, by sha256, with the names that people know them by. ``sealed``: of an encrypted target."""

    base: str
    target: str
    base_size: int
    target_size: int
    model: str
    path: str
    base_version: str
    target_version: str
    devices: int
    sealed: Sealed | None = None


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a delta. ``maker``: the version of the program that tried last."""

    state: State
    attempts: int = 0
    changed_ms: int = 0
    wanted_ms: int = 0
    maker: str = ""


def wanted(runs: Iterable[Runs], manifests: Mapping[str, Manifest], *, most: int = MOST_PAIRS) -> list[Pair]:
    """The pairs of files that deltas are wanted for; those that serve most devices first, at most ``most``.

    Args:
        manifests: by digest; what is not among them is passed over.
    """
    found: dict[tuple[str, str], Pair] = {}
    for run in runs:
        held_in = manifests.get(run.digest)
        held = next((v for v in held_in.variants if v.id == run.variant), None) if held_in is not None else None
        if held_in is None or held is None:
            continue
        for digest in dict.fromkeys(run.goals):
            goal = manifests.get(digest)
            # A device may say anything; bundles of two models have nothing to patch from each other.
            if goal is None or digest == run.digest or goal.model != held_in.model:
                continue
            variant = bases.variant_after(goal, held)
            if variant is None:
                continue
            for file in variant.files:
                base = bases.base_of(file, variant, held)
                if base is None:
                    continue
                known = found.get((base.sha256, file.sha256))
                found[base.sha256, file.sha256] = Pair(
                    base=base.sha256,
                    target=file.sha256,
                    base_size=base.size,
                    target_size=file.size,
                    model=goal.model,
                    path=file.path,
                    base_version=held_in.version,
                    target_version=goal.version,
                    devices=run.devices + (known.devices if known is not None else 0),
                    sealed=_sealed(run.digest, base, digest, file),
                )
    return sorted(found.values(), key=lambda pair: (-pair.devices, pair.base, pair.target))[:most]


def _sealed(base_bundle: str, base: File, target_bundle: str, target: File) -> Sealed | None:
    if target.plain is None:
        return None
    return Sealed(
        base_bundle=base_bundle if base.plain is not None else "",
        base_plain=base.content.sha256,
        target_bundle=target_bundle,
        target_plain=target.plain.sha256,
        target_size=target.plain.size,
    )


def is_due(held: Held, *, now_ms: int, program: str) -> bool:
    """Whether the delta should be made now."""
    match held.state:
        case "waiting":
            return True
        case "failed":
            if held.maker != program:
                return True
            return held.attempts < ATTEMPTS and now_ms - held.changed_ms >= RETRY_MS[max(0, held.attempts - 1)]
        case "useless":
            return held.maker != program
        case _:
            return False


def is_news(known: Held | None, *, now_ms: int) -> bool:
    """Whether it is worth a write that the delta is wanted."""
    return known is None or now_ms - known.wanted_ms > NOTED_MS


def after_a_crash(held: Held) -> tuple[State, str]:
    """The state of a delta that was being made when the server ended, and why."""
    if held.attempts >= ATTEMPTS:
        return "failed", f"the server ended {held.attempts} times while it was made"
    return "waiting", ""


def is_over(held: Held, *, now_ms: int) -> bool:
    """Whether nobody has needed the delta for so long that it goes."""
    return now_ms - held.wanted_ms > KEEP_MS


def is_worth_it(size: int, whole: int) -> bool:
    """Whether a delta of ``size`` bytes is kept beside a file of ``whole`` bytes."""
    return 0 < size <= whole * KEPT_SHARE


def to_drop(unwanted: Mapping[tuple[str, str], tuple[int, int]], over: int) -> list[tuple[str, str]] | None:
    """Which deltas go so that ``over`` bytes become free: those that were wanted longest ago.

    Args:
        unwanted: (base, target) -> bytes and when it was last wanted, of deltas that nobody wants now.

    Returns:
        None when not even all of them are enough.
    """
    dropped: list[tuple[str, str]] = []
    for pair, (size, _wanted_ms) in sorted(unwanted.items(), key=lambda item: (item[1][1], item[0])):
        if over <= 0:
            break
        dropped.append(pair)
        over -= size
    return dropped if over <= 0 else None
