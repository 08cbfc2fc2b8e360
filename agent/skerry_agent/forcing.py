"""Forced floors: what must not answer any more stops, whoever still assigns it.

The approvers sign them with the catalog; a device remembers the highest that it saw, so that neither a stolen server nor an
expired catalog takes one back. What stands below one is no way back and no start any more (``Slots.forbidden``). What serves below
one is given up here: an update of it ends, and of what rests the bundle before it comes back where that may serve, else the model
answers nothing until the plan brings a permitted bundle.
"""

from __future__ import annotations

import logging

from skerry_contract import floors

from skerry_agent.clock import Clock
from skerry_agent.core import effects as e
from skerry_agent.logs import kv
from skerry_agent.remembered import Remembered
from skerry_agent.serving import Serving
from skerry_agent.slots import Slots
from skerry_agent.updating import Updating

log = logging.getLogger(__name__)

CODE = "below_forced_floor"
_AGAIN_S, _MOST_S = 5.0, 900.0
"""When what remains did not come up, it is tried again after so long, each time after twice as long up to the latter."""


class Forcing:
    """See the module.

    Attributes:
        comes_first: an update was ended for the sake of what must stop: none is taken up before that has stopped.
    """

    def __init__(
        self, remembered: Remembered, slots: Slots, serving: Serving, updating: Updating, clock: Clock
    ) -> None:
        self._remembered = remembered
        self._slots = slots
        self._serving = serving
        self._updating = updating
        self._clock = clock
        self._tries, self._tried_s = 0, float("-inf")
        self._forced: dict[str, str] = {}
        self.comes_first = False
        self.recall()
        slots.forbidden = lambda model, version: not floors.allows(self._forced, model, version)

    def recall(self) -> None:
        """Goes by the remembered floors from now on, and looks at once where they are others."""
        forced = dict(self._remembered.forced)
        if forced != self._forced:
            self._forced = forced
            self._again()

    def _again(self) -> None:
        self._tries, self._tried_s = 0, float("-inf")

    def tick(self) -> None:
        """Gives up what serves below a forced floor."""
        if not self._forced:
            return
        serving = {**self._serving.trying(), **self._serving.models()}
        below = [(model, slot) for model, slot in sorted(serving.items()) if self._slots.forbidden(model, slot.version)]
        if not below:
            self.comes_first = False
            self._again()
            return
        for model, slot in below:
            # At once, whatever becomes of the rest: what comes in its worker's place may not start for a long time.
            self._serving.refuse(model, slot.digest)
        update = self._updating.update
        wait_s = min(_AGAIN_S * 2**self._tries, _MOST_S)
        if update.resting and not self._updating.at_rest:
            # What is being confirmed is confirmed first.
            return
        if update.state == "revert" or self._clock.boot_s() - self._tried_s < wait_s:
            return
        model, slot = below[0]
        detail = f"{model} {slot.version} is below the forced floor {self._forced[model]}"
        if self._tries and not update.resting and update.state != "ready" and update.digest != slot.digest:
            # It is refused already, and what is under way may be the bundle that takes its place.
            return
        self._tried_s = self._clock.boot_s()
        log.warning("bundle stops", extra=kv(model=model, version=slot.version, digest=slot.digest, code=CODE))
        if update.resting:
            self.comes_first = False
            self._tries += 1
            self._updating.feed(
                e.ForcedOut(
                    model=model,
                    digest=slot.digest,
                    version=slot.version,
                    variant=slot.variant,
                    code=CODE,
                    detail=detail,
                )
            )
        elif update.model == model and update.digest == slot.digest:
            self._updating.feed(e.Failed(code=CODE, detail=detail))
        else:
            # What must not answer does not wait for another update; that one is taken up again, with what it has fetched.
            self.comes_first = True
            self._updating.feed(e.Withdrawn())
            self._tried_s = float("-inf")
