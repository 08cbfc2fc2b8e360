"""What a person at this device may ask and order: the answers on the control socket, and the routes they stand at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from skerry_contract import ids
from skerry_contract.errors import ContractError

from skerry_agent import exposition, reporting
from skerry_agent.control import Answer, Handler
from skerry_agent.core import why
from skerry_agent.errors import AgentError, Rejected
from skerry_agent.holding import Holding
from skerry_agent.importing import Importing
from skerry_agent.logring import LogRing
from skerry_agent.serving import Serving
from skerry_agent.shadowing import Shadowing
from skerry_agent.throttle import Throttle
from skerry_agent.updating import Updating

MOST_LOG_BYTES = 512 * 1024


class Operating:
    """See the module.

    Args:
        snapshot: what the agent is and does now.
        ask_sync: asks for a sync soon.
        reload: reads the configuration again.
        ring: the log's last lines, None where none are kept.
        restarts: starts of the agent before this one that did not last.
        unstarted: model -> code and detail of the last start that failed.
        lacks: what the group's document requires and this agent does not know; empty for nothing.
    """

    def __init__(
        self,
        serving: Serving,
        updating: Updating,
        shadowing: Shadowing,
        throttle: Throttle,
        holding: Holding,
        *,
        snapshot: Callable[[], reporting.Snapshot],
        ask_sync: Callable[[], None],
        reload: Callable[[], Answer],
        ring: LogRing | None,
        restarts: Callable[[], int],
        unstarted: Mapping[str, tuple[str, str]],
        importing: Importing,
        lacks: Callable[[], str],
    ) -> None:
        self._serving = serving
        self._updating = updating
        self._shadowing = shadowing
        self._throttle = throttle
        self._holding = holding
        self._snapshot = snapshot
        self._ask_sync = ask_sync
        self._reload = reload
        self._ring = ring
        self._restarts = restarts
        self._unstarted = unstarted
        self._importing = importing
        self._lacks = lacks

    def routes(self) -> dict[tuple[str, str], Handler]:
        """Method and path -> who answers."""
        return {
            ("GET", "/skerry/v1/status"): self._status,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/skerry/v1/sync"): self._sync,
            ("POST", "/skerry/v1/revert"): self._revert,
            ("POST", "/skerry/v1/cancel"): self._cancel,
            ("GET", "/skerry/v1/why"): self._why,
            ("POST", "/skerry/v1/activate"): self._activate,
            ("POST", "/skerry/v1/lock"): self._holding.lock,
            ("POST", "/skerry/v1/unlock"): self._holding.unlock,
            ("GET", "/skerry/v1/locks"): self._holding.list_locks,
            ("POST", "/skerry/v1/import"): self._importing.answer,
            ("GET", "/skerry/v1/import"): self._importing.told,
            ("POST", "/skerry/v1/flush"): self._flush,
            ("POST", "/skerry/v1/throttle"): self._throttle.answer,
            ("POST", "/skerry/v1/reload"): self._reload_now,
            ("GET", "/skerry/v1/logs"): self._logs,
        }

    def log_lines(self, most_bytes: int) -> str:
        """The last lines of the log, redacted."""
        return self._ring.tail(most_bytes) if self._ring is not None else ""

    async def _status(self, _body: dict[str, Any]) -> Answer:
        return Answer(
            200,
            {
                **reporting.status(self._snapshot()),
                "shadows": self._shadowing.status(),
                "locks": self._holding.status(),
                "standby": self._updating.turnover.standby.status(),
            },
        )

    async def _why(self, _body: dict[str, Any]) -> Answer:
        snapshot = self._snapshot()
        sync, certificate = snapshot.sync, snapshot.sync["certificate"]
        now_ms, ends_s = snapshot.now_ms, certificate["ends_s"]
        refused = "" if certificate["code"] in ("unreachable", "timeout") else certificate["code"]
        coming = {name: (slot.version, why.STOPPED) for name, slot in self._serving.trying().items()}
        running = {name: (one.version, one.state) for name, one in reporting.running(snapshot).items()}
        facts = replace(
            self._updating.why(),
            running=coming | running,
            sync_code=sync["code"],
            sync_detail=sync["detail"],
            sync_age_s=sync["age_s"],
            membership=sync["membership"] or refused,
            linked=snapshot.linked,
            certificate_left_s=None if ends_s is None else ends_s - now_ms / 1e3,
            restarts=self._restarts(),
            unstarted=self._unstarted,
            lacks=self._lacks(),
        )
        told = [asdict(one) for one in why.explain(facts)]
        return Answer(200, {"device": snapshot.device, "at_ms": now_ms, "told": told})

    async def _metrics(self, _body: dict[str, Any]) -> Answer:
        return Answer(200, exposition.metrics(self._snapshot()))

    async def _sync(self, body: dict[str, Any]) -> Answer:
        pardoned = self._updating.pardon() if body.get("pardon") is True else 0
        self._ask_sync()
        return Answer(200, {"ok": True, "pardoned": pardoned})

    async def _flush(self, _body: dict[str, Any]) -> Answer:
        await self._shadowing.flush()
        return Answer(200, {"ok": await self._serving.flush()})

    async def _logs(self, _body: dict[str, Any]) -> Answer:
        return Answer(200, self.log_lines(MOST_LOG_BYTES).encode())

    async def _reload_now(self, _body: dict[str, Any]) -> Answer:
        return self._reload()

    async def _cancel(self, body: dict[str, Any]) -> Answer:
        try:
            cancelled = self._updating.cancel("a person at the device", str(body.get("model") or ""))
        except Rejected as error:
            return Answer(409, {"error": str(error), "code": error.code})
        told = [
            {"model": one.model, "version": one.version, "digest": one.digest, "state": one.state} for one in cancelled
        ]
        names = ", ".join(f"{one.model} {one.version}" for one in cancelled)
        return Answer(200, {"ok": True, **told[0], "names": names, "also": told[1:]})

    async def _activate(self, body: dict[str, Any]) -> Answer:
        try:
            update, held = self._updating.activate(despite_locks=body.get("despite_locks") is True)
        except AgentError as error:
            return Answer(409, {"error": str(error), "code": error.code})
        told = {"model": update.model, "version": update.version, "digest": update.digest}
        return Answer(200, {"ok": True, **told, "waits_for": held})

    async def _revert(self, body: dict[str, Any]) -> Answer:
        # What should answer and does not start is what a person most wants to leave.
        models = sorted({**self._serving.trying(), **self._serving.models()})
        wanted = body.get("model") or (models[0] if len(models) == 1 else None)
        try:
            if wanted is None:
                raise Rejected("which_model", f"name one of: {', '.join(models) or 'nothing runs'}")
            back = self._updating.order_revert(ids.model_name(wanted))
        except (Rejected, ContractError) as error:
            return Answer(409, {"error": str(error), "code": error.code})
        return Answer(200, {"ok": True, "model": wanted, "version": back.version, "digest": back.digest})
