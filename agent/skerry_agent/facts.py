"""What this device is and has: architecture, runtimes, free memory and disk, machine id. Read from the system, cheaply.

Runtimes are found by their modules, as the engines find them: importing one would cost the supervisor its budget. Whether a
runtime works is proved by the worker that loads it.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import shutil
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
from skerry_contract import group, manifest

from skerry_agent import __version__
from skerry_agent.config import Config
from skerry_agent.core.admission import Device
from skerry_agent.identity import Identity
from skerry_agent.store import ballast

ABILITIES: frozenset[str] = group.FEATURES | manifest.ABILITIES
"""What this agent understands of ``requires``, in group documents and manifests."""


def arch() -> str:
    """As ``uname -m`` gives it."""
    return platform.machine()


def runtimes(config: Config) -> dict[str, str]:
    """Runtime -> version of those that are installed and that the configuration allows, in its order."""
    # Here and not above: who only asks an agent how it is needs none of this. It loads neither numpy nor a runtime.
    from skerry_runtime import engines

    importlib.invalidate_caches()
    here = engines.available()
    return {name: here[name] for name in config.device.runtimes or here if name in here}


def stratum(config: Config, found: dict[str, str]) -> str:
    """Hardware class and runtimes, as cuts name it: ``<class>.<runtime>+<runtime>``.

    Devices that take different variants of a bundle must not share a name: ``a>b`` where the configuration prefers a to b.
    """
    names = ">".join(found) if config.device.runtimes else "+".join(sorted(found))
    return f"{config.device.stratum_class or arch()}.{names or 'none'}"


def reserves(config: Config) -> dict[str, int]:
    """What a courier must leave free on the disk."""
    return {
        "reserve_bytes": int(config.limits.disk_reserve_mb * 1e6),
        "reserve_files": config.limits.file_reserve,
    }


def device(config: Config, found: dict[str, str], broken: frozenset[str] = frozenset()) -> Device:
    """The facts for admission, read now. ``broken``: runtimes that are installed and failed."""
    return Device(
        runtimes=found,
        broken=broken,
        prefer=config.device.runtimes,
        arch=arch(),
        memory_free_mb=psutil.virtual_memory().available / 1e6,
        disk_free_mb=shutil.disk_usage(config.state_dir).free / 1e6,
        files_free=ballast.room(config.state_dir)[1],
        file_reserve=config.limits.file_reserve,
        memory_reserve_mb=config.limits.memory_reserve_mb,
        disk_reserve_mb=config.limits.disk_reserve_mb,
        agent=__version__,
        abilities=ABILITIES,
    )


def binding(identity: Identity) -> str:
    """Digest of the machine's id and the device's key: what an epoch of the outbox is bound to."""
    try:
        machine = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        machine = b""
    key = hashlib.sha256(b"skerry-epoch-key:" + identity.key.read_bytes()).digest()
    return hashlib.sha256(b"skerry-epoch:" + machine + b"\0" + key).hexdigest()
