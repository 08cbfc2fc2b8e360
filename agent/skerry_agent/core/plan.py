"""What the group document asks of this device: keep, count under another key, or update; per model.

``skerry_contract.group.assign`` says what should run; this module compares it with what does run and with what the device
had to refuse. A device that cannot run the candidate goes to stable, one that cannot run stable to the fallback, and it
counts under no arm then: it is neither candidate nor control. One that came as far as a version to pass through stays there.
A model that the document no longer names keeps serving. Whatever is refused and when, a device comes to rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from skerry_contract import group as g
from skerry_contract import ids

from skerry_agent.core.effects import Arm


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """What answers for a model now, and the key it counts under. ``confirmed``: the version that this device confirmed; empty for none."""

    digest: str
    arm: Arm = "none"
    rollout: str = ""
    stage: int = 0
    confirmed: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """Nothing changes. ``why``: ``as_assigned``, ``agent_too_old``, ``not_assigned`` or ``refused``."""

    model: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rekey:
    """The same bundle, counted under another key from now on."""

    model: str
    arm: Arm
    rollout: str
    stage: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Another bundle."""

    model: str
    digest: str
    version: str
    arm: Arm
    rollout: str
    stage: int


Step = Keep | Rekey | Change


def plan(
    document: g.GroupDocument,
    device: ids.DeviceId,
    stratum: str,
    running: Mapping[str, Running],
    refused: Collection[str],
) -> tuple[Step, ...]:
    """One step per model, sorted by name.

    Args:
        document: verified and parsed.
        device, stratum: who asks.
        running: by model.
        refused: digests that this device refused at this look, or whose attempts are used up.
    """
    models = sorted({*running, *document.models, *document.pins.get(g.pin_key(document.group, device), {})})
    if g.missing_abilities(document):
        return tuple(Keep(model=model, why="agent_too_old") for model in models)
    return tuple(_step(document, device, stratum, model, running.get(model), refused) for model in models)


def _step(
    document: g.GroupDocument,
    device: ids.DeviceId,
    stratum: str,
    model: str,
    now: Running | None,
    refused: Collection[str],
) -> Step:
    assigned = g.assign(document, device, model, stratum)
    if assigned is None:
        return Keep(model=model, why="not_assigned")
    group_plan = document.models.get(model)
    if assigned.digest not in refused:
        first = _first(group_plan, now, assigned.version, refused)
        if first is not None:
            return _toward(model, now, first.digest, first.version, "none", "", 0)
        return _toward(model, now, assigned.digest, assigned.version, assigned.arm, assigned.rollout, assigned.stage)
    others: list[g.Target] = []
    if group_plan is not None:
        others = [target for target in (group_plan.stable, group_plan.fallback) if target is not None]
    for target in others:
        if target.digest in refused:
            continue
        if _is_on_the_way(group_plan, now, assigned.version, target.version, refused):
            break
        wanted = _first(group_plan, now, target.version, refused) or target
        return _toward(model, now, wanted.digest, wanted.version, "none", "", 0)
    if now is not None and (now.arm, now.rollout, now.stage) != ("none", "", 0):
        return Rekey(model=model, arm="none", rollout="", stage=0)
    return Keep(model=model, why="refused")


def _first(
    group_plan: g.ModelPlan | None, now: Running | None, version: str, refused: Collection[str]
) -> g.Target | None:
    """The bundle that the device has to confirm next on its way up to ``version``; None where it may go there at once."""
    if group_plan is None or now is None or not now.confirmed:
        return None
    low, high = ids.version_key(now.confirmed), ids.version_key(version)
    between = [one for one in group_plan.via if low < ids.version_key(one.version) < high and one.digest not in refused]
    return min(between, key=lambda one: ids.version_key(one.version), default=None)


def _is_on_the_way(
    group_plan: g.ModelPlan | None, now: Running | None, up_to: str, version: str, refused: Collection[str]
) -> bool:
    """Whether what runs is a step up to a bundle that is refused now, and ``version`` would lead down from it again.

    It stays: a bundle that is refused for want of room is tried again later, and the way up to it would be gone each time.
    """
    if group_plan is None or now is None or now.digest in refused:
        return False
    high, low = ids.version_key(up_to), ids.version_key(version)
    steps = (ids.version_key(one.version) for one in group_plan.via if one.digest == now.digest)
    return any(low < step < high for step in steps)


def _toward(model: str, now: Running | None, digest: str, version: str, arm: Arm, rollout: str, stage: int) -> Step:
    if now is None or now.digest != digest:
        return Change(model=model, digest=digest, version=version, arm=arm, rollout=rollout, stage=stage)
    if (now.arm, now.rollout, now.stage) != (arm, rollout, stage):
        return Rekey(model=model, arm=arm, rollout=rollout, stage=stage)
    return Keep(model=model, why="as_assigned")
