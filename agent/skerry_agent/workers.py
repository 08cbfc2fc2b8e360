"""One worker process: start, talk, end. Which models it serves and when it goes is decided by ``serving``."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from skerry_agent import logs
from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel, pair
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv

log = logging.getLogger(__name__)

_LAST_WORDS_S = 5.0
_HEALTH_S = 60.0
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT})
HEALTH: tuple[str, ...] = (sys.executable, "-P", "-m", "skerry_runtime.engines")
WORKER: tuple[str, ...] = (sys.executable, "-P", "-m", "skerry_agent.worker")


class Worker:
    """A running worker. Made by ``spawn``.

    Attributes:
        pid: of the process.
        exited: done with the exit code when the process is gone and its last message was read; negative for a signal.
    """

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel, silent: asyncio.Event) -> None:
        self._process = process
        self._channel = channel
        self._silent = silent
        self.pid = process.pid
        self.exited: asyncio.Task[int] = asyncio.create_task(self._wait(), name=f"worker-{process.pid}")

    async def _wait(self) -> int:
        code = await self._process.wait()
        # What it sent before it died is still in the channel: windows among it.
        try:
            await asyncio.wait_for(self._silent.wait(), _LAST_WORDS_S)
        except TimeoutError:
            log.warning("channel of a dead worker stays open", extra=kv(pid=self.pid))
        return code

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.returncode is None

    def send(self, message: ww.Message, fd: int | None = None) -> None:
        """Sends a message; dropped when the worker is gone."""
        self._channel.send(message, fd)

    async def end(self, grace_s: float, *, finish_s: float = 0.0) -> int:
        """Asks it to stop, waits, kills. Returns the exit code.

        Args:
            finish_s: how long what is in work may take; ``grace_s`` comes on top, for what is to be done then.
        """
        if self.alive:
            self._channel.send(ww.Stop(finish_s=finish_s))
            try:
                await asyncio.wait_for(asyncio.shield(self.exited), finish_s + grace_s)
            except TimeoutError:
                self.kill()
        code = await asyncio.shield(self.exited)
        self._channel.close()
        return code

    def kill(self) -> None:
        """SIGKILL. What it counted is in its rings."""
        if self.alive:
            log.warning("worker killed", extra=kv(pid=self.pid))
            self._process.kill()

    def close(self) -> None:
        """Gives up the channel of a worker that is gone."""
        self._channel.close()


async def runtime_fault(runtime: str) -> str:
    """Why a runtime does not work here, tried on the smallest model in a process of its own; empty when it does, or is unclear."""
    try:
        process = await asyncio.create_subprocess_exec(
            *HEALTH, runtime, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return ""
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _HEALTH_S)
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            process.kill()
    code = process.returncode or 0
    if code == 1 and said.startswith(b"runtime_missing"):
        return said.decode(errors="replace").strip()
    # Killed from outside, for want of memory say, it tells nothing of the runtime.
    return f"it ends its process with signal {-code}" if code < 0 and -code not in _FROM_OUTSIDE else ""


async def spawn(
    listeners: Sequence[socket.socket],
    on_message: Callable[[Any, int | None], None],
    *,
    command: Sequence[str] = WORKER,
) -> Worker:
    """Starts a worker process with its end of a channel and the listening sockets.

    Raises:
        Degraded: ``process_not_started``: no descriptor, memory or process to be had.
    """
    try:
        return await _spawn(listeners, on_message, command)
    except (OSError, RuntimeError) as error:
        # RuntimeError: asyncio may need a thread to wait for the process.
        raise Degraded(
            "process_not_started", f"worker: {type(error).__name__}: {error}", advice="look at limits and free memory"
        ) from error


async def _spawn(
    listeners: Sequence[socket.socket], on_message: Callable[[Any, int | None], None], command: Sequence[str]
) -> Worker:
    ours, theirs = pair()
    listening = [str(listener.fileno()) for listener in listeners]
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--control-fd",
            str(theirs.fileno()),
            *(part for number in listening for part in ("--listen-fd", number)),
            pass_fds=(theirs.fileno(), *map(int, listening)),
            stdin=asyncio.subprocess.DEVNULL,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    silent = asyncio.Event()
    pid = process.pid

    def heard(message: Any, fd: int | None) -> None:
        if type(message) is ww.Logged:
            logs.keep(record_of(message, pid))
        else:
            on_message(message, fd)

    return Worker(process, Channel(ours, heard, silent.set), silent)


def record_of(said: ww.Logged, pid: int) -> logging.LogRecord:
    """A worker's line as a record of our own log."""
    # No arguments: a percent sign in it is one.
    record = logging.LogRecord(said.logger, said.level, "", 0, said.text, None, None)
    record.created = said.at_s
    fields: dict[str, Any] = {"pid": pid}
    if said.trace:
        fields["trace"] = said.trace
    if said.unsaid:
        fields["unsaid"] = said.unsaid
    record.__dict__["fields"] = fields
    return record
