"""Bringing back what ran: after a start of the agent, after a failed trial, when a person or a crash loop asks for it.

What comes back proves itself like any other generation before it answers. A bundle whose files are damaged is no slot any more,
so that the plan fetches it again; a model that does not start is replaced by what it was before, else left out, and keeps no
other model down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from skerry_agent.errors import AgentError, Degraded
from skerry_agent.logs import kv
from skerry_agent.serving import Serving
from skerry_agent.slots import Slot, Slots

log = logging.getLogger(__name__)

_NOT_THE_BUNDLE = frozenset({"start_timeout", "not_enough_memory"})
"""A busy or small moment of this device: the same bundle is tried again."""


class Restoring:
    """See the module.

    Args:
        on_damage: a slot was set aside: model, slot, what is wrong with it.
    """

    def __init__(self, slots: Slots, serving: Serving, *, on_damage: Callable[[str, Slot, str], None]) -> None:
        self._slots = slots
        self._serving = serving
        self._on_damage = on_damage

    async def bring_up(
        self,
        wanted: Mapping[str, Slot],
        *,
        timeout_s: float,
        without_substitute: str = "",
        still: Callable[[], bool] = lambda: True,
    ) -> dict[str, Slot]:
        """Starts these models and hands over to them. Returns what came up in the end.

        Args:
            without_substitute: a model that comes up as wanted or not at all.
            still: whether it is to serve now, asked once it could; else it is ended, and nothing came up.

        Raises:
            AgentError: why nothing came up; what served before still does.
        """
        models = dict(wanted)
        failed: dict[str, set[str]] = {model: set() for model in models}
        while True:
            await self._open(models, failed, without_substitute)
            try:
                launch = await self._serving.start(models, timeout_s=timeout_s, awake=without_substitute)
                if not still():
                    await self._serving.retire(launch)
                    return {}
                await self._serving.switch(launch)
                return models
            except AgentError as error:
                log.error("what ran does not start", extra=kv(code=error.code, detail=error.detail))
                culprits = await self._culprits(models, error)
                if not culprits or without_substitute in culprits:
                    raise
                for model in culprits:
                    failed[model].add(models.pop(model).digest)
                    substitute = self._slots.runnable(model, unless=failed[model])
                    if substitute is not None:
                        models[model] = substitute
                if not models:
                    raise

    async def _open(self, models: dict[str, Slot], failed: dict[str, set[str]], without_substitute: str) -> None:
        """Opens what is encrypted, one by one: a model that cannot be opened is replaced or left out, and keeps no other down.

        Raises:
            AgentError: nothing is left, or ``without_substitute`` is what cannot be opened.
        """
        for model in list(models):
            while model in models:
                slot = models[model]
                try:
                    await self._serving.site.open_bundles([(slot.digest, slot.variant)])
                    break
                except AgentError as error:
                    log.error(
                        "encrypted bundle not opened", extra=kv(model=model, code=error.code, detail=error.detail)
                    )
                    fault = await asyncio.to_thread(self._slots.fault, slot)
                    if fault:
                        self._slots.set_aside(slot.digest)
                        self._on_damage(model, slot, fault)
                    failed[model].add(slot.digest)
                    substitute = self._slots.runnable(model, unless=failed[model])
                    if model == without_substitute or (substitute is None and len(models) == 1):
                        raise
                    del models[model]
                    if substitute is not None:
                        models[model] = substitute

    def look_at_files(self, models: Mapping[str, Slot]) -> None:
        """Sets aside, in a while, what of it is here and damaged."""
        here = {name: slot for name, slot in models.items() if self._slots.path(slot.digest).exists()}
        if here:
            self._serving.site.background(self._set_aside(here))

    async def _set_aside(self, models: Mapping[str, Slot]) -> set[str]:
        """Models whose files are damaged. Their slots are set aside, so that what is fetched starts anew."""
        found: set[str] = set()
        for model, slot in models.items():
            fault = await asyncio.to_thread(self._slots.fault, slot)
            if fault:
                found.add(model)
                self._slots.set_aside(slot.digest)
                self._on_damage(model, slot, fault)
        return found

    async def _culprits(self, models: Mapping[str, Slot], error: AgentError) -> set[str]:
        found = await self._set_aside(models)
        if found or isinstance(error, Degraded) or error.code in _NOT_THE_BUNDLE:
            return found
        if error.model in models:
            return {error.model}
        # A worker that died while it loaded one model can only mean that one.
        return set(models) if len(models) == 1 else set()
