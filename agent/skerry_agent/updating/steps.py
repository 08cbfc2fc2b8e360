"""What each effect of the lifecycle's table does; up to a slot it is ``fetching``'s, from a worker on ``turnover``'s."""

from __future__ import annotations

import logging
from collections.abc import Callable

from skerry_contract.errors import ContractError

from skerry_agent.core import effects as e
from skerry_agent.core.effects import Effect
from skerry_agent.core.lifecycle import Update
from skerry_agent.errors import AgentError
from skerry_agent.fetching import Fetching
from skerry_agent.logs import kv
from skerry_agent.slots import Slots
from skerry_agent.turnover import Turnover
from skerry_agent.updating.beginning import Beginning
from skerry_agent.updating.telling import Telling
from skerry_agent.updating.watching import Watching

log = logging.getLogger(__name__)


class Steps:
    """See the module.

    Args:
        update: the one under way, as it is stored.
        deadline_s: of its state, by the loop's clock; None for none.
        judge: looks at the trial's counts.
    """

    def __init__(
        self,
        slots: Slots,
        fetching: Fetching,
        turnover: Turnover,
        beginning: Beginning,
        watching: Watching,
        telling: Telling,
        *,
        update: Callable[[], Update],
        deadline_s: Callable[[], float | None],
        judge: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._fetching = fetching
        self._turnover = turnover
        self._beginning = beginning
        self._watching = watching
        self._telling = telling
        self._update = update
        self._deadline_s = deadline_s
        self._judge = judge

    async def do(self, effect: Effect) -> e.Event | None:
        """Does one. Returns the event that follows from it; None where the next effect does.

        Raises:
            AgentError, ContractError, OSError: why the state fails.
        """
        match effect:
            case Effect.RECORD:
                self._telling.record(self._update())
            case Effect.FETCH_MANIFEST:
                return await self._fetching.fetch_manifest()
            case Effect.ADMIT:
                return self._fetching.admit()
            case Effect.FETCH_FILES:
                return await self._fetching.fetch_files()
            case Effect.VERIFY_FILES:
                return await self._fetching.verify_files()
            case Effect.STAGE_SLOT:
                staged = await self._fetching.stage()
                why_held = self._beginning.why_held()
                return e.Held(detail=why_held) if why_held else staged
            case Effect.START_WORKER:
                proved = await self._turnover.prove()
                why_held = await self._beginning.free_to_begin(self._deadline_s())
                if not why_held:
                    return proved
                await self._turnover.stop_new()
                self._beginning.look_later()
                return e.Held(detail=why_held)
            case Effect.HAND_OVER:
                return await self._turnover.hand_over()
            case Effect.WATCH_TRIAL:
                self._watching.on = True
                self._judge()
            case Effect.CONFIRM:
                self._turnover.confirm()
            case Effect.DISCARD:
                self._fetching.discard()
                return e.Reverted()
            case Effect.STOP_NEW:
                await self._turnover.stop_new()
                return e.Reverted()
            case Effect.RESTORE:
                return await self._turnover.restore()
            case Effect.GIVE_UP:
                await self._turnover.give_up()
        return None

    def counts(self, failed: Update) -> bool:
        """Whether ``PENALISE`` is due for it: whether the failure is held against the bundle."""
        if failed.code == "crash_loop" and not self._slots.whole(failed.digest, failed.variant):
            # This device's own copy rotted: it is fetched again.
            return False
        try:
            # Another variant is taken at once, without a wait.
            return not self._fetching.has_another_variant(failed)
        except (AgentError, ContractError, OSError) as error:
            log.warning("no look at other variants", extra=kv(model=failed.model, detail=str(error)))
            return True
