"""The server's own session with the broker: what it hears, what it says, and when it starts anew.

Owns the connection (mutual TLS, certificate ``_server``), ``server/state`` with its will, the retained bells and the order of
a session's start. Leaves what messages mean to the receiver it is given; ``ingest`` is one.

Rules kept here:

* Every session is a new client with a fresh random client id and a clean session. A client id cannot be bound to a
  certificate on every broker, and one who takes ours can only make us start the next session: nothing is kept in it.
* A message is acknowledged to the broker only by ``acknowledge``, which the receiver calls after its commit.
* The database is the truth about bells. ``ring`` only saves time: what it could not publish, the next session does.
"""

from __future__ import annotations

import logging
import queue
import random
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from skerry_contract import ids, topics, wire
from skerry_contract.errors import ContractError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from skerry_server import clock
from skerry_server.db import queries
from skerry_server.db.engine import reading, writing

log = logging.getLogger(__name__)

KEEPALIVE_S = 30
_SOON_S = 60 * 86_400
CONNECT_TIMEOUT_S = 10.0
BACKOFF_FIRST_S, BACKOFF_CAP_S = 0.25, 30.0
_BELL_PAGE = 1000


class Message(NamedTuple):
    """What the broker delivered. ``handle`` and ``qos`` belong to ``ServerLink.acknowledge``."""

    topic: str
    payload: bytes
    retained: bool
    qos: int = 0
    mid: int = 0
    handle: paho.Client | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where the broker is and how to be known there. The certificate's identity must be ``_server``."""

    host: str
    port: int
    ca_file: Path
    certificate_file: Path
    key_file: Path

    def tls(self) -> ssl.SSLContext:
        """A client context that trusts the fleet's CA alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cafile=str(self.ca_file))
        context.load_cert_chain(str(self.certificate_file), str(self.key_file))
        return context


Receiver = Callable[[Message], None]


class ServerLink:
    """Keeps one session open until stopped. Every method may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        endpoint: Endpoint,
        *,
        chance: random.Random | None = None,
        now_ms: Callable[[], int] = clock.now_ms,
    ) -> None:
        """Connects nothing yet.

        Args:
            chance: source of the reconnect jitter.
            now_ms: the server's clock.
        """
        self._engine = engine
        self._endpoint = endpoint
        self._chance = chance or random.Random()
        self._now_ms = now_ms
        self._stopping = threading.Event()
        self._again = threading.Event()
        self._online = threading.Event()
        self._session: _Session | None = None
        self._receive: Receiver = _ignore
        self._thread: threading.Thread | None = None
        self.sessions = 0
        """How many sessions were opened so far."""
        self.broker_ends_s: float | None = None
        """When the broker's certificate ends, seconds since 1970, as the last session saw it."""

    @property
    def connected(self) -> bool:
        """Whether the subscriptions stand and ``server/state`` says online."""
        return self._online.is_set()

    def start(self, receive: Receiver) -> None:
        """Begins connecting in the background. ``receive`` is called in the network thread and must be quick."""
        if self._thread is not None:
            raise RuntimeError("the link was started before")
        self._receive = receive
        self._thread = threading.Thread(target=self._run, name="mqtt-link", daemon=True)
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Waits for a session; False when there is none after ``timeout_s``."""
        return self._online.wait(timeout_s)

    def stop(self) -> None:
        """Says offline, disconnects and waits for the threads. Calling it again does nothing."""
        self._stopping.set()
        self._again.set()
        session = self._session
        if session is not None:
            session.wake()
        if self._thread is not None:
            self._thread.join(timeout=15)

    def hurry(self) -> None:
        """Ends the wait before the next session, the present one or the one that follows an attempt under way: the broker is back."""
        self._again.set()

    def ring(self, target: str, version: int) -> None:
        """Publishes a bell, retained. Call it after the transaction that wrote the table ``bells``.

        Args:
            target: ``d/<device>`` or ``g/<group>``.
            version: as the table holds it.

        Raises:
            Malformed: for another target.
        """
        topic = bell_topic(target)
        session = self._session
        if session is not None and self._online.is_set():
            session.ring(topic, target, version)

    def publish(self, topic: str, payload: bytes) -> bool:
        """Publishes with QoS 0, not retained; False when there is no session. For what the peer will ask for again."""
        session = self._session
        return session is not None and session.client.publish(topic, payload).rc == paho.MQTT_ERR_SUCCESS

    def _shown(self, ends_s: float) -> None:
        left_s = ends_s - self._now_ms() / 1000
        if ends_s != self.broker_ends_s and left_s < _SOON_S:
            days = round(left_s / 86_400)
            log.warning("the broker's certificate ends days_left=%d; with it nobody connects any more", days)
        self.broker_ends_s = ends_s

    def acknowledge(self, message: Message) -> None:
        """Tells the broker that the message is dealt with. Of a session that ended it does nothing."""
        if message.qos and message.handle is not None:
            message.handle.ack(message.mid, message.qos)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            opened_at = time.monotonic()
            try:
                self._session = _Session(
                    self._engine, self._endpoint, self._receive, self._online, self._stopping, self._now_ms, self._shown
                )
                self.sessions += 1
                self._session.run()
                why = self._session.why
            except (OSError, ValueError, SQLAlchemyError) as error:
                why = repr(error)
            finally:
                self._online.clear()
            if self._stopping.is_set():
                break
            # A session that lasted was a good one; one that was taken away at once counts as a failure.
            failures = 0 if time.monotonic() - opened_at > 10 else failures + 1
            delay_s = self._chance.uniform(0.1, 1) * min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2 ** min(failures, 12))
            log.warning("mqtt session ended why=%r retry_s=%.2f", why, delay_s)
            self._again.wait(delay_s)
            self._again.clear()
        self._session = None


@dataclass(slots=True)
class _Session:
    """One client from connect to disconnect. paho's thread does the network; ``run`` does what needs the database."""

    engine: Engine
    endpoint: Endpoint
    receive: Receiver
    online: threading.Event
    stopping: threading.Event
    now_ms: Callable[[], int]
    shown: Callable[[float], None]
    why: str = "never connected"
    birth: int = 0
    client: paho.Client = field(init=False)
    _tasks: queue.SimpleQueue[tuple[str, int]] = field(default_factory=queue.SimpleQueue)
    _granted: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)
    _bells: dict[int, tuple[str, int]] = field(default_factory=dict)
    _bells_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"{ids.SERVER_IDENTITY}-{secrets.token_hex(16)}",
            clean_session=True,
            protocol=paho.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.tls_set_context(self.endpoint.tls())
        client.max_inflight_messages_set(200)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        self.client = client

    def run(self) -> None:
        """From connect until the session is over or the link stops.

        Raises:
            OSError: the broker cannot be reached or refuses our certificate.
        """
        with writing(self.engine) as connection:
            self.birth = queries.next_server_birth(connection, self.now_ms())
        self.client.will_set(topics.SERVER_STATE, self._state(wire.OFFLINE), qos=1, retain=True)
        self.client.connect(self.endpoint.host, self.endpoint.port, keepalive=KEEPALIVE_S)
        self.client.loop_start()
        try:
            if self._wait_granted():
                self.client.publish(topics.SERVER_STATE, self._state(wire.ONLINE), qos=1, retain=True)
                self.online.set()
                log.info("mqtt session open birth=%d", self.birth)
                self._republish_bells()
                self._note_rung_bells()
        finally:
            self.online.clear()
            self._close()

    def wake(self) -> None:
        """Makes ``run`` look at ``stopping``."""
        self._tasks.put(("", 0))

    def ring(self, topic: str, target: str, version: int) -> None:
        """Publishes one bell and remembers which PUBACK says that it is out."""
        payload = wire.encode(wire.Bell(version=version))
        # No lock of ours is held here: paho takes its own to publish, and holds the same one while it calls ``_on_publish``.
        info = self.client.publish(topic, payload, qos=1, retain=True)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            return
        with self._bells_lock:
            self._bells[info.mid] = (target, version)
        if info.is_published():
            # Its PUBACK may have come before it was written down. One that comes in this very moment is missed: the bell
            # is then rung once more (``publication.RING_AGAIN_MS``), which says nothing new.
            self._on_publish(self.client, None, info.mid, None, None)

    def _state(self, status: Any) -> bytes:
        return wire.encode(wire.ServerState(status=status, birth=self.birth))

    def _wait_granted(self) -> bool:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while not self._granted.wait(0.05):
            if self._over.is_set() or self.stopping.is_set():
                return False
            if time.monotonic() > deadline:
                self.why = "the broker granted no subscriptions"
                return False
        return not self._over.is_set()

    def _republish_bells(self) -> None:
        after = ""
        while not self._over.is_set():
            with reading(self.engine) as connection:
                page = queries.bells(connection, after=after, limit=_BELL_PAGE)
            for bell in page:
                self.ring(bell_topic(bell.target), bell.target, bell.version)
            if len(page) < _BELL_PAGE:
                return
            after = page[-1].target

    def _note_rung_bells(self) -> None:
        while not self._over.is_set() and not self.stopping.is_set():
            rung = [self._tasks.get()]
            while not self._tasks.empty():
                rung.append(self._tasks.get())
            found = [task for task in rung if task[0]]
            if found:
                with writing(self.engine) as connection:
                    queries.mark_rung(connection, found)

    def _close(self) -> None:
        if self.stopping.is_set() and not self._over.is_set() and self._granted.is_set():
            info = self.client.publish(topics.SERVER_STATE, self._state(wire.OFFLINE), qos=1, retain=True)
            deadline = time.monotonic() + 2
            while not info.is_published() and time.monotonic() < deadline and not self._over.is_set():
                time.sleep(0.01)
        self.client.disconnect()
        self.client.loop_stop()

    # --- called by paho's thread ---------------------------------------------------------------------------------------

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self.why = f"connect refused: {reason}"
            client.disconnect()
            return
        socket = client.socket()
        if isinstance(socket, ssl.SSLSocket) and (certificate := socket.getpeercert()):
            self.shown(ssl.cert_time_to_seconds(str(certificate["notAfter"])))
        client.subscribe([(topics.ALL_UP, 1), (topics.ALL_STATE, 1), (topics.SERVER_STATE, 1)])

    def _on_subscribe(self, client: paho.Client, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self.why = f"subscription refused: {[str(reason) for reason in reasons]}"
            client.disconnect()
            return
        self._granted.set()

    def _on_disconnect(self, _client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if self._granted.is_set() or self.why == "never connected":
            self.why = f"disconnected: {reason}"
        self._over.set()
        self.wake()

    def _on_message(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        found = Message(message.topic, bytes(message.payload), message.retain, message.qos, message.mid, client)
        if message.topic == topics.SERVER_STATE:
            client.ack(message.mid, message.qos)
            self._answer_own_state(bytes(message.payload))
        else:
            self.receive(found)

    def _answer_own_state(self, payload: bytes) -> None:
        try:
            said = wire.decode(wire.ServerState, payload)
        except ContractError:
            said = wire.ServerState(status="offline", birth=0)
        # The will of an earlier session can come after our word, and whoever has rights at the broker can say that we are gone, of whichever
        # birth: then the retained state is wrong and keeps every device silent, and we say it again.
        if (said.birth < self.birth or said.status == wire.OFFLINE) and self.online.is_set():
            self.client.publish(topics.SERVER_STATE, self._state(wire.ONLINE), qos=1, retain=True)

    def _on_publish(self, _client: paho.Client, _data: Any, mid: int, _reason: Any, _properties: Any) -> None:
        with self._bells_lock:
            bell = self._bells.pop(mid, None)
        if bell is not None:
            self._tasks.put(bell)


def bell_topic(target: str) -> str:
    """The topic of a bell's target, ``d/<device>`` or ``g/<group>``.

    Raises:
        Malformed: for another target.
    """
    kind, _, name = target.partition("/")
    if kind == "d":
        return topics.bell(ids.device_id(name))
    return topics.group_bell(ids.group_name(name if kind == "g" else target))


def _ignore(_message: Message) -> None:
    pass
