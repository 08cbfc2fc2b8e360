"""What served, or is loaded when it is asked for, and does not start any more.

Whoever starts it goes on trying. Here is said that it fails, ever less often; damaged files are set aside, so that the plan fetches them
again; and a bundle that failed ``lifecycle.CRASHES`` times since it last started, for no fault of this device, gives way to the one
before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from skerry_agent.core.culprits import NOT_THE_BUNDLE
from skerry_agent.core.lifecycle import CRASHES
from skerry_agent.errors import AgentError
from skerry_agent.slots import Slot

_DAMAGE = frozenset({"model_damaged", "hash_mismatch", "size_mismatch", "malformed_manifest"})

OnEvent = Callable[[str, str, dict[str, Any]], None]


class Unstarted:
    """See the module.

    Args:
        on_event: reports: about what, code, data.
        on_damage: looks at the files of these models.
        go_back: gives a bundle up for the one before it, and why; answers whether it is done.

    Attributes:
        last: model -> code and detail of the last start that failed, until one did not.
    """

    def __init__(
        self,
        *,
        on_event: OnEvent,
        on_damage: Callable[[Mapping[str, Slot]], None],
        go_back: Callable[[str, Slot, str], bool],
    ) -> None:
        self._on_event = on_event
        self._on_damage = on_damage
        self._go_back = go_back
        self._failed: Counter[str] = Counter()
        self._own: Counter[str] = Counter()
        self.last: dict[str, tuple[str, str]] = {}

    def started(self, models: Mapping[str, Slot]) -> None:
        """These did start: what was before counts no more."""
        for name, slot in models.items():
            self.last.pop(name, None)
            del self._failed[slot.digest], self._own[slot.digest]

    def failed(self, models: Mapping[str, Slot], error: AgentError) -> None:
        """They did not. ``error.model`` is the one for which, where that is known."""
        digests = {name: slot.digest for name, slot in models.items()}
        culprit = models.get(error.model)
        counted = digests.values() if culprit is None else (culprit.digest,)
        self._failed.update(counted)
        self.last.update(dict.fromkeys(models if culprit is None else (error.model,), (error.code, error.detail[:500])))
        times = max((self._failed[digest] for digest in counted), default=1)
        if times & (times - 1) == 0:
            self._on_event("worker", error.code, {"models": digests, "detail": error.detail[:500], "starts": times})
        if error.code in _DAMAGE:
            self._on_damage(models)
        if culprit is None or error.code in NOT_THE_BUNDLE:
            return
        self._own[culprit.digest] += 1
        if self._own[culprit.digest] >= CRASHES:
            why = f"did not start {self._own[culprit.digest]} times, last: {error.code}: {error.detail}"
            if self._go_back(error.model, culprit, why):
                del self._own[culprit.digest]
