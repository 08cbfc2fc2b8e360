"""Everything that leaves for the server, and what the server says back: the session, births, state, events, the outbox.

It owns the link and what is on its way. What a bell or a refusal leads to is not decided here: a bell goes to ``on_bell``, a
store that cannot be used to ``on_fault``. Nothing here waits for the network.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from skerry_contract import ids, topics, wire

from skerry_agent import at_rest, reporting
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.errors import Degraded
from skerry_agent.identity import Identity
from skerry_agent.link import Down, Happening, Link, Rang, Up, tls_context
from skerry_agent.logs import kv
from skerry_agent.store import Entry, Store
from skerry_agent.upload import Upload

log = logging.getLogger(__name__)

_COMPACT_S, _REST_S = 0.02, 0.05
"""An outbox above its bound is compacted for so long, then the loop does its other work: links, workers, ``status``."""
_LEAST_PUBACK_S = 5.0
"""A busy broker takes a moment, however short ``timing.ack_s`` is."""
_AGAIN_S = 60.0
"""After what nobody foresaw: a bug that shows at every look must not keep the loop and the log busy."""


class Uplink:
    """See the module.

    Args:
        state: what is said of this device now.
        on_bell: a bell rang: its topic and version.
        on_fault: the store cannot be used any more.
        draw: uniform in [0, 1).
        plain_mqtt: no TLS; for tests on loopback.

    Attributes:
        link: the session.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        store: Store,
        clock: Clock,
        *,
        state: Callable[[], wire.State],
        on_bell: Callable[[Rang], None],
        on_fault: Callable[[Degraded], None],
        draw: Callable[[], float],
        plain_mqtt: bool = False,
    ) -> None:
        self._identity = identity
        self._store = store
        self._clock = clock
        self._state = state
        self._on_bell = on_bell
        self._on_fault = on_fault
        self._server: wire.ServerState | None = None
        self._birth = 0
        self._pumping = False
        self._rest: asyncio.TimerHandle | None = None
        self._freed_bytes = 0
        self._puback_s = max(config.timing.ack_s, _LEAST_PUBACK_S)
        self._not_before_s: dict[str, float] = {}
        self.link = Link(
            identity, context=None if plain_mqtt else lambda: tls_context(identity),
            next_birth=self._next_birth, will=reporting.will, on_happening=self._happened,
            draw=draw, keepalive_s=config.mqtt.keepalive_s, backoff_scale=config.timing.backoff_scale,
        )  # fmt: skip
        self._upload = Upload(
            store, self._publish_up, window=config.limits.uploads_in_flight,
            batch_bytes=config.limits.upload_kib * 1024, ack_s=config.timing.ack_s,
            rate_bytes_s=config.limits.upload_kib_s * 1024, owed=lambda: self.link.owed_s() > 0.0, opened=at_rest.Opener(config.identity_dir),
        )  # fmt: skip

    @property
    def server_online(self) -> bool:
        """Whether the server listens, as far as is known."""
        return self._server is not None and self._server.status == "online"

    def start(self, group: ids.GroupName) -> None:
        """Begins to keep a session, and listens to the bell of this group."""
        self.link.follow(group)
        self.link.start()

    async def stop(self) -> None:
        """Sends what may still be sent, says goodbye and ends."""
        self.pump()
        if self._rest is not None:
            self._rest.cancel()
        await self.link.stop()

    # --- to the server -----------------------------------------------------------------------------------------------

    def report(self) -> None:
        """Publishes the state, retained."""
        # The server tells by it when this boot was, should nothing set the clock.
        said = msgspec.structs.replace(self._state(), at=self._clock.instant())
        self.link.publish(topics.state(self._identity.device), wire.encode(said), retain=True)

    def event(self, name: str, code: str, data: dict[str, Any]) -> None:
        """Puts an event into the outbox, and sends it soon. One that cannot be stored is lost."""
        try:
            self._keep(name, code, data)
        except Degraded as error:
            log.error("event not stored", extra=kv(code=error.code, detail=error.detail, event=name))

    def _keep(self, name: str, code: str, data: dict[str, Any]) -> None:
        body = wire.encode(wire.Event(at=self._clock.instant(), name=name, code=code, data=data))
        self._store.append([Entry(kind="event", body=body)])
        self.pump_soon()

    def changed(self, code: str, data: dict[str, Any]) -> None:
        """The update or what runs changed: an event of it where there is something to say, and the state anew.

        Raises:
            Degraded: the event could not be stored; only the state was said.
        """
        try:
            if data:
                self._keep("update", code, data)
        finally:
            self.report_if_online()

    def report_if_online(self) -> None:
        """The state anew, where the server listens: else it is said when it does."""
        if self.server_online:
            self.report()

    def pump_soon(self) -> None:
        """Looks at the outbox when the loop comes by: many records of one moment are one look."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self.pump)

    def pump(self) -> None:
        """Keeps the outbox within its bound, and sends what may be sent."""
        self._pumping = False
        # Each by itself: an outbox that cannot be made smaller is still emptied by sending.
        for what, work in (("compaction", self._keep_within_bound), ("upload", self._send)):
            if self._clock.boot_s() < self._not_before_s.get(what, 0.0):
                continue
            try:
                work()
            except Degraded as error:
                if error.code == "store_damaged":
                    self._on_fault(error)
                return
            except Exception as error:
                # A bug, or a record that nobody foresaw: no reason to stop serving.
                log.exception("outbox not kept", extra=kv(code="outbox_unforeseen", what=what, again_s=_AGAIN_S))
                known = what in self._not_before_s
                self._not_before_s[what] = self._clock.boot_s() + _AGAIN_S
                if not known:
                    detail = f"{type(error).__name__}: {error}"[:500]
                    self.event("outbox", "outbox_unforeseen", {"what": what, "detail": detail})

    def _keep_within_bound(self) -> None:
        if self._store.within_bounds():
            if self._freed_bytes:
                log.warning("outbox compacted", extra=kv(freed_bytes=self._freed_bytes))
                self._freed_bytes = 0
            return
        end_s = self._clock.boot_s() + _COMPACT_S
        freed = self._store.compact(self._clock.instant(), more=lambda: self._clock.boot_s() < end_s)
        self._freed_bytes += freed
        # What cannot be made smaller is looked at again at the next tick.
        if (freed > 0 or self._store.planned) and self._rest is None:
            self._rest = asyncio.get_running_loop().call_later(_REST_S, self._rested)

    def _rested(self) -> None:
        self._rest = None
        self.pump_soon()

    def _send(self) -> None:
        self._store.tidy()
        owed_s = self.link.owed_s()
        if owed_s > self._puback_s:
            # It answers pings and takes nothing: its disk is full, say. What it has not taken goes out in another session.
            log.warning("broker acknowledges nothing", extra=kv(for_s=round(owed_s, 1)))
            self.link.give_up()
            return
        self._upload.pump(self._clock.boot_s(), self._clock.instant())

    def _publish_up(self, payload: bytes) -> bool:
        return self.link.publish(topics.up(self._identity.device), payload)

    def _next_birth(self) -> int:
        try:
            if int(self._store.get("birth", 0)) >= wire.MOST_BIRTH:
                # Of an agent that believed any number; the server has no use for one so high.
                self._store.put("birth", 0)
                self._birth = 0
            self._birth = self._store.count_up("birth", self._birth)
        except Degraded as error:
            # A full disk must not end the link. Should the number come again after a restart, ``_own_state`` goes past it.
            log.error("birth not stored", extra=kv(code=error.code, detail=error.detail))
            self._birth = max(self._birth, int(self._store.get("birth", 0))) + 1
        return self._birth

    # --- from the server ---------------------------------------------------------------------------------------------

    def _happened(self, happening: Happening) -> None:
        match happening:
            case Up():
                self._server = None
                self._upload.again()
                self.report()
            case Down():
                # Whether it listens is not known any more.
                self._server = None
                self._upload.open = False
                self._upload.again()
            case wire.ServerState():
                self._server_said(happening)
            case wire.Ack():
                self._acknowledged(happening)
            case Rang():
                self._on_bell(happening)
            case wire.State():
                self._own_state(happening)

    def _server_said(self, said: wire.ServerState) -> None:
        before = self._server
        if before is not None and said.birth < before.birth and said.status == "offline":
            return
        self._server = said
        online = said.status == "online"
        if online and (before is None or before.status != "online" or before.birth != said.birth):
            # What was on its way to the server that ended may have ended with it.
            self._upload.again()
            self.report()
        self._upload.open = online
        if online:
            self.pump()

    def _own_state(self, seen: wire.State) -> None:
        if not wire.believable_birth(seen.birth, self.link.birth):
            log.warning("a birth that cannot be is retained", extra=kv(seen=seen.birth, ours=self.link.birth))
            self.report()
        elif seen.birth > self.link.birth:
            # Another life of this device was further on (a restored backup): go past it, so that its will cannot win.
            log.warning("a later birth is retained", extra=kv(seen=seen.birth, ours=self.link.birth))
            self._birth = seen.birth
            self.link.reconnect()
        elif seen.birth < self.link.birth or seen.status == "offline":
            self.report()

    def _acknowledged(self, ack: wire.Ack) -> None:
        try:
            done = self._store.acknowledge(ack)
        except Degraded as error:
            if error.code == "store_damaged":
                self._on_fault(error)
            return
        self._upload.acknowledged(ack)
        if done.new_epoch:
            log.warning("new epoch", extra=kv(why=done.new_epoch, epoch=self._store.epoch, server_upto=ack.upto))
            self._upload.again()
            self.event("epoch", done.new_epoch, {"why": done.new_epoch, "epoch": self._store.epoch})
            self.report()
        self.pump()
