"""The log that an operator asks for from afar: one courier at a time takes it to the server, which asks in ``/self``.

A request is answered once. What does not get through is tried again a few times, and with every sync for as long as the server
still asks; what the server refuses is not sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from skerry_agent.core import backoff
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Transient
from skerry_agent.logring import LogRing
from skerry_agent.logs import kv

log = logging.getLogger(__name__)

MOST_BYTES: Final = 512 * 1024
TRIES: Final = 5


class AskedLogs:
    """Answers requests. ``latest``: the number asked for last; 0 before.

    Args:
        ring: the log's last lines; None where none are kept.
        errand_input: the fields that every errand has; timeout_s: of one.
        draw: uniform in [0, 1), for the waits, which are ``scale`` times the usual ones.
    """

    def __init__(
        self,
        errands: Errands,
        ring: LogRing | None,
        *,
        errand_input: Callable[[], dict[str, Any]],
        timeout_s: float,
        draw: Callable[[], float],
        scale: float,
    ) -> None:
        self._errands = errands
        self._ring = ring
        self._errand_input = errand_input
        self._timeout_s = timeout_s
        self._draw = draw
        self._scale = scale
        self.latest = self._done = 0
        self._task: asyncio.Task[None] | None = None

    def asked(self, number: object) -> None:
        """The server asks for the log under this number; 0 for not."""
        if type(number) is not int or number <= 0 or number == self._done:
            return
        self.latest = number
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send(number), name="logs")

    async def stop(self) -> None:
        """Ends what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _send(self, number: int) -> None:
        for failures in range(1, TRIES + 1):
            lines = self._ring.tail(MOST_BYTES) if self._ring is not None else ""
            message = {**self._errand_input(), "number": number, "lines": lines}
            try:
                sent = await self._errands.run("logs", message, timeout_s=self._timeout_s)
            except AgentError as error:
                if not (isinstance(error, Transient) or error.code == "bad_nonce"):
                    log.warning("log refused", extra=kv(request=number, code=error.code, detail=error.detail))
                    break
                log.warning("log not sent", extra=kv(request=number, code=error.code, detail=error.detail))
                await asyncio.sleep(backoff.delay_s("sync", failures, self._draw(), scale=self._scale))
                continue
            else:
                left_out = sent.get("left_out")
                log.info("log sent", extra=kv(request=number, bytes=sent.get("bytes"), left_out=left_out))
                break
        else:
            return
        self._done = number
