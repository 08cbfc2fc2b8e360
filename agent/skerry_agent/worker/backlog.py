"""How much a worker has accepted and not yet answered, and what is shed by it.

Two kinds of requests wait in two places. A long one waits in the queue of the inference thread, until those before it are done. A
short one, answered on the loop's thread, has no queue of ours: it waits in the kernel while the loop answers those that
became readable with it, so what bounds its wait is how many are answered in one turn of the loop. For both the rule is
the same, and keeps it short for who is accepted, however many ask:

* at most ``most`` are accepted: queued and under way, or answered in this turn;
* none whose wait, by what those before it should take, is above ``longest_us``; the first is always accepted.

What is shed is told how long what was accepted should take: who comes again then finds it done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Loop(Protocol):
    """What is needed of the event loop."""

    def call_soon(self, callback: Callable[[], None]) -> object:
        """See asyncio: runs in the next turn, after whatever is readable in this one."""


class Backlog:
    """What one worker has accepted. Times are expected ones, microseconds. Every call comes from the event loop's thread.

    Attributes:
        queued: accepted for the inference thread and not yet answered.
    """

    __slots__ = ("_longest_us", "_loop", "_most", "_queued_us", "_turn", "_turn_us", "queued")

    def __init__(self, loop: Loop, *, most: int, longest_us: float) -> None:
        self._loop = loop
        self._most = most
        self._longest_us = longest_us
        self.queued = self._turn = 0
        self._queued_us = self._turn_us = 0.0

    def full(self, *, at_once: bool) -> float:
        """Whether nothing is accepted now, whatever it is: how long to stay away then, else 0.

        Args:
            at_once: whether it would be answered in this turn.
        """
        if at_once:
            return max(1.0, self._turn_us) if self._turn >= self._most else 0.0
        return max(1.0, self._queued_us) if self.queued >= self._most else 0.0

    def enter(self, takes_us: float, gone_us: float = 0.0) -> float:
        """Accepts a request for the inference thread, and returns 0; or how long to stay away, when it must be shed.

        Args:
            takes_us: what it should take.
            gone_us: what the one under way has taken already, of what it should.
        """
        wait_us = max(0.0, self._queued_us - gone_us)
        if self.queued and (self.queued >= self._most or wait_us > self._longest_us):
            return max(1.0, wait_us)
        self.queued += 1
        self._queued_us += takes_us
        return 0.0

    def leave(self, takes_us: float) -> None:
        """One that was accepted for the thread is answered; ``takes_us`` as it entered."""
        self.queued -= 1
        # Nothing is left of rounding either.
        self._queued_us = self._queued_us - takes_us if self.queued else 0.0

    def at_once(self, takes_us: float) -> float:
        """Accepts a request that is answered in this turn, and returns 0; or how long to stay away."""
        if not self._turn:
            self._loop.call_soon(self._next_turn)
        elif self._turn >= self._most or self._turn_us > self._longest_us:
            return max(1.0, self._turn_us)
        self._turn += 1
        self._turn_us += takes_us
        return 0.0

    def _next_turn(self) -> None:
        self._turn = 0
        self._turn_us = 0.0
