"""Hands the worker's log lines to the supervisor, whose ring keeps them; they stand on standard error all the same.

Lines of our own loggers only, bounded in length and number: what comes too fast is counted and not sent. An exception goes along as its
type and where it came from: its words may quote values of a request, and the ring leaves the device on request.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from skerry_agent import workerwire as ww

BURST: Final = 50
PER_S: Final = 1.0
MOST_CHARS: Final = 2000
_FRAMES = 8
_OURS = ("skerry_agent", "skerry_runtime")


class Loop(Protocol):
    """What is needed of the event loop."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> object:
        """See asyncio."""


class Telling(logging.Handler):
    """Takes records from any thread; ``send`` is called in the loop's. Ends with ``end``."""

    def __init__(
        self, loop: Loop, send: Callable[[ww.Message], None], *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._loop = loop
        self._send = send
        self._now_s = now_s
        self._at_s = now_s()
        self._left = float(BURST)
        self._unsaid = 0
        logging.getLogger().addHandler(self)

    def end(self) -> None:
        """Takes nothing more."""
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a record, or counts it."""
        if record.name.partition(".")[0] not in _OURS:
            return
        now_s = self._now_s()
        self._left = min(float(BURST), self._left + (now_s - self._at_s) * PER_S)
        self._at_s = now_s
        if self._left < 1.0:
            self._unsaid += 1
            return
        self._left -= 1.0
        try:
            said = ww.Logged(
                at_s=record.created,
                level=record.levelno,
                logger=record.name,
                text=record.getMessage()[:MOST_CHARS],
                trace=_trace(record),
                unsaid=self._unsaid,
            )
            self._unsaid = 0
            # Also in the loop's own thread: a line that is said while a message is sent must not be sent inside it.
            self._loop.call_soon_threadsafe(self._send, said)
        except RuntimeError:
            return  # the loop is closed: the worker is gone
        except Exception:
            self.handleError(record)


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    frames = traceback.extract_tb(record.exc_info[2])[-_FRAMES:]
    where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{record.exc_info[0].__name__} at {where}"[:MOST_CHARS]
