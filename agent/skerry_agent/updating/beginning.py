"""When a staged update may begin: what holds it before its proof and after it, and a person's order to go on.

What can hold one is ``holding``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from skerry_agent.clock import Clock
from skerry_agent.core import backoff
from skerry_agent.core import effects as e
from skerry_agent.core.lifecycle import Update
from skerry_agent.holding import Holding

_WARM_S, _WARM_POLL_S = 30.0, 0.1
"""So long a worker that proved itself is kept for what came to hold it meanwhile, a short lock say."""


class Beginning:
    """See the module.

    Args:
        update: the one under way, as it is stored.
        draw: uniform in [0, 1), for the waits.
        scale: of the waits.
    """

    def __init__(
        self,
        holding: Holding,
        clock: Clock,
        *,
        update: Callable[[], Update],
        draw: Callable[[], float],
        scale: float,
    ) -> None:
        self._holding = holding
        self._clock = clock
        self._update = update
        self._draw = draw
        self._scale = scale
        self._held_in_proof, self._looks_again_s = ("", 0), 0.0

    def why_held(self) -> str:
        """What holds the update, in words; empty when nothing does."""
        return self._holding.why(self._update())

    def pause(self) -> str | None:
        """What it waits for though nothing holds it, in words; None where it does not."""
        update, left_s = self._update(), self._looks_again_s - self._clock.boot_s()
        if update.state != "ready" or self._held_in_proof[0] != update.digest or left_s <= 0 or self.why_held():
            return None
        return f"the end of a pause, in {left_s:.0f} s, since locks came while its worker started"

    def look(self) -> e.Event | None:
        """Whether what lies ready may begin, or is held by something else than before; None where neither is so."""
        update = self._update()
        if update.state != "ready":
            return None
        why_held = self.why_held()
        if not why_held:
            return e.Opened() if self.pause() is None else None
        return e.Held(detail=why_held) if why_held != update.detail else None

    def order(self, *, despite_locks: bool) -> str:
        """A person wants what lies ready to begin now. Returns what still holds it; empty when nothing does."""
        why_held = self._holding.order(self._update(), despite_locks=despite_locks)
        self._looks_again_s = 0.0
        return why_held

    async def free_to_begin(self, deadline_s: float | None) -> str:
        """What holds the update after its proof, where it was taken in the middle of that; its worker waits for the end of it, for a while.

        Args:
            deadline_s: of the proof, by the loop's clock.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _WARM_S * self._scale
        if deadline_s is not None:
            end_s = min(end_s, deadline_s - _WARM_S / 3)
        while (why_held := self.why_held()) and loop.time() < end_s:
            await asyncio.sleep(_WARM_POLL_S)
        return why_held

    def look_later(self) -> None:
        """A worker was started for nothing: the next is, after a wait that grows with each. Who locks for short times, again and again, must not have one started each time."""
        update = self._update()
        digest, times = self._held_in_proof
        times = times + 1 if digest == update.digest else 1
        self._held_in_proof = (update.digest, times)
        wait_s = backoff.delay_s("update", times, self._draw(), scale=self._scale)
        self._looks_again_s = self._clock.boot_s() + wait_s
