"""The demo's processes: started in groups of their own, written down, and all ended again.

Every start is recorded in ``run.json`` with the process's start time before anything else happens, so that a run that was
killed can be cleaned up by the next, and a pid that meanwhile belongs to someone else is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from skerry_cli.demo import leash
from skerry_cli.errors import Failed

RECORD = "run.json"
_GRACE_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A process as the record names it. ``since``: its start time as the kernel counts it, in clock ticks."""

    name: str
    pid: int
    since: int


class Processes:
    """The processes of one run.

    Args:
        folder: the demo's folder; logs go to ``logs/<name>.log``.
        leashed: whether they end when this process dies in any way; False when the fleet is to be kept.
    """

    def __init__(self, folder: Path, *, leashed: bool) -> None:
        self._folder = folder
        self._leashed = leashed
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, Started] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdin: bool = False,
        stdout: bool = False,
        leashed: bool | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a program in a session of its own; what it writes goes to its log.

        Args:
            stdin, stdout: whether the caller talks to it through pipes.
        """
        if self._leashed if leashed is None else leashed:
            command = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *command]
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE if stdout else log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"},
            )
        self._running[name] = process
        self._started[name] = Started(name=name, pid=process.pid, since=start_time(process.pid) or 0)
        self._write()
        return process

    def log(self, name: str) -> Path:
        """Where a process's log is."""
        return self._folder / "logs" / f"{name}.log"

    def died(self) -> list[str]:
        """Names of processes that ended by themselves, with their exit codes."""
        return [f"{name} (exit {p.returncode})" for name, p in self._running.items() if p.poll() is not None]

    def tail(self, name: str, lines: int = 12) -> str:
        """The end of a process's log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])
        return ""

    def stop(self, names: Iterable[str] | None = None) -> None:
        """Ends the named processes (all when None) with their groups: SIGTERM, and SIGKILL after a grace."""
        chosen = [name for name in (list(self._running) if names is None else names) if name in self._running]
        groups = [self._running[name].pid for name in chosen]
        for name in chosen:
            _signal_group(self._running[name].pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for name in chosen:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running[name].wait(max(0.05, deadline - time.monotonic()))
        for group in groups:
            # Also a child that its parent left behind; a group without members is no error.
            _signal_group(group, signal.SIGKILL)
        for name in chosen:
            process = self._running.pop(name)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                _close(pipe)
            self._started.pop(name, None)
        self._write()

    def pid(self, name: str) -> int:
        """The pid of a process of this run."""
        return self._running[name].pid

    def wait(self, name: str, timeout_s: float) -> int:
        """Waits for a process to end by itself and returns its exit code.

        Raises:
            Failed: it does not end in time.
        """
        try:
            return self._running[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"{name} did not end within {timeout_s:g} s; see {self.log(name)}") from None

    def _write(self) -> None:
        path = self._folder / RECORD
        staging = path.with_suffix(".new")
        staging.write_text(json.dumps({"processes": [asdict(entry) for entry in self._started.values()]}, indent=1))
        staging.replace(path)


def stop_recorded(folder: Path) -> list[str]:
    """Ends what an earlier run recorded and is still there; returns the names. Never touches a pid with another start time."""
    try:
        entries = [Started(**entry) for entry in json.loads((folder / RECORD).read_bytes())["processes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    mine = [entry for entry in entries if entry.since and start_time(entry.pid) == entry.since]
    for entry in mine:
        _signal_group(entry.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(start_time(e.pid) == e.since for e in mine):
        time.sleep(0.05)
    for entry in mine:
        # The leader may be gone and its group not: a group id is not given out again while it has members.
        _signal_group(entry.pid, signal.SIGKILL)
    (folder / RECORD).unlink(missing_ok=True)
    return [entry.name for entry in mine]


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it is gone, a zombie, or the system has no /proc."""
    try:
        # The name in parentheses may hold anything: fields are counted from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):
            pipe.close()
