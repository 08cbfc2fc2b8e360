"""What ``telemetry.encrypt`` means on this device: where raw values lie, and what is sealed.

* Samples are sealed (``sealing``) before they are put into the outbox, and opened when they are sent.
* Recorder rings and label books hold values and predictions in the clear, are written at every request, and are of no use after
  a reboot anyway. They are kept in memory: ``state_dir/rings`` becomes a link to a folder on a tmpfs, which outlives killed
  processes and no power cut. Nothing of them reaches the disk but by swapping.

Switching either way takes along what is there: a ring that was not folded yet is folded from its new place.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from skerry_agent import workerwire as ww
from skerry_agent.config import Config
from skerry_agent.errors import Degraded
from skerry_agent.sealing import CannotOpen, Sealer, is_sealed, telemetry_key

IN_MEMORY = ("tmpfs", "ramfs")
_WAIT_S = 10.0
"""A worker whose supervisor was killed is gone by then, and gives up its rings."""


def prepare(config: Config) -> None:
    """Puts the folder of rings where the configuration wants it. Before any worker is started.

    Raises:
        Degraded: ``no_memory_folder`` when ``telemetry.memory_dir`` is no place in memory of our own; ``rings_in_use``;
            ``no_cipher``.
    """
    folder, former = config.state_dir / "rings", config.state_dir / "rings.former"
    if config.telemetry.encrypt:
        Sealer(telemetry_key(config.identity_dir))  # says now what it would say at the first sample
        target = _memory_folder(config)
        if not folder.is_symlink():
            if folder.exists():
                _copy(folder, target)
                folder.rename(former)
            folder.symlink_to(target)
        elif folder.readlink() != target:
            if folder.exists():
                _copy(folder, target)
            folder.unlink()
            folder.symlink_to(target)
    elif folder.is_symlink():
        here = config.state_dir / "rings.new"
        here.mkdir(mode=0o700, exist_ok=True)
        if folder.exists():
            _copy(folder, here)
            shutil.rmtree(folder.readlink(), ignore_errors=True)
        folder.unlink()
        here.rename(folder)
    # What a crash in the middle left: all of it was copied before it got this name.
    shutil.rmtree(former, ignore_errors=True)


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


def _memory_folder(config: Config) -> Path:
    parent = Path(config.telemetry.memory_dir)
    kind = file_system(parent)
    if kind not in IN_MEMORY:
        raise _no_folder(f"{parent}: wanted a tmpfs, it is {kind or 'not there'}")
    name = hashlib.sha256(str(config.state_dir).encode()).hexdigest()[:16]
    folder = parent / f"skerry-{os.getuid()}-{name}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Others may write beside it: a link or a folder of theirs under our name is refused.
        found = os.lstat(folder)
    except OSError as error:
        raise _no_folder(f"{folder}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise _no_folder(f"{folder}: wanted a folder of ours with mode 0700")
    return folder


def _no_folder(detail: str) -> Degraded:
    return Degraded(
        "no_memory_folder", detail, advice="set telemetry.memory_dir to a tmpfs, or unset telemetry.encrypt"
    )


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that a folder lies on; empty when it is not there."""
    if not path.is_dir():
        return ""
    real = path.resolve()
    best, kind = -1, ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        point = Path(parts[1].replace("\\040", " "))
        # Of two mounts on one folder the later one is seen.
        if (real == point or point in real.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), parts[2]
    return kind


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
