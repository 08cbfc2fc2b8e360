"""What this device was last told to do: its group, and the group's document and settings, as they were verified.

It lies in the durable state, so that a start without a network goes on with it. What follows from it is ``following``'s.
"""

from __future__ import annotations

import logging

from skerry_contract import group, ids
from skerry_contract.errors import ContractError

from skerry_agent.errors import AgentError, Rejected
from skerry_agent.logs import kv
from skerry_agent.store import Store

log = logging.getLogger(__name__)


class Orders:
    """See the module.

    Args:
        enrolled_in: the group of the enrolment, where no sync brought another.

    Attributes:
        group: this device's.
        document: the group's, None before the first.
        settings: of the document, or the defaults.
    """

    def __init__(self, store: Store, enrolled_in: ids.GroupName) -> None:
        self._store = store
        self.group = ids.group_name(store.get("group", enrolled_in))
        self.document: group.GroupDocument | None = None
        self.settings = group.Settings()

    def recall(self) -> None:
        """Takes up the stored document, if it fits."""
        try:
            self.take(str(self._store.get("group_document", "")))
        except (AgentError, ContractError) as error:
            # Of another group, or of a newer agent that was here: the next sync brings one that fits.
            log.warning("stored group document set aside", extra=kv(code=error.code, detail=str(error)))

    def take(self, text: str) -> None:
        """Goes by a verified document from now on. An empty text changes nothing.

        Raises:
            Rejected: ``malformed_group_document``: it is another group's.
            ContractError: it is no group document.
        """
        if not text:
            return
        document = group.parse(text.encode())
        if document.group != self.group:
            raise Rejected("malformed_group_document", f"wanted group {self.group}, got {document.group}")
        self.document, self.settings = document, document.settings

    def opens_at(self, model: str, digest: str) -> int:
        """When a bundle of a model may begin to answer, seconds since 1970: the group's time, or its rollout's where that is later."""
        plan = self.document.models.get(model) if self.document is not None else None
        rollout = plan.rollout if plan is not None else None
        own = rollout.opens_at if rollout is not None and rollout.candidate.digest == digest else 0
        return max(self.settings.opens_at, own)

    def keep(self, text: str) -> None:
        """The next start goes by this document, too."""
        self._store.put("group_document", text)

    def move(self, name: ids.GroupName) -> None:
        """This device belongs to another group from now on. What the former one ordered holds until the next document."""
        log.info("group changed", extra=kv(before=self.group, now=name))
        self.group = name
        self._store.put("group", name)
