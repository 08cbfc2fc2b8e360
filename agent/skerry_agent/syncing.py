"""When to ask the repository and the server, and what is taken from the answer.

A bell or the timer starts a sync; the courier fetches and verifies. Taken are the lower bound of time, floors, this device's
group, the group's document, and a new certificate when it is time for one. What a document leads to is ``following``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from skerry_contract import ids, topics
from skerry_contract.errors import ContractError

from skerry_agent.asked_logs import AskedLogs
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import backoff
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Degraded, Rejected, Transient
from skerry_agent.link import Rang
from skerry_agent.logs import kv
from skerry_agent.orders import Orders
from skerry_agent.remembered import Remembered
from skerry_agent.slots import Slots
from skerry_agent.store import Store
from skerry_agent.uplink import Uplink

log = logging.getLogger(__name__)

_LOOK_S = 5.0
"""How long after a device woke up a sync that came due while it slept may wait."""
_RENEW_EVERY_S = 3600.0


class Syncing:
    """See the module.

    Args:
        errand_input: fields that every courier gets.
        on_document: a group document was taken.
        on_orders: what the server orders this device, as it came.
        on_synced: a sync went through: look what follows. on_failed: none did; what is known already may go on.
        on_fault: the store cannot be used any more.
        device: this one's id, which its place within the group's jitter comes from.
        draw: uniform in [0, 1).
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        slots: Slots,
        clock: Clock,
        errands: Errands,
        uplink: Uplink,
        orders: Orders,
        asked_logs: AskedLogs,
        remembered: Remembered,
        *,
        errand_input: Callable[[], dict[str, Any]],
        on_document: Callable[[], None],
        on_orders: Callable[[object], None],
        on_synced: Callable[[], None],
        on_failed: Callable[[], None],
        on_fault: Callable[[Degraded], None],
        device: str,
        draw: Callable[[], float],
    ) -> None:
        self._config = config
        self._store = store
        self._slots = slots
        self._clock = clock
        self._errands = errands
        self._uplink = uplink
        self._orders = orders
        self._asked_logs = asked_logs
        self._remembered = remembered
        self._errand_input = errand_input
        self._on_document = on_document
        self._on_orders = on_orders
        self._on_synced = on_synced
        self._on_failed = on_failed
        self._on_fault = on_fault
        self._device = device
        self._draw = draw
        self._asked = asyncio.Event()
        self._turn = asyncio.Lock()
        self._alone = bool(store.get("alone", False))
        self._errand: asyncio.Task[dict[str, Any]] | None = None
        self._due_s: float | None = None
        self._rung = False
        self._synced_s = 0.0
        self._idle_bells = 0
        self._renew_after_s = 0.0
        self._self_code = self._certificate_code = ""
        self._ended_s = 0.0
        self._status: dict[str, Any] = {"at_ms": 0, "code": "", "detail": "", "membership": ""}
        self._bells: dict[str, int] = dict(store.get("bells", {}))
        self._heard: dict[str, int] = {}

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config

    def status(self) -> dict[str, Any]:
        """When the last sync was, and how it ended; the certificate's end and why it was not renewed."""
        ends_s = self._store.get("certificate", {}).get("ends_s")
        age_s = self._clock.boot_s() - self._ended_s if self._status["at_ms"] else None
        return {**self._status, "age_s": age_s, "certificate": {"ends_s": ends_s, "code": self._certificate_code}}

    # --- when --------------------------------------------------------------------------------------------------------

    def rang(self, bell: Rang) -> None:
        """A bell rang: there may be news, unless its version is known."""
        if self._bells.get(bell.topic) != bell.version:
            self._heard[bell.topic] = bell.version
            share = backoff.spread(self._device, bell.version)
            self.ask(share=share if bell.topic == topics.group_bell(self._orders.group) else 0.0, bell=True)

    def ask(self, *, share: float = 0.0, bell: bool = False) -> None:
        """Asks for a sync soon; with ``share`` so far into the group's jitter, so that a fleet does not come at once.

        Bells that keep ringing and bring nothing new are answered ever less often: a stolen broker cannot keep a device busy.
        """
        due_s = self._clock.boot_s() + share * self._jitter_s()
        if bell:
            due_s = max(due_s, self._synced_s + backoff.bell_pause_s(self._idle_bells))
        if self._due_s is None or due_s < self._due_s:
            self._due_s, self._rung = due_s, bell
        self._asked.set()

    def _jitter_s(self) -> float:
        given = self._config.timing.jitter_s
        if given >= 0:
            return given
        # Nobody else is there to come at the same time.
        return 0.0 if self._alone else self._orders.settings.jitter_s

    async def run(self) -> None:
        """Syncs now, and again whenever it is due."""
        failures, asked_s = 0, 0.0
        while True:
            rung, self._due_s, self._rung = self._rung, None, False
            heard = dict(self._heard)
            before = self._known()
            try:
                await self._sync()
                failures, asked_s = 0, 0.0
                self._bells.update(heard)
                self._store.put("bells", self._bells)
                self._uplink.link.hurry()
            except (AgentError, ContractError) as error:
                failures += 1
                asked_s = error.after_s if isinstance(error, AgentError) else 0.0
                if error.code == "store_damaged" and isinstance(error, Degraded):
                    self._on_fault(error)
                self._failed(error, failures)
                await self._renew_all_the_same()
            except Exception as error:
                # A bug, or an answer that nobody foresaw: no reason to stop serving, and no reason never to ask again.
                failures += 1
                log.exception("sync failed", extra=kv(failures=failures))
                self._failed(Transient("sync_failed", f"{type(error).__name__}: {error}"), failures)
            news = before != self._known()
            self._idle_bells = self._idle_bells + 1 if rung and not news else 0
            self._synced_s = self._clock.boot_s()
            wait_s = self._config.timing.sync_s if self._config.timing.sync_s > 0 else self._orders.settings.sync_s
            wait_s += self._draw() * self._jitter_s()
            if failures:
                scale = self._config.timing.backoff_scale
                # Whoever is overloaded says when to come again; a bell, or a person, may call for it before.
                wait_s = max(asked_s, min(wait_s, backoff.delay_s("sync", failures, self._draw(), scale=scale)))
            await self._until_due(self._synced_s + wait_s)

    def _known(self) -> tuple[Any, ...]:
        """What a bell may ring for: when none of it is new after a sync, the bell was idle."""
        return self._store.get("tuf", {}), self._orders.group, self._asked_logs.latest

    async def _until_due(self, timer_s: float) -> None:
        """Waits for the timer (seconds since boot), or for what was asked for, whichever is due first."""
        while True:
            due_s = timer_s if self._due_s is None else min(timer_s, self._due_s)
            left_s = due_s - self._clock.boot_s()
            if left_s <= 0:
                return
            self._asked.clear()
            with contextlib.suppress(TimeoutError):
                # Sleep of the device is time too, which the loop's own clock does not see: it is looked at again soon.
                await asyncio.wait_for(self._asked.wait(), min(left_s, _LOOK_S))

    # --- what --------------------------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        async with self._turn:
            said: dict[str, Any] = {}
            self._errand = asyncio.get_running_loop().create_task(
                self._ask_courier({}, on_progress=said.update), name="sync-errand"
            )
            try:
                answer = await self._errand
            except AgentError:
                # The metadata cannot be refreshed. What the server says of this device, its orders too, is heard all the same.
                if said:
                    self._membership(said.get("membership"), said.get("self_error"))
                self._on_failed()
                raise
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
                raise Transient("busy", "a person imported a folder meanwhile") from None
            finally:
                self._errand.cancel()
                self._errand = None
            self._take(answer)
        self._note("", "")
        self._on_synced()
        self._uplink.report_if_online()
        held = {"renew_at_s": answer.get("renew_at_s"), "ends_s": answer.get("ends_s")}
        if held != self._store.get("certificate", {}):
            self._store.put("certificate", held)
        await self._renew(held["renew_at_s"])

    async def look_into(self, folder: str, age_s: float, *, on_verified: Callable[[dict[str, Any]], None]) -> None:
        """A sync with a folder that a person carried here: the same checks, and no network. One over the network makes way.

        Args:
            on_verified: gets the courier's answer before anything follows from it.

        Raises:
            AgentError: the folder is refused, and nothing was taken.
        """
        if self._errand is not None:
            # It may hang for a minute and more where there is no network.
            self._errand.cancel()
        async with self._turn:
            answer = await self._ask_courier({"folder": folder, "age_s": age_s})
            on_verified(answer)
            self._take(answer, server_asked=False)
        self._on_synced()
        self._uplink.report_if_online()

    async def _ask_courier(
        self, more: dict[str, Any], *, on_progress: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        named = {model: self._slots.pointers(model) for model in self._slots.models()}
        return await self._errands.run(
            "sync",
            {
                **self._errand_input(),
                "group": self._orders.group,
                "have": {
                    model: [s.digest for s in (p.active, p.confirmed, p.previous) if s is not None]
                    for model, p in named.items()
                },
                "confirmed": sorted(
                    {s.digest for p in named.values() for s in (p.confirmed, p.previous) if s is not None}
                ),
                **more,
            },
            timeout_s=self._config.timing.courier_s,
            on_progress=on_progress,
        )

    def _take(self, answer: dict[str, Any], *, server_asked: bool = True) -> None:
        online_keys = tuple(answer.get("online_keys") or ())
        with self._store.transaction():
            self._store.put("tuf", answer.get("tuf") or {})
            self._remembered.take(
                signed_at_s=float(answer.get("signed_at") or 0.0),
                signed_by=tuple(answer.get("signed_by") or online_keys),
                named=online_keys,
                floors=answer.get("floors") or {},
                forced=answer.get("forced") or {},
            )
        self._remembered.keep()
        if server_asked:
            self._membership(answer.get("membership"), answer.get("self_error"))
        text = str(answer.get("group_document") or "")
        if text:
            self._orders.take(text)
            self._on_document()
            self._orders.keep(text)

    def renew_soon(self) -> None:
        """A person said something: a renewal that was refused is tried again at once."""
        self._renew_after_s = 0.0

    async def _renew_all_the_same(self) -> None:
        """A look that fails must not keep the device from its certificate: without one it is not even heard.

        Who knows no time cannot tell whether it is due. When no broker takes it either, it asks: the server knows.
        """
        renew_at_s = self._store.get("certificate", {}).get("renew_at_s")
        unheard = not self._uplink.link.connected and not self._clock.synced()
        await self._renew(0.0 if renew_at_s is not None and unheard else renew_at_s)

    async def _renew(self, renew_at_s: float | None) -> None:
        """Takes a new certificate when two thirds of the old one's life are over; tries again every hour."""
        now_s = self._clock.boot_s()
        if renew_at_s is None or self._clock.now_s() < renew_at_s or now_s < self._renew_after_s:
            return
        self._renew_after_s = now_s + _RENEW_EVERY_S
        try:
            answer = await self._errands.run("renew", self._errand_input(), timeout_s=self._config.timing.courier_s)
        except AgentError as error:
            log.warning("certificate not renewed", extra=kv(code=error.code, detail=error.detail))
            if error.code != self._certificate_code:
                self._uplink.event("certificate", error.code, {"detail": error.detail[:500]})
            self._certificate_code = error.code
            return
        self._certificate_code = ""
        self._store.put("certificate", {"renew_at_s": answer.get("renew_at_s"), "ends_s": answer.get("expires_s")})
        self._uplink.event("certificate", "", {"expires_s": answer.get("expires_s")})
        self._uplink.link.reconnect()

    def _failed(self, error: AgentError | ContractError, failures: int) -> None:
        code, detail = error.code, error.detail if isinstance(error, AgentError) else str(error)
        known = self._status["code"] == code
        self._note(code, detail)
        log.warning("sync failed", extra=kv(code=code, detail=detail, failures=failures))
        if not known and isinstance(error, (Rejected, Degraded, ContractError)):
            # The repository is there and wrong: worth the server's record. That it is away, the server knows better.
            self._uplink.event("sync", code, {"detail": detail[:500]})

    def _note(self, code: str, detail: str) -> None:
        """How a look ended, now."""
        self._ended_s = self._clock.boot_s()
        self._status = {
            "at_ms": self._clock.instant().wall_ms, "code": code, "detail": detail[:500], "membership": self._self_code,
        }  # fmt: skip

    def _membership(self, found: Any, error: Any) -> None:
        if isinstance(error, dict) and error.get("kind") == "transient":
            # Who was not reached refuses nothing, and takes back nothing that was said before.
            return
        # What the server says of this device when it does not know it any more belongs in the log of the device, too.
        code = str(error.get("code", "")) if isinstance(error, dict) else ""
        if code not in ("", self._self_code):
            log.warning("the server refuses this device", extra=kv(code=code, detail=error.get("detail")))
            self._uplink.event("membership", code, {"detail": str(error.get("detail", ""))[:500]})
        self._self_code = code
        if not isinstance(found, dict) or not found.get("group"):
            return
        alone = found.get("alone") is True
        if alone != self._alone:
            self._store.put("alone", alone)
            self._alone = alone
        self._asked_logs.asked(found.get("logs"))
        self._on_orders(found.get("orders"))
        name = ids.group_name(found["group"])
        if name != self._orders.group:
            self._orders.move(name)
            self._uplink.link.follow(name)
            self.ask()
