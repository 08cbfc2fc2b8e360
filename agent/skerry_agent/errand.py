"""Runs a courier: a short-lived process with one JSON object in and JSON lines out.

``python -m skerry_agent.courier <verb>`` answers ``{"progress": ...}`` any number of times, then one ``{"ok": ...}`` or
``{"error": {"kind", "code", "detail", "after_s"}}``. What is heavy (TUF, cryptography, downloads) lives there, so that the supervisor
stays small. A courier that dies or says nothing is a transient failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from skerry_agent import scraps
from skerry_agent.errors import Transient, by_kind

COURIER: tuple[str, ...] = (sys.executable, "-P", "-m", "skerry_agent.courier")
_MAX_LINE = 16 << 20
_KEPT_STDERR = 2000
_IN_MEMORY = {"unseal": "folder", "fetch": "opened"}
"""Of these verbs, which field says where in memory the courier works in the clear: one that was killed leaves that there."""
_GRACE_S = 2.0


class Errands:
    """Starts couriers.

    Args:
        command: what to run; the verb is added.
    """

    def __init__(self, command: Sequence[str] = COURIER) -> None:
        self._command = tuple(command)

    async def run(
        self,
        verb: str,
        message: dict[str, Any],
        *,
        timeout_s: float,
        on_progress: Callable[[dict[str, Any]], bool | None] | None = None,
    ) -> dict[str, Any]:
        """One errand.

        Args:
            timeout_s: how long it may take. on_progress: hears each line of progress; who returns True lets it have its whole time again.

        Returns:
            The object under ``ok``.

        Raises:
            AgentError: as the courier reported it; ``Transient`` with ``timeout`` or ``courier_crashed`` when it did not, and
                with ``process_not_started`` when there was no descriptor, memory or process for it.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                verb,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_MAX_LINE,
            )
        except (OSError, RuntimeError) as error:
            # RuntimeError: asyncio may need a thread to wait for the process.
            raise Transient("process_not_started", f"courier {verb}: {type(error).__name__}: {error}") from error
        try:
            async with asyncio.timeout(timeout_s) as limit:

                def take(said: dict[str, Any]) -> None:
                    if on_progress is not None and on_progress(said):
                        limit.reschedule(asyncio.get_running_loop().time() + timeout_s)

                answer, complaint = await asyncio.gather(
                    _converse(process, msgspec.json.encode(message), take), _tail(process)
                )
                await process.wait()
        except TimeoutError:
            raise Transient("timeout", f"courier {verb} took more than {timeout_s:g} s") from None
        except ValueError as fault:
            # A line without end.
            raise Transient("courier_crashed", f"courier {verb}: {fault}") from None
        finally:
            try:
                await _end(process)
            finally:
                if process.returncode and verb in _IN_MEMORY and message.get(_IN_MEMORY[verb]):
                    scraps.tidy(Path(message[_IN_MEMORY[verb]]))
        if answer is None:
            detail = complaint.strip().splitlines()[-1:] or ["no answer"]
            raise Transient("courier_crashed", f"courier {verb} ended with {process.returncode}: {detail[0]}")
        if "ok" in answer:
            return dict(answer["ok"])
        said = answer["error"]
        raise by_kind(str(said.get("kind")), str(said.get("code")), str(said.get("detail", "")), said.get("after_s"))


async def _end(process: asyncio.subprocess.Process) -> None:
    """In order where it hears that: what it was in the middle of is then not held against anything."""
    try:
        with contextlib.suppress(TimeoutError, ProcessLookupError):
            if process.returncode is None:
                process.terminate()
                async with asyncio.timeout(_GRACE_S):
                    await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _converse(
    process: asyncio.subprocess.Process, message: bytes, on_progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(message + b"\n")
        await process.stdin.drain()
        process.stdin.close()
    except (BrokenPipeError, ConnectionResetError):
        pass
    answer: dict[str, Any] | None = None
    while line := await process.stdout.readline():
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(value, dict) and isinstance(value.get("progress"), dict):
            on_progress(value["progress"])
        elif isinstance(value, dict) and (isinstance(value.get("ok"), dict) or isinstance(value.get("error"), dict)):
            answer = value
    return answer


async def _tail(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    kept = b""
    while chunk := await process.stderr.read(65536):
        kept = (kept + chunk)[-_KEPT_STDERR:]
    return kept.decode(errors="replace")
