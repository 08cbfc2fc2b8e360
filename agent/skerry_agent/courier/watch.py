"""A limit on how long a peer may keep this process, whatever it is waiting for.

Socket timeouts bound one silence; a peer that sends a byte now and then passes them for days. An interval timer of the
process does not ask what the code is doing: it raises in the main thread. The process is a courier, so it has one thread
and nothing that the interruption could harm: everything it writes is complete or resumable.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from skerry_agent.errors import Transient


class Overdue(Transient):
    """The peer took too long."""

    def __init__(self, limit_s: float) -> None:
        super().__init__("timeout", f"the peer was too slow: nothing useful within {limit_s:g} s")


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM raises ``SystemExit`` inside, so that what it cuts off can be put right."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Watch:
    """An alarm that can be wound up again. Use in the main thread, one at a time, as a context."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._previous: object = None

    def wind(self, limit_s: float | None = None) -> None:
        """Starts the span again, ``limit_s`` long or as long as before."""
        self._limit_s = limit_s if limit_s is not None else self._limit_s
        # Repeated each second, in case the first raise lands where Python may drop it (a destructor).
        signal.setitimer(signal.ITIMER_REAL, self._limit_s, 1.0)

    def stop(self) -> None:
        """No alarm until the next ``wind``."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        raise Overdue(self._limit_s)

    def __enter__(self) -> Watch:
        self._previous = signal.signal(signal.SIGALRM, self._ring)
        self.wind()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        signal.signal(signal.SIGALRM, self._previous)  # type: ignore[arg-type]
