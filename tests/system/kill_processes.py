"""The living processes of a fleet that carries a mark, and their end by SIGKILL.

A kill counts only when it is what ended the process: it is stopped first (SIGSTOP), found stopped, and only then killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from skerry_cli.demo.processes import start_time

MARK = "TEST_KILLS_FLEET"
"""Environment variable by which every process of the fleet is known."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A living process of the fleet."""

    pid: int
    parent: int
    command: str


def members(mark: str) -> list[Member]:
    """Every living process that carries the fleet's mark in its environment."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if fields[0] not in ("Z", "X"):
                found.append(Member(pid=int(folder.name), parent=int(fields[1]), command=command))
    return found


def children(pid: int) -> Iterator[tuple[int, str]]:
    """Living children of a process with their command lines."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{child}/cmdline").read_bytes()
                    if line:
                        yield int(child), line.replace(b"\0", b" ").decode(errors="replace").strip()


def kill_9(pid: int) -> bool:
    """Ends a process by SIGKILL and sees it go. False when it had ended, or ended by itself before it could be stopped."""
    began = start_time(pid)
    if began is None:
        return False
    try:
        os.kill(pid, signal.SIGSTOP)
        if not soon(lambda: _state(pid) == "T" or start_time(pid) != began) or start_time(pid) != began:
            return False
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    assert soon(lambda: start_time(pid) != began), f"process {pid} survived SIGKILL"
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def soon(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
