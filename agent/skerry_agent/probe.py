"""Asks the agent's own endpoint whether it answers, as an application would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

_REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"


async def answers(address: Mapping[str, Any], timeout_s: float) -> bool:
    """Whether the endpoint answers ``GET /v2/health/live`` in time, be it only to ask who that is.

    Args:
        address: ``host`` and ``port``, or ``socket``.
        timeout_s: for all of it.
    """
    try:
        async with asyncio.timeout(timeout_s):
            if "port" in address:
                reader, writer = await asyncio.open_connection(address["host"], address["port"])
            else:
                reader, writer = await asyncio.open_unix_connection(address["socket"])
            try:
                writer.write(_REQUEST)
                status = (await reader.readline()).split(b" ")[1]
                return int(status) < 500
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError, ValueError, IndexError):
        return False
