"""Workers of a supervisor that was killed: written down while they run, ended by the next one if they do not go by themselves.

A worker goes when its control channel ends; one that hangs does not, and keeps the address of the applications. The record
holds process id, start time and boot id, so that a number that the kernel gave out again is never taken for a worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path

import msgspec

from skerry_agent.logs import kv

log = logging.getLogger(__name__)


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    workers: dict[int, int]


class Roll:
    """The record of living workers. Reads what the former supervisor left.

    Args:
        path: of the record; its folder exists.
        boot_id: of now; a record of another boot names nobody.
    """

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id
        self._ours: dict[int, int] = {}
        self._former: dict[int, int] = {}
        with contextlib.suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
            found = msgspec.json.decode(path.read_bytes(), type=_Record)
            if found.boot_id == boot_id:
                self._former = found.workers

    def former(self) -> list[int]:
        """Workers of former supervisors that still run."""
        self._former = {pid: began for pid, began in self._former.items() if _began(pid) == began}
        return sorted(self._former)

    def end_former(self) -> None:
        """SIGKILL to all of them. What they counted is in their rings."""
        for pid in self.former():
            log.error("worker of a former life ended", extra=kv(pid=pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def add(self, pid: int) -> None:
        """Writes down a worker that was just started."""
        began = _began(pid)
        if began is not None:
            self._ours[pid] = began
            self._write()

    def remove(self, pid: int) -> None:
        """Strikes out a worker that is gone."""
        if self._ours.pop(pid, None) is not None:
            self._write()

    def _write(self) -> None:
        self.former()
        record = _Record(boot_id=self._boot_id, workers={**self._former, **self._ours})
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            temporary.write_bytes(msgspec.json.encode(record))
            temporary.replace(self._path)
        except OSError as error:
            # Only a worker that hangs while its supervisor is killed would be missed.
            log.warning("workers not written down", extra=kv(path=self._path, detail=str(error)))


def _began(pid: int) -> int | None:
    """When a process started, in ticks since boot; None when it is gone, or a corpse that nobody collects.

    The first thread of a killed process may be a corpse while others of it still hold its sockets.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # proc(5): the name in parentheses may hold anything; state is the first field behind it, start time the twentieth.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") and _threads(pid) <= 1 else int(fields[19])


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0
