"""What ``telemetry.encrypt`` means on this device: where raw values lie, and what is sealed.

* Samples are sealed (``sealing``) before they are put into the outbox, and opened when they are sent.
* Recorder rings and label books hold values and predictions in the clear, are written at every request, and are of no use after
  a reboot anyway. They are kept in memory: ``state_dir/rings`` becomes a link to a folder on a tmpfs, which outlives killed
  processes and no power cut. Nothing of them reaches the disk but by swapping.

Switching either way takes along what is there: a ring that was not folded yet is folded from its new place.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from skerry_agent import memory_folder
from skerry_agent import workerwire as ww
from skerry_agent.config import Config
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.sealing import CannotOpen, Sealer, is_sealed, telemetry_key

_WAIT_S = 10.0
"""A worker whose supervisor was killed is gone by then, and gives up its rings."""

_KIND = "rings"

log = logging.getLogger(__name__)


def prepare(config: Config) -> None:
    """Puts the folder of rings where the configuration wants it. Before any worker is started.

    Raises:
        Degraded: ``no_memory_folder`` when ``telemetry.memory_dir`` is no place in memory; ``rings_in_use``; ``no_cipher``.
    """
    folder, former, coming = (config.state_dir / name for name in ("rings", "rings.former", "rings.new"))
    if os.path.lexists(former) and not os.path.lexists(folder):
        former.rename(folder)  # a move that ended between its two renames: once more, from what was there before it
    for left in (former, coming):
        _drop(config, left)
    target = folder.readlink() if folder.is_symlink() else None
    held = folder.exists() if target is None else memory_folder.is_ours(target)
    if config.telemetry.encrypt:
        Sealer(telemetry_key(config.identity_dir))  # says now what it would say at the first sample
        place = Path(config.telemetry.memory_dir)
        if why := memory_folder.unfit(place):
            raise _no_folder(why)
        if target is not None and held and target.parent == place and _is_drawn(config, target):
            return
        if target is not None and (stranger := memory_folder.stranger(target)):
            log.warning("folder in memory not ours, another is made", extra=kv(found=stranger))
        made = memory_folder.draw(place, _KIND, config.state_dir)
        # The link first: it knows what a crash leaves in memory.
        coming.symlink_to(made)
        try:
            made.mkdir(mode=0o700)
        except OSError as error:
            raise _no_folder(f"{made}: {error.strerror}") from None
    elif target is not None:
        coming.mkdir(mode=0o700)
    else:
        return
    if held:
        _copy(folder, coming)
    if os.path.lexists(folder):
        folder.rename(former)
    coming.rename(folder)
    _drop(config, former)


def _drop(config: Config, folder: Path) -> None:
    """Removes a folder of rings; of a link also what it leads to, where that is this agent's."""
    if folder.is_symlink():
        if _is_drawn(config, folder.readlink()):
            memory_folder.remove(folder.readlink())
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _is_drawn(config: Config, folder: Path) -> bool:
    return memory_folder.is_drawn(folder, _KIND, config.state_dir)


def seal_of(config: Config) -> Callable[[bytes], bytes] | None:
    """What seals samples for the disk; None when they lie in the clear."""
    if not config.telemetry.encrypt:
        return None
    return Sealer(telemetry_key(config.identity_dir)).seal


class Opener:
    """Opens records that are sealed, also after ``encrypt`` was switched off."""

    def __init__(self, identity: Path) -> None:
        self._identity = identity
        self._sealer: Sealer | None = None

    def __call__(self, record: bytes) -> bytes | None:
        """The record in the clear; None when nobody can open it any more."""
        if not is_sealed(record):
            return record
        try:
            if self._sealer is None:
                self._sealer = Sealer(telemetry_key(self._identity))
            return self._sealer.open(record)
        except (CannotOpen, Degraded):
            return None


def sampling_rules(config: Config, rate: float, kept: Mapping[str, int]) -> ww.SamplingRules:
    """What a worker keeps. ``rate``: the group's; ``kept``: what others kept in this hour already."""
    telemetry = config.telemetry
    key = telemetry_key(config.identity_dir) if telemetry.personal == "hash" and rate else b""
    return ww.SamplingRules(
        rate=rate, per_hour=telemetry.samples_per_hour, personal=telemetry.personal, key=key, kept=dict(kept)
    )


def _no_folder(detail: str) -> Degraded:
    return Degraded(
        "no_memory_folder", detail, advice="set telemetry.memory_dir to a tmpfs, or unset telemetry.encrypt"
    )


def _copy(source: Path, target: Path) -> None:
    end = time.monotonic() + _WAIT_S
    for path in sorted(p for p in source.iterdir() if p.is_file()):
        while _locked(path):
            if time.monotonic() > end:
                raise Degraded("rings_in_use", f"{path}: a worker still writes it", advice="end it, and start again")
            time.sleep(0.1)
        fresh = target / f".{path.name}.new"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(path, "rb") as old, os.fdopen(descriptor, "wb") as new:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())
        fresh.rename(target / path.name)


def _locked(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # a file system without locks
    return False
