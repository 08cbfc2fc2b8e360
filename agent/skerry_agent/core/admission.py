"""May this bundle run here, now? As which variant?

A pure function of the manifest, facts about the device and what is remembered of the bundle. It asks in the order of
what a person would fix first: the bundle's own past, the agent's age, the floor, then for each variant runtime,
architecture, memory and disk. Power and maintenance windows come with a later release.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from skerry_contract import ids
from skerry_contract.manifest import Manifest, Variant, runtime_suffices

from skerry_agent.core.lifecycle import ATTEMPTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What counts of a device.

    Attributes:
        runtimes: name -> version of those that may be used, e.g. ``{"onnx": "1.32.0"}``; version "0" where it is not known.
        broken: runtimes that are installed and failed since this device's agent started.
        prefer: runtimes in the order in which the device wants them; empty: the bundle's author decides.
        arch: as ``uname -m`` gives it.
        memory_free_mb, disk_free_mb: now, in MB (1e6 bytes).
        memory_reserve_mb, disk_reserve_mb: what must stay free for others.
        files_free: how many more files its disk can name; file_reserve: how many of them must stay.
        agent: the agent's version; abilities: what it understands of a manifest's ``requires``.
    """

    runtimes: dict[str, str]
    arch: str
    memory_free_mb: float
    disk_free_mb: float
    memory_reserve_mb: float = 0.0
    disk_reserve_mb: float = 0.0
    files_free: int = 1 << 62
    file_reserve: int = 0
    agent: str = "0.0.0"
    abilities: frozenset[str] = frozenset()
    prefer: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What is remembered about the bundle and its model.

    Attributes:
        floor: lowest version of the model that may be activated; empty for none.
        confirmed: version of the model that this device confirmed; empty for none.
        failures: entries of ``ATTEMPTS`` -> how often this bundle failed so.
        present_bytes: of its files, already on this disk.
        idle_bytes: of files that the bundle does not want and that make way for it; idle_files: how many.
    """

    floor: str = ""
    confirmed: str = ""
    failures: dict[str, int] = field(default_factory=dict)
    present_bytes: int = 0
    idle_bytes: int = 0
    idle_files: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Admit:
    """It may run, as ``variant``; ``fetch_bytes`` are still to come."""

    variant: str
    fetch_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Refuse:
    """It may not. ``code`` is of the update vocabulary."""

    code: str
    detail: str


def exhausted(failures: dict[str, int]) -> str | None:
    """The reason of which the bundle has used up its attempts, or None."""
    for reason, count in sorted(failures.items()):
        limit = ATTEMPTS.get(reason)
        if limit is not None and count >= limit:
            return reason
    return None


def below_floor(version: str, floor: str) -> bool:
    """Whether the floor forbids to activate the version."""
    return bool(floor) and ids.version_key(version) < ids.version_key(floor)


def admit(manifest: Manifest, device: Device, memory: Memory) -> Admit | Refuse:
    """Decides. Of several variants that fit, the first of the device's preferred runtime wins, else the manifest's first."""
    spent = exhausted(memory.failures)
    if spent is not None:
        return Refuse(code="attempts_exhausted", detail=f"{spent} {memory.failures[spent]} times")
    if manifest.min_agent and ids.version_key(device.agent) < ids.version_key(manifest.min_agent):
        return Refuse(code="agent_too_old", detail=f"wants agent {manifest.min_agent}, this is {device.agent}")
    lacking = sorted(set(manifest.requires) - device.abilities)
    if lacking:
        return Refuse(code="agent_too_old", detail=f"this agent lacks {', '.join(lacking)}")
    if below_floor(manifest.version, memory.floor):
        return Refuse(code="below_floor", detail=f"{manifest.model} {manifest.version} is below floor {memory.floor}")
    if manifest.after and memory.confirmed and ids.version_key(memory.confirmed) < ids.version_key(manifest.after):
        detail = f"{manifest.model} {manifest.version} goes after {manifest.after}, which must be confirmed first; here it is {memory.confirmed}"
        return Refuse(code="must_pass_first", detail=detail)
    refusals: list[Refuse] = []
    order = {runtime: place for place, runtime in enumerate(device.prefer)}
    for variant in sorted(manifest.variants, key=lambda one: order.get(one.runtime, len(order))):
        answer = _admit_variant(variant, device, memory)
        if isinstance(answer, Admit):
            return answer
        refusals.append(answer)
    # The variant that came furthest says what to fix.
    return max(refusals, key=lambda refusal: _ORDER.index(refusal.code))


_OTHER_FILES = 8
"""What a bundle takes beside its own: its folder, the manifest, and what is written while it is fetched and started."""
_ORDER = ("no_variant", "runtime_missing", "not_enough_memory", "not_enough_disk")


def _admit_variant(variant: Variant, device: Device, memory: Memory) -> Admit | Refuse:
    if variant.arch and device.arch not in variant.arch:
        return Refuse(code="no_variant", detail=f"{variant.id} is for {', '.join(variant.arch)}, this is {device.arch}")
    version = device.runtimes.get(variant.runtime)
    if version is None:
        return Refuse(
            code="runtime_missing", detail=f"{variant.id} wants {variant.runtime}, which {_why(variant, device)}"
        )
    if not runtime_suffices(version, variant.min):
        return Refuse(
            code="runtime_missing", detail=f"{variant.id} wants {variant.runtime} {variant.min}, here is {version}"
        )
    free_mb = device.memory_free_mb - device.memory_reserve_mb
    # What was encrypted lies in memory in the clear for as long as it may be loaded, beside what the worker makes of it.
    opened_mb = sum(file.plain.size for file in variant.files if file.plain is not None) / 1e6
    if variant.needs.rss_mb + opened_mb > free_mb:
        also = f" and {opened_mb:.1f} MB to be opened in" if opened_mb else ""
        return Refuse(
            code="not_enough_memory",
            detail=f"{variant.id} wants {variant.needs.rss_mb} MB{also}, {free_mb:.0f} MB are free",
        )
    fetch_bytes = max(0, sum(file.size for file in variant.files) - memory.present_bytes)
    # What is here already, whole or in part, is off the free room, so it is off what is wanted, too.
    wanted_mb = max(variant.needs.disk_mb - memory.present_bytes / 1e6, fetch_bytes / 1e6) if fetch_bytes else 0.0
    room_mb = device.disk_free_mb + memory.idle_bytes / 1e6 - device.disk_reserve_mb
    # What is here already wants no room: the way back to it must not depend on a disk that others filled.
    files_free = device.files_free + memory.idle_files
    if fetch_bytes and files_free < len(variant.files) + _OTHER_FILES + device.file_reserve:
        return Refuse(code="not_enough_disk", detail=f"{variant.id}: {files_free} more files fit on the disk")
    if fetch_bytes and wanted_mb > room_mb:
        return Refuse(
            code="not_enough_disk", detail=f"{variant.id} wants {wanted_mb:.1f} MB, {room_mb:.1f} MB are free"
        )
    return Admit(variant=variant.id, fetch_bytes=fetch_bytes)


def _why(variant: Variant, device: Device) -> str:
    if variant.runtime in device.broken:
        return "does not work here"
    if device.prefer and variant.runtime not in device.prefer:
        return "device.runtimes leaves out"
    return "is not installed"
