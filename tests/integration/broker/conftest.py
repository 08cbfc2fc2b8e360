"""A fleet on one machine: a certificate authority, a real broker, the real ingest, and devices that are paho clients.

The broker is the embedded NATS or a Mosquitto with the packaged configuration; a test that takes ``fleet`` or ``quiet_fleet`` runs
on each. Without Mosquitto its half is skipped, and with CI=true that is a failure.
"""

import datetime as dt
import ipaddress
import os
import random
import ssl
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from skerry_contract import topics, wire
from skerry_contract import window as w
from skerry_server.broker.embedded import EmbeddedBroker
from skerry_server.broker.natsconf import Client
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.ingest import Ingest
from skerry_server.mqtt import Endpoint, ServerLink
from sqlalchemy import insert, select

from tests.integration.broker import mosquitto

BROKERS = ("nats", "mosquitto")
EPOCH = "e" * 32
BUNDLE = "ab" * 32
DAY = dt.timedelta(days=1)


def until(condition, what, timeout_s=60.0):
    """Waits for a condition and returns its value; fails with ``what`` in words."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


class Authority:
    """A CA with its files in one folder; ``issue`` makes a client certificate, ``serve`` one for a listener."""

    def __init__(self, folder: Path, name: str = "fleet-ca"):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._builder(self.name, self.key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.pem = folder / "ca.pem"
        self.pem.write_bytes(certificate.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, common_name: str | None = None):
        return self._issue(name, [x509.DNSName(name)], ExtendedKeyUsageOID.CLIENT_AUTH, common_name or name)

    def serve(self):
        sans = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return self._issue("broker", sans, ExtendedKeyUsageOID.SERVER_AUTH, "broker")

    def _issue(self, file_name, sans, usage, common_name):
        files = self.folder / f"{file_name}.pem", self.folder / f"{file_name}.key"
        if not files[0].exists():
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
            builder = self._builder(subject, key.public_key()).add_extension(
                x509.SubjectAlternativeName(sans), critical=False
            )
            certificate = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False).sign(
                self.key, hashes.SHA256()
            )
            files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
            files[1].write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
        return files

    def _builder(self, subject, public_key):
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
        )


class Peer:
    """One MQTT client that remembers what it was told."""

    def __init__(
        self, fleet, identity, *, client_id=None, authority=None, will=None, clean=True, certificate=True, returns=True
    ):
        self.got: list[tuple[str, bytes]] = []
        self.drops: list[str] = []
        self.grants: dict[int, list] = {}
        self.client = paho.Client(
            paho.CallbackAPIVersion.VERSION2,
            client_id=client_id or identity,
            clean_session=clean,
            protocol=paho.MQTTv311,
            reconnect_on_failure=returns,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(str(fleet.authority.pem))
        if certificate:
            context.load_cert_chain(*map(str, (authority or fleet.authority).issue(identity)))
        self.client.tls_set_context(context)
        self.client.reconnect_delay_set(0.1, 0.5)
        if will is not None:
            self.client.will_set(*will, qos=1, retain=True)
        self.client.on_connect = self._connected
        self.client.on_message = lambda _c, _d, m: self.heard(m)
        self.client.on_disconnect = lambda _c, _d, _f, reason, _p: self.drops.append(str(reason))
        self.client.on_subscribe = lambda _c, _d, mid, reasons, _p: self.grants.update({mid: list(reasons)})
        self.reads: list[str] = []
        self.fleet = fleet
        self.port = fleet.server_port if identity == "_server" else fleet.broker.port

    def heard(self, message):
        self.got.append((message.topic, bytes(message.payload)))

    def _connected(self, client, _data, _flags, reason, _properties):
        if not reason.is_failure and self.reads:
            client.subscribe([(topic, 1) for topic in self.reads])

    def open(self):
        self.client.connect("127.0.0.1", self.port)
        self.client.loop_start()
        until(self.client.is_connected, "connected")
        return self

    def refused(self, timeout_s=60.0):
        """Tries to connect; True when the broker ends it, False when it lets the client in."""
        answers = []
        self.client.on_connect = lambda _c, _d, _f, reason, _p: answers.append(reason)
        try:
            self.client.connect("127.0.0.1", self.port)
        except OSError:
            return True
        self.client.loop_start()
        until(lambda: answers or self.drops, "an answer to the connect", timeout_s)
        if answers and not answers[0].is_failure:
            return False
        self.client.loop_stop()
        return True

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()

    def cut(self):
        """Ends the connection without a word, as a dead radio does."""
        self.client.socket().shutdown(2)

    def subscribed(self, topic_filter, qos=1):
        """Whether the broker granted the filter."""
        _, mid = self.client.subscribe(topic_filter, qos)
        reasons = until(lambda: self.grants.get(mid), f"an answer about {topic_filter}")
        return not reasons[0].is_failure

    def publish(self, topic, payload, retain=False, qos=1):
        info = self.client.publish(topic, payload, qos=qos, retain=retain)
        info.wait_for_publish(5)
        return info


def window(ok):
    instant = w.Instant("b" * 32, 1, 1, True)
    return w.Window(
        key=w.Key("gas", BUNDLE, "cpu", "none", "", 0), start=instant, end=instant, counts=w.Counts(ok=ok, rows=ok)
    )


class Sender(Peer):
    """A device's outbox in miniature: sends records until the server says that it holds them."""

    def __init__(self, fleet, identity, *, epoch=EPOCH, **options):
        super().__init__(fleet, identity, **options)
        self.identity = identity
        self.epoch = epoch
        self.reads = [topics.ack(identity)]
        self.pending: dict[int, wire.Record] = {}
        self.last_seq = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._pump, daemon=True)

    def heard(self, message):
        super().heard(message)
        if message.topic == topics.ack(self.identity):
            ack = wire.decode(wire.Ack, bytes(message.payload))
            held = [(1, ack.upto), *ack.extra_ranges]
            with self.lock:
                for seq in [s for s in self.pending if any(low <= s <= high for low, high in held)]:
                    del self.pending[seq]

    def count(self, *oks):
        """Adds a window per number."""
        with self.lock:
            for ok in oks:
                self.last_seq += 1
                self.pending[self.last_seq] = wire.Record(
                    seq=self.last_seq, kind="window", body=wire.encode(window(ok))
                )

    def open(self):
        super().open()
        self.thread.start()
        return self

    def close(self):
        self.over.set()
        super().close()
        if self.thread.is_alive():
            self.thread.join(5)

    def _pump(self):
        chance = random.Random(self.identity)
        while not self.over.is_set():
            with self.lock:
                records = tuple(self.pending[seq] for seq in sorted(self.pending))[:20]
            if records and self.client.is_connected():
                batch = wire.Batch(epoch=self.epoch, records=records)
                self.client.publish(topics.up(self.identity), wire.encode_batch(batch), qos=1)
            self.over.wait(chance.uniform(0.1, 0.3))

    def settled(self, timeout_s=30):
        until(lambda: not self.pending, f"all records of {self.identity} held", timeout_s)


class Fleet:
    """The server's folder with broker, database and ingest; devices are enrolled by name.

    ``binds_client_ids``: whether the broker takes the client id from the certificate. ``refuses_subscriptions``: whether it says no to a
    filter beyond a device's rights; one that does not grants it and delivers nothing.
    """

    def __init__(self, folder: Path, kind: str = "nats"):
        self.folder = folder
        self.kind = kind
        self.binds_client_ids, self.refuses_subscriptions = kind == "mosquitto", kind == "nats"
        self.authority = Authority(folder / "ca")
        self.stranger = Authority(folder / "other-ca", "another-ca")
        certificate, key = self.authority.serve()
        self.client_files = self.authority.issue("_server")
        self.engine = open_engine(sqlite_url(folder / "server.db"))
        migrations.migrate(self.engine)
        with writing(self.engine) as connection:
            connection.execute(insert(t.groups), [{"name": "g", "created_ms": 0}])
        if kind == "mosquitto":
            self.broker = mosquitto.Mosquitto(folder, self.authority.folder)
        else:
            self.broker = EmbeddedBroker(folder, ca_file=self.authority.pem, certificate_file=certificate, key_file=key)
        self.devices: list[str] = []
        self.ingest: Ingest | None = None
        self.link: ServerLink | None = None

    def enrol(self, *names):
        row = {
            "group": "g",
            "status": "enrolled",
            "enrolled_ms": 0,
            "public_key_sha256": "",
            "public_key_pem": "",
            "certificate_serial": "",
            "certificate_expires_ms": 0,
        }
        with writing(self.engine) as connection:
            connection.execute(insert(t.devices), [row | {"id": name} for name in names])
        self.devices += names
        self.broker.set_clients(map(Client, self.devices))

    @property
    def server_port(self):
        """Where the server connects."""
        return self.broker.server_port if self.kind == "mosquitto" else self.broker.port

    def refused_publishes(self):
        """How many messages the broker has refused by name."""
        if self.kind == "mosquitto":
            return self.broker.refused_publishes()
        return (self.folder / "nats" / "broker.log").read_text().count("Publish Violation")

    def endpoint(self):
        certificate, key = self.client_files
        return Endpoint(
            host="127.0.0.1",
            port=self.server_port,
            ca_file=self.authority.pem,
            certificate_file=certificate,
            key_file=key,
        )

    def start_ingest(self, settings=None):
        self.link = ServerLink(self.engine, self.endpoint())
        self.ingest = Ingest(self.engine, self.link, settings=settings)
        self.ingest.start()
        assert self.link.wait_connected(15)
        return self.ingest

    def rows(self, query):
        with reading(self.engine) as connection:
            return list(connection.execute(query))

    def counted(self, device):
        return sum(row.ok for row in self.rows(select(t.evidence).where(t.evidence.c.device == device)))

    def stream(self, device):
        found = self.rows(select(t.streams).where(t.streams.c.device == device))
        return found[0] if found else None

    def close(self):
        if self.ingest is not None:
            self.ingest.stop()
        self.broker.stop()
        self.engine.dispose()


@contextmanager
def running_fleet(folder, *names, kind="nats"):
    if kind == "mosquitto" and mosquitto.program() is None:
        why = "mosquitto is not installed (on Debian: apt install mosquitto)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    fleet = Fleet(folder, kind)
    try:
        fleet.enrol(*names)
        fleet.broker.start()
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(params=BROKERS)
def fleet(tmp_path, request):
    with running_fleet(tmp_path, "dev-a", "dev-b", kind=request.param) as found:
        yield found


@pytest.fixture
def nats_fleet(tmp_path):
    with running_fleet(tmp_path, "dev-a", "dev-b") as found:
        yield found


@pytest.fixture
def mosquitto_fleet(tmp_path):
    with running_fleet(tmp_path, "dev-a", "dev-b", kind="mosquitto") as found:
        yield found


@pytest.fixture(scope="module", params=BROKERS)
def quiet_fleet(tmp_path_factory, request):
    """Shared by the tests of a module that leave nothing behind; without ingest."""
    with running_fleet(tmp_path_factory.mktemp("fleet"), "dev-a", "dev-b", kind=request.param) as found:
        yield found


@pytest.fixture(scope="module")
def witness(quiet_fleet):
    """The server's identity, subscribed to everything it may read."""
    server = Peer(quiet_fleet, "_server", client_id="witness").open()
    for topic in (topics.ALL_UP, topics.ALL_STATE, "skerry/1/+/#"):
        assert server.subscribed(topic)
    yield server
    server.close()


@pytest.fixture
def peers():
    """Makes clients and closes them: ``peers(Sender, fleet, "dev-a")``. Its attributes are the classes."""
    made = []

    def make(kind, *args, **options):
        made.append(kind(*args, **options))
        return made[-1]

    make.Peer, make.Sender, make.until, make.window = Peer, Sender, until, window
    yield make
    for one in made:
        one.close()
