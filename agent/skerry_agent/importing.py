"""Updates that a person carries here: a signed folder is looked at as the repository is, and is asked first for what follows from it.

``POST /skerry/v1/import`` names a folder; a courier verifies what it says, and from then on the couriers of this device's updates find
manifests and files there. No network is needed. What became of it stands in ``GET /skerry/v1/import`` and goes to the server, when the link is
back, as two events ``import``: what was taken or refused, and how it ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from skerry_contract import group, wire
from skerry_contract.errors import ContractError

from skerry_agent.config import Config
from skerry_agent.control import Answer
from skerry_agent.core.lifecycle import Update
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.logs import kv
from skerry_agent.store import Store
from skerry_agent.syncing import Syncing
from skerry_agent.updating import Updating

log = logging.getLogger(__name__)

_KEY = "import"
_MOST_CHARS = 4096
_MOST_TOLD = 32


class Importing:
    """See the module.

    Args:
        ready: whether anything may be taken up now.
        on_event: something to tell the server: name, code, data.
        running: what answers, by model, for whoever asks what came of it.
        document: the group's that holds already.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        syncing: Syncing,
        updating: Updating,
        *,
        ready: Callable[[], bool],
        on_event: Callable[[str, str, dict[str, Any]], None],
        running: Callable[[], dict[str, wire.Running]],
        document: Callable[[], group.GroupDocument | None],
    ) -> None:
        self._config = config
        self._store = store
        self._syncing = syncing
        self._updating = updating
        self._ready = ready
        self._on_event = on_event
        self._running = running
        self._document = document
        self._task: asyncio.Task[None] | None = None
        self._now: dict[str, Any] = dict(store.get(_KEY, {}))
        # What was taken before, while another folder is looked at or was refused.
        self._before: dict[str, Any] = self._now.pop("behind", {})
        if self._now.get("state") == "checking":
            # The agent ended in the middle, and nothing was taken: the person asks again.
            self._now, self._before = self._before, {}

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config

    @property
    def active(self) -> bool:
        """Whether updates may come from a folder now."""
        return bool(self._taken)

    @property
    def _taken(self) -> dict[str, Any]:
        """The import that lasts; empty without one."""
        return self._now if self._now.get("state") == "taken" else self._before

    def brings(self, digest: str) -> bool:
        """Whether the bundle comes with the folder: it was in the group's document when that was taken, and the import has not ended."""
        return digest in self._taken.get("digests", ())

    def fields(self) -> dict[str, Any]:
        """What the couriers of updates get beside the rest."""
        if not self.active:
            return {}
        return {"folder": self._taken["folder"], "age_s": self._config.updates.import_age_s}

    async def answer(self, body: dict[str, Any]) -> Answer:
        """``POST /skerry/v1/import`` with ``folder``: begins. What becomes of it says ``told``."""
        folder = body.get("folder")
        if not isinstance(folder, str) or not folder.startswith("/") or len(folder) > _MOST_CHARS or "\0" in folder:
            return Answer(
                400, {"error": f"folder: wanted an absolute path, got {folder!r:.200}", "code": "bad_request"}
            )
        if self._task is not None and not self._task.done():
            return Answer(409, {"error": f"{self._now['folder']} is being looked at", "code": "busy"})
        if not self._ready():
            return Answer(409, {"error": "the agent is starting, or stopping: try again soon", "code": "busy"})
        if not os.access(f"{folder}/.", os.R_OK | os.X_OK):
            error = f"{folder}: wanted a folder that is there, and that the agent's user {os.geteuid()} may read"
            return Answer(409, {"error": error, "code": "folder_unreadable"})
        # A folder that is no good, a mistyped one say, takes nothing from the one before.
        self._before = self._taken
        self._now = {"folder": folder, "state": "checking"}
        self._task = asyncio.get_running_loop().create_task(self._take(folder), name="import")
        return Answer(200, {"ok": True, **self.status()})

    async def told(self, _body: dict[str, Any]) -> Answer:
        """``GET /skerry/v1/import``."""
        return Answer(200, self.status())

    def status(self) -> dict[str, Any]:
        """``state``: none, checking, refused (``code``, ``detail``), taken or ended; ``updates`` that came to rest; ``running``."""
        running = {model: {"version": one.version, "state": one.state} for model, one in self._running().items()}
        told = {name: value for name, value in self._now.items() if name not in ("before", "digests")}
        return {"state": "none", "folder": "", "code": "", "detail": "", "updates": [], **told, "running": running}

    async def _take(self, folder: str) -> None:
        try:
            await self._syncing.look_into(
                folder, self._config.updates.import_age_s, on_verified=lambda answer: self._begin(folder, answer)
            )
        except (AgentError, ContractError) as error:
            self._refuse(folder, error.code, error.detail if isinstance(error, AgentError) else str(error))
            return
        except Exception as error:
            # A bug, or an answer that nobody foresaw.
            log.exception("import failed", extra=kv(folder=folder))
            self._refuse(folder, "sync_failed", f"{type(error).__name__}: {error}")
            return
        self._updating.fetch_anew()
        self.rested()

    def _begin(self, folder: str, answer: dict[str, Any]) -> None:
        # Behind what was verified, before what follows from it.
        before = self._key(self._updating.update)
        text = answer.get("group_document")
        document = group.parse(str(text).encode()) if text else self._document()
        self._before = {}
        self._now = {
            "folder": folder,
            "state": "taken",
            "tuf": answer.get("tuf") or {},
            "updates": [],
            "before": before,
            "digests": _digests(document) if document is not None else [],
        }
        self._keep()
        self._updating.failures.hurry()
        log.info("import taken", extra=kv(folder=folder, tuf=self._now["tuf"]))
        self._on_event("import", "", {"state": "taken", "folder": folder, "tuf": self._now["tuf"]})

    def _refuse(self, folder: str, code: str, detail: str) -> None:
        self._now = {"folder": folder, "state": "refused", "code": code, "detail": detail[:500]}
        self._keep()
        log.warning("import refused", extra=kv(folder=folder, code=code, detail=detail))
        self._on_event("import", code, {"state": "refused", "folder": folder, "detail": detail[:500]})

    def rested(self) -> None:
        """An update came to rest, or none was begun. When nothing of the folder will be tried again either, the import has ended."""
        if not self.active or not self._ready():
            # Whoever starts looks at what follows first, and then here.
            return
        update = self._updating.update
        self._note(update)
        goes_on = not self._updating.at_rest or self._updating.returning.owed is not None
        over = self._taken
        if goes_on or not self._updating.failures.may_come().isdisjoint(over.get("digests", ())):
            return
        if over is self._now:
            self._now = {**over, "state": "ended"}
        self._before = {}
        self._keep()
        running = {model: one.version for model, one in self._running().items()}
        failed = [one for one in over["updates"] if one["code"]]
        log.info("import ended", extra=kv(folder=over["folder"], running=running, failed=len(failed)))
        data = {"state": "ended", "folder": over["folder"], "updates": over["updates"], "running": running}
        self._on_event("import", failed[-1]["code"] if failed else "", data)

    def _note(self, update: Update) -> None:
        """Remembers how an update ended that began after the folder was taken."""
        word = {
            "model": update.model, "version": update.version, "state": update.state, "code": update.code,
            "detail": update.detail,
        }  # fmt: skip
        if not update.resting or not update.model or self._key(update) == self._taken.get("before"):
            return
        others = [
            one for one in self._taken["updates"] if (one["model"], one["version"]) != (update.model, update.version)
        ]
        self._taken["updates"] = [*others, word][-_MOST_TOLD:]
        self._keep()

    @staticmethod
    def _key(update: Update) -> list[Any]:
        return [update.digest, update.state, update.since.boot_id, update.since.boot_ns]

    def _keep(self) -> None:
        try:
            self._store.put(_KEY, {**self._now, **({"behind": self._before} if self._before else {})})
        except Degraded as error:
            log.warning("import not noted", extra=kv(code=error.code, detail=error.detail))

    async def stop(self) -> None:
        """Leaves it where it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _digests(document: group.GroupDocument) -> list[str]:
    """Every bundle that the document gives to anybody."""
    targets = [target for pinned in document.pins.values() for target in pinned.values()]
    for plan in document.models.values():
        candidate = plan.rollout.candidate if plan.rollout is not None else None
        targets += [one for one in (plan.stable, plan.fallback, plan.shadow, candidate, *plan.via) if one is not None]
    return sorted({target.digest for target in targets})
