"""Where the cut of a stage lies, so that the stage holds exactly the devices planned.

A device is a candidate when ``hash64(salt, id) < cut`` (``skerry_contract.group``). Placing the cut just above the k-th
smallest hash among the known eligible devices makes the stage hold k of them: not about k, as a cut at ``k/n * 2**64`` would.
Devices that come later fall where their hash says. Cuts only grow, so that no device leaves a stage it is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from skerry_contract import group, ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Eligible:
    """A device that the rollout may count on.

    Attributes:
        stratum: hardware class and variant, as cuts name it.
        online: whether it is connected now.
    """

    device: ids.DeviceId
    stratum: str = ""
    online: bool = True


def place(hashes: Iterable[int], k: int) -> int:
    """The cut below which exactly ``k`` of the hashes lie.

    Equal hashes cannot be told apart. When the k-th and the next are equal, the cut goes below all of that value: a stage
    never holds more devices than planned. With fewer than ``k`` hashes, all lie below the cut.

    >>> place([10, 30, 20], 2), place([10, 20, 20], 2), place([], 3)
    (21, 11, 0)

    Args:
        hashes: 64-bit, in any order.
        k: how many; 0 or more.
    """
    if k < 0:
        raise ValueError(f"wanted k >= 0, got {k}")
    ordered = sorted(hashes)
    if k == 0 or not ordered:
        return 0
    if k >= len(ordered):
        return ordered[-1] + 1
    if ordered[k - 1] != ordered[k]:
        return ordered[k - 1] + 1
    below = [value for value in ordered if value < ordered[k]]
    return below[-1] + 1 if below else 0


def share_of(n: int, share: float) -> int:
    """How many of ``n`` devices a share is, rounded up: a share above 0 of any devices is at least one."""
    return ceil(n * Fraction(share).limit_denominator(1_000_000))


def grow(old: Mapping[str, str], new: Mapping[str, int]) -> dict[str, str]:
    """The cuts of the next stage: per stratum the larger of the old and the new one, as decimal strings."""
    strata = {*old, *new}
    floor = int(old.get(group.ANY_STRATUM, "0"))
    found: dict[str, str] = {}
    for stratum in sorted(strata):
        # A stratum that had no cut of its own was under that of "*": it must not fall below it now.
        before = int(old[stratum]) if stratum in old else floor
        found[stratum] = str(max(before, new.get(stratum, new.get(group.ANY_STRATUM, 0))))
    return found


def plan_cuts(
    eligible: Sequence[Eligible],
    salt: str,
    *,
    devices: int | None,
    share: float | None,
    stratified: bool,
    old: Mapping[str, str],
) -> dict[str, str]:
    """The cuts of a stage.

    A share of 1 is everyone, known or not. When stratified, the share is taken within each stratum, and a number of devices
    is divided over the strata in proportion (largest remainders first); later strata stay outside until the next stage.

    Args:
        salt: 32 hex digits.
        devices, share: exactly one is set; how many, or which part of the eligible devices.
        old: the cuts of the stage before, or empty.
    """
    if (devices is None) == (share is None):
        raise ValueError("wanted exactly one of devices and share")
    if share is not None and share >= 1:
        return grow(old, {group.ANY_STRATUM: group.EVERYONE})
    raw_salt = bytes.fromhex(salt)
    strata: dict[str, list[int]] = {}
    for one in eligible:
        strata.setdefault(one.stratum if stratified else group.ANY_STRATUM, []).append(
            group.hash64(raw_salt, one.device)
        )
    sizes = {stratum: len(hashes) for stratum, hashes in strata.items()}
    if share is not None:
        wanted = {stratum: share_of(size, share) for stratum, size in sizes.items()}
    else:
        wanted = divide(devices or 0, sizes)
    return grow(old, {stratum: place(hashes, wanted[stratum]) for stratum, hashes in strata.items()})


def divide(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Divides ``k`` over strata in proportion to their sizes, never more than a stratum has.

    >>> divide(4, {"a": 6, "b": 2}), divide(9, {"a": 6, "b": 2})
    ({'a': 3, 'b': 1}, {'a': 6, 'b': 2})
    """
    n = sum(sizes.values())
    k = min(k, n)
    if not n:
        return dict.fromkeys(sizes, 0)
    whole = {stratum: k * size // n for stratum, size in sizes.items()}
    # Largest remainder first; names break ties, so that the same fleet is always divided alike.
    order = sorted(sizes, key=lambda stratum: (-(k * sizes[stratum] % n), stratum))
    for stratum in order[: k - sum(whole.values())]:
        whole[stratum] += 1
    return whole


def offline_in_first(eligible: Sequence[Eligible], salt: str, k: int, *, stratified: bool = False) -> int:
    """How many of the ``k`` devices with the smallest hashes are offline now; stratified: of the ``k`` divided over strata."""
    raw_salt = bytes.fromhex(salt)
    strata: dict[str, list[Eligible]] = {}
    for one in eligible:
        strata.setdefault(one.stratum if stratified else group.ANY_STRATUM, []).append(one)
    wanted = divide(k, {stratum: len(devices) for stratum, devices in strata.items()})
    return sum(
        not one.online
        for stratum, devices in strata.items()
        for one in sorted(devices, key=lambda one: (group.hash64(raw_salt, one.device), one.device))[: wanted[stratum]]
    )


def choose_salt(eligible: Sequence[Eligible], salts: Iterable[str], k: int, *, stratified: bool = False) -> str:
    """The first of the random salts whose first ``k`` devices are all online, else the one with the fewest offline.

    A first stage that holds sleeping devices waits for them. Any salt is as good as another: given who is online, the
    choice stays uniform among those devices, so a later comparison of candidates with online controls is not biased.

    Raises:
        ValueError: without any salt.
    """
    best: tuple[int, str] | None = None
    for salt in salts:
        offline = offline_in_first(eligible, salt, k, stratified=stratified)
        if best is None or offline < best[0]:
            best = (offline, salt)
        if offline == 0:
            break
    if best is None:
        raise ValueError("wanted at least one salt")
    return best[1]
