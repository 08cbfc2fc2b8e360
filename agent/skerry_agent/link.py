"""The MQTT session: birth, will, publish, and what comes in. MQTT 3.1.1 over mutual TLS, clean sessions.

It publishes with QoS 1 and listens with QoS 0: a session that broke keeps nothing, so QoS 1 would repeat nothing either, and a broker
may pay dearly for it (NATS: a consumer of its own per filter, a thousand by default). What is missed, the next session, the timer and
the resending of records make up for.

Every session has a birth number of its own, higher than the last; the will carries it, so that a will which arrives late is
told from the present session. The network runs in one thread per session; what happens is handed to the event loop as
values. Reconnects wait by ``core.backoff``: paho's own do not jitter. What the messages mean is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode
from skerry_contract import ids, topics, wire
from skerry_contract.errors import ContractError

from skerry_agent.core import backoff
from skerry_agent.identity import Identity
from skerry_agent.logs import kv

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; Python's ssl does not name it."""
_LASTING_S = 30.0
"""A session that lasted so long was a good one; one that was taken away sooner counts as a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Up:
    """A session began: subscribed, nothing published yet."""

    birth: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Down:
    """The session ended, or none could be had. ``cause`` is a key of ``backoff.POLICIES``."""

    cause: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rang:
    """A bell. The same version may come again."""

    topic: str
    version: int


Happening = Up | Down | Rang | wire.Ack | wire.State | wire.ServerState


class _Judged(ssl.SSLSocket):
    """A connection whose peer's certificate has not ended, by the wall clock: the part of the check that ``_NO_CHECK_TIME`` leaves out."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        ends = str((self.getpeercert() or {}).get("notAfter", ""))
        if not ends or ssl.cert_time_to_seconds(ends) < time.time():
            here = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
            raise ssl.SSLCertVerificationError(
                f"its certificate expired {ends}; it is {here} UTC by this device's clock"
            )


def tls_context(identity: Identity) -> ssl.SSLContext:
    """Trusts the fleet's CA only, and shows the device's certificate.

    As of the courier's connections only the end of validity is judged: by a clock at 1970 nothing would be valid yet, and a device that
    nobody tells the time could never send what it counted.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _Judged
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    context.load_verify_locations(identity.fleet_ca)
    context.load_cert_chain(identity.certificate, identity.key)
    return context


class Link:
    """Keeps one session after the other.

    Args:
        identity: who connects, and to whom.
        context: makes the TLS context, anew per session: a renewed certificate is taken up. None for plain TCP, which
            only a test on loopback wants.
        next_birth: gives the next birth number, durably.
        will: the bytes of the will for a birth number.
        on_happening: called in the loop.
        draw: uniform in [0, 1), for the waits.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        context: Callable[[], ssl.SSLContext] | None,
        next_birth: Callable[[], int],
        will: Callable[[int], bytes],
        on_happening: Callable[[Happening], None],
        draw: Callable[[], float],
        keepalive_s: int = 30,
        backoff_scale: float = 1.0,
    ) -> None:
        self._identity = identity
        self._context = context
        self._next_birth = next_birth
        self._will = will
        self._on_happening = on_happening
        self._draw = draw
        self._keepalive_s = keepalive_s
        self._scale = backoff_scale
        self._group = identity.group
        self._client: mqtt.Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._birth = 0
        self._again = asyncio.Event()
        self._leaving = False
        self._vain = False
        self._owed: deque[tuple[mqtt.MQTTMessageInfo, float]] = deque()

    @property
    def birth(self) -> int:
        """The number of the session now or last up."""
        return self._birth

    @property
    def connected(self) -> bool:
        """Whether a session is up."""
        return self._client is not None and self._client.is_connected()

    def start(self) -> None:
        """Begins to keep a session."""
        self._task = asyncio.create_task(self._keep(), name="link")

    async def stop(self) -> None:
        """Says goodbye with the will's words and ends."""
        if self._task is None:
            return
        client = self._client
        # Our own goodbye comes back to us on the state topic: nobody may answer it any more.
        self._leaving = True
        if client is not None and client.is_connected():
            info = client.publish(topics.state(self._identity.device), self._will(self._birth), qos=1, retain=True)
            for _ in range(20):
                if info.is_published():
                    break
                await asyncio.sleep(0.05)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hands a message to the session. False without one; what becomes of it only the server can say."""
        client = self._client
        if client is None or not client.is_connected():
            return False
        handed = client.publish(topic, payload, qos=1, retain=retain)
        if handed.rc != mqtt.MQTT_ERR_SUCCESS:
            return False
        self._owed.append((handed, time.monotonic()))
        return True

    def owed_s(self) -> float:
        """For how long the broker has owed its acknowledgement of what was published, the oldest of it; 0 when it has all.

        Until then a message may still lie here, in a queue that has no bound of its own.
        """
        while self._owed and self._owed[0][0].is_published():
            self._owed.popleft()
        return time.monotonic() - self._owed[0][1] if self._owed else 0.0

    def give_up(self) -> None:
        """Ends a session that is of no use, however long it lasted; the next comes after a longer wait each time."""
        self._vain = True
        self.reconnect()

    def follow(self, group: ids.GroupName) -> None:
        """Listens to another group's bell from now on."""
        client, before = self._client, self._group
        self._group = group
        if client is not None and client.is_connected() and group != before:
            client.subscribe(topics.group_bell(group))
            client.unsubscribe(topics.group_bell(before))

    def reconnect(self) -> None:
        """Ends the session; the next has a new birth and will."""
        if self._client is not None:
            self._client.disconnect()

    def hurry(self) -> None:
        """Ends the present wait: there is reason to believe that the network is back."""
        self._again.set()

    async def _keep(self) -> None:
        failures = 0
        while True:
            began_s = time.monotonic()
            try:
                down = await self._session()
            except Exception as error:
                # A bug, and no reason to stay mute until the next start: nobody else begins a session.
                log.exception("session failed")
                down = Down(cause="refused", detail=f"{type(error).__name__}: {error}")
            lasted = time.monotonic() - began_s > _LASTING_S and not self._vain
            self._vain = False
            failures = 1 if lasted else failures + 1
            wait_s = backoff.delay_s(down.cause, failures, self._draw(), scale=self._scale)
            log.info("link down", extra=kv(cause=down.cause, detail=down.detail, wait_s=round(wait_s, 2)))
            self._on_happening(down)
            self._again.clear()
            try:
                await asyncio.wait_for(self._again.wait(), wait_s)
            except TimeoutError:
                continue

    async def _session(self) -> Down:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Down] = loop.create_future()
        self._birth = birth = self._next_birth()
        self._owed.clear()

        def post(function: Callable[..., None], *values: Any) -> None:
            # A loop that is closing has no use for news.
            if not loop.is_closed():
                loop.call_soon_threadsafe(function, *values)

        def end(cause: str, detail: str) -> None:
            if not ended.done():
                ended.set_result(Down(cause=cause, detail=detail))

        def up() -> None:
            if self._client is client:
                self._on_happening(Up(birth=birth))

        try:
            client = mqtt.Client(
                CallbackAPIVersion.VERSION2,
                client_id=self._identity.device,
                clean_session=True,
                protocol=mqtt.MQTTv311,
                reconnect_on_failure=False,
            )
            client.connect_timeout = _CONNECT_TIMEOUT_S
            if self._context is not None:
                client.tls_set_context(self._context())
        except (OSError, ssl.SSLError) as error:
            return Down(cause="refused", detail=f"identity: {error}")
        client.will_set(topics.state(self._identity.device), self._will(birth), qos=1, retain=True)

        def on_connect(_client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
            if reason.is_failure:
                post(end, "refused", str(reason))
                return
            device = self._identity.device
            wanted = (
                topics.ack(device), topics.bell(device), topics.state(device), topics.group_bell(self._group),
                topics.SERVER_STATE,
            )  # fmt: skip
            client.subscribe([(topic, 0) for topic in wanted])
            post(up)

        def on_subscribe(
            _client: mqtt.Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
        ) -> None:
            if any(reason.is_failure for reason in reasons):
                post(end, "refused", f"subscription: {', '.join(map(str, reasons))}")

        def on_disconnect(_client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
            post(end, "broker", str(reason))

        def on_message(_client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
            post(self._take, client, message.topic, message.payload)

        client.on_connect, client.on_disconnect = on_connect, on_disconnect
        client.on_subscribe, client.on_message = on_subscribe, on_message
        # Only that this is set matters: without it paho, whose own thread we do not use, writes in the thread that publishes
        # while the network's reads, and two threads inside one TLS connection corrupt the heap.
        client.on_socket_register_write = lambda *_: None

        def network() -> None:
            try:
                client.connect(self._identity.mqtt_host, self._identity.mqtt_port, keepalive=self._keepalive_s)
                # Not loop_forever: a publish wakes this one, and would wait there for the end of the time-out.
                while client.loop(timeout=1.0) == mqtt.MQTT_ERR_SUCCESS:
                    pass
                post(end, "broker", "closed")
            except (OSError, ssl.SSLError, ValueError) as error:
                post(end, "broker", str(error))

        thread = threading.Thread(target=network, name=f"mqtt-{birth}", daemon=True)
        self._client = client
        thread.start()
        try:
            return await ended
        finally:
            self._client = None
            client.disconnect()
            await asyncio.to_thread(thread.join, 2.0)
            # Without its callbacks the client is freed here and now, and closes its descriptors.
            client.on_connect = client.on_disconnect = client.on_subscribe = client.on_message = None
            client.on_socket_register_write = None

    def _take(self, client: mqtt.Client, topic: str, payload: bytes) -> None:
        if client is not self._client or self._leaving:
            return
        device = self._identity.device
        try:
            if topic == topics.ack(device):
                self._on_happening(wire.decode(wire.Ack, payload))
            elif topic in (topics.bell(device), topics.group_bell(self._group)):
                self._on_happening(Rang(topic=topic, version=wire.decode(wire.Bell, payload).version))
            elif topic == topics.SERVER_STATE:
                self._on_happening(wire.decode(wire.ServerState, payload))
            elif topic == topics.state(device):
                self._on_happening(wire.decode(wire.State, payload))
        except ContractError as error:
            log.warning("message dropped", extra=kv(topic=topic, code=error.code, detail=str(error)))
