"""A real server for tests: initialised in a folder, run as a process on free ports, asked over TLS.

``ServerRig`` starts, kills and stops it; ``Operator`` holds the ceremony and approves bundles with the operator's own tool;
``DeviceRig`` enrols over HTTP and speaks MQTT with its certificate, as an agent would. No mocks: every byte crosses a socket.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import select
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import paho.mqtt.client as paho
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion
from skerry_cli import catalog, key_files, keys
from skerry_cli.bundle import read_bundle
from skerry_cli.client import Api
from skerry_cli.profile import Profile
from skerry_cli.publishing import Approver, push
from skerry_contract import ids, topics, wire

from tests import models, warm

READY_TIMEOUT_S = 120.0
KEPT_S = 2.0
"""How long a connection may lie idle and be used again; the server ends those that do for longer."""


class Answer:
    """An HTTP answer."""

    def __init__(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.status, self.headers, self.data = status, headers, data

    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def code(self) -> str:
        """The error code, empty for a good answer."""
        return "" if self.status < 400 else str(self.json()["error"]["code"])


class ServerRig:
    """One server in ``data``. ``settings`` are environment overrides, e.g. {"ROLLOUT_TICK_S": "0.1"}."""

    def __init__(self, data: Path, settings: dict[str, str] | None = None) -> None:
        self.data = data
        self._settings = {"ROLLOUT_TICK_S": "0.1", **(settings or {})}
        self.process: warm.Forked | None = None
        self.ready: dict[str, Any] = {}
        self._kept: urllib3.PoolManager | None = None
        self._asked = 0.0
        self.init()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **{f"SKERRY_SERVER_{name}": value for name, value in self._settings.items()}}

    def init(self) -> dict[str, Any]:
        command = ["init", "--data", str(self.data)]
        found = warm.run("skerry_server", command, env=self.environment, timeout=300)
        found.check_returncode()
        return json.loads(found.stdout)

    def start(self, *options: str) -> ServerRig:
        """Starts the process and waits for its ready line."""
        self._drop()
        command = ["run", "--data", str(self.data), *options]
        with (self.data / "server.log").open("ab") as log, open(os.devnull, "rb") as nothing:
            self.process = warm.start(
                "skerry_server",
                command,
                env=self.environment,
                stdin=nothing.fileno(),
                stdout=subprocess.PIPE,
                stderr=log.fileno(),
            )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], READY_TIMEOUT_S)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.kill()
            raise AssertionError(f"the server did not start:\n{self.log()[-4000:]}")
        self.ready = json.loads(line)
        return self

    def log(self) -> str:
        return (self.data / "server.log").read_text(errors="replace")

    def stop(self, timeout_s: float = 10.0) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self._drop()
        self.process.terminate()
        code = self.process.wait(timeout_s)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def kill(self) -> None:
        """SIGKILL, as a power cut of the process."""
        self._drop()
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            if self.process.stdout is not None:
                self.process.stdout.close()

    def close(self) -> None:
        """Whatever state it is in, it is gone afterwards."""
        self._drop()
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    @property
    def mqtt(self) -> dict[str, Any]:
        return dict(self.ready["mqtt"])

    @property
    def ca_file(self) -> Path:
        return self.data / "ca" / "ca.pem"

    @property
    def token(self) -> str:
        return (self.data / "admin.token").read_text().strip()

    def pool(self) -> urllib3.PoolManager:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        return urllib3.PoolManager(ssl_context=context, retries=False, timeout=30.0)

    def _connections(self) -> urllib3.PoolManager:
        """Those of the requests before, while they are fresh: a handshake for each request takes longer than most answers."""
        now = time.monotonic()
        if self._kept is None or now - self._asked > KEPT_S:
            self._drop()
            self._kept = self.pool()
        self._asked = now
        return self._kept

    def _drop(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.clear()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        data: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request. ``token``: None for the admin's, empty for none. ``body`` goes as JSON, ``data`` as it is."""
        token = self.token if token is None else token
        sent = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        if body is not None:
            data, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        found = self._connections().request(method, self.url + path, body=data, headers=sent, redirect=False)
        return Answer(found.status, dict(found.headers), found.data)

    def good(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """One request that must succeed; its JSON."""
        found = self.ask(method, path, body, **more)
        assert found.status < 300, f"{method} {path}: {found.status} {found.data[:500]!r}"
        return found.json() if found.data else None

    def wait(self, what: str, condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
        """Polls until the condition is true; its value."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"{what}: not within {timeout_s} s; the server said:\n{self.log()[-3000:]}")


class Operator:
    """The person with the offline keys, at work with the real tool."""

    def __init__(self, server: ServerRig, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.api = Api(Profile(server=server.url, token=server.token, ca=server.ca_file))
        online = key_files.read_online_keys(json.dumps(server.good("GET", "/api/v1/repository/online-keys")))
        now = dt.datetime.now(dt.UTC)
        self.ceremony = keys.hold_ceremony(folder / "keys", online_keys=online, password=None, now=now)

    def install_trust(self) -> None:
        """Posts root, targets and the first catalog."""
        for role in ("root", "targets", "catalog"):
            body = {"role": role, "metadata": getattr(self.ceremony, role).decode()}
            if role == "catalog":
                body["floors"] = self.ceremony.floors.decode()
            self.server.good("POST", "/api/v1/repository/metadata", body)

    def push(self, model: str, version: str, kind: str = "classifier", seed: int = 0, **more: Any) -> str:
        """Builds a bundle, pushes and validates it; its digest. ``more``: as for ``models.build_bundle``."""
        folder = self.folder / f"{model}-{version}-{kind}"
        digest = models.build_bundle(folder, model, version, kind, seed=seed, **more)
        push(self.api, read_bundle(folder))
        return digest

    def delist(self, model: str, version: str) -> dict[str, Any]:
        """Signs the catalog without the bundle, and posts it; the server's answer."""
        approver = self._approver()
        approver.change(catalog.Change(remove=((model, version),)), now=dt.datetime.now(dt.UTC))
        return approver.answer

    def approve(self, model: str, version: str, digest: str, **change: Any) -> None:
        """Signs the catalog that lists the bundle, and posts it."""
        addition = catalog.Addition(model=model, version=version, digest=digest, submitter="admin")
        now = dt.datetime.now(dt.UTC)
        self._approver().change(catalog.Change(add=(addition,), **change), now=now)

    def _approver(self) -> Approver:
        signer = key_files.load_signer(self.ceremony.key_path("approver"), None)
        return Approver(
            self.api, root=self.ceremony.root, signer=signer, name="approver", cache_dir=self.folder / "cache"
        )

    def publish(self, model: str, version: str, kind: str = "classifier", seed: int = 0, **more: Any) -> str:
        """Push and approve; the digest."""
        digest = self.push(model, version, kind, seed, **more)
        self.approve(model, version, digest)
        return digest


def csr(key: Any, common_name: str | None = None, dns_names: tuple[str, ...] = ()) -> str:
    """A certificate request, PEM."""
    attributes = [] if common_name is None else [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    if dns_names:
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names])
        builder = builder.add_extension(names, critical=False)
    algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM).decode()


def private_pem(key: Any) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_id(key: Any) -> str:
    """Hex sha256 of the SubjectPublicKeyInfo."""
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key.public_key().public_bytes(*form)).hexdigest()


class DeviceRig:
    """A device without a model: key, certificate, signed requests, MQTT."""

    def __init__(self, server: ServerRig, device: str, folder: Path, *, group: str = "press") -> None:
        self.server = server
        self.id = ids.device_id(device)
        self.group = group
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.folder = folder / device
        self.folder.mkdir(parents=True)
        self.epoch = hashlib.sha256(device.encode()).hexdigest()[:32]
        self.seq = 0
        self.birth = int(time.time())
        self.acked = 0
        self.bells: list[tuple[str, int]] = []
        self.client: paho.Client | None = None
        self._connected = threading.Event()

    def enrol(self, token: str | None = None, **more: Any) -> dict[str, Any]:
        """Enrols with a new token of the admin, or with the one given."""
        if token is None:
            wish = {"device_id": self.id, "group": self.group, "expires_s": 600}
            token = self.server.good("POST", "/api/v1/enrolment-tokens", wish)["token"]
        body = {"token": token, "csr": csr(self.key, self.id), **more}
        found = self.server.good("POST", "/device/v1/enrol", body, token="")
        (self.folder / "device.pem").write_text(found["certificate"])
        (self.folder / "ca.pem").write_text(found["ca"])
        (self.folder / "device.key").write_bytes(private_pem(self.key))
        return found

    def nonce(self) -> str:
        return str(self.server.good("GET", "/device/v1/nonce", token="")["nonce"])

    def claims(self, method: str, path: str, data: bytes = b"", **changes: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {
            "sub": self.id,
            "htm": method,
            "htu": path,
            "body": hashlib.sha256(data).hexdigest(),
            "iat": now,
            "exp": now + 30,
            **changes,
        }
        if "nonce" not in claims:
            claims["nonce"] = self.nonce()
        return {name: value for name, value in claims.items() if value is not None}

    def signed(
        self, claims: dict[str, Any], *, key: Any = None, algorithm: str = "ES256", kid: str | None = None
    ) -> str:
        headers = {"kid": key_id(self.key) if kid is None else kid}
        return "Skerry-JWT " + jwt.encode(claims, key or self.key, algorithm=algorithm, headers=headers)

    def ask(
        self, method: str, path: str, body: Any = None, *, authorization: str | None = None, **changes: Any
    ) -> Answer:
        """A signed request; ``changes`` alter its claims."""
        data = b"" if body is None else json.dumps(body).encode()
        authorization = authorization or self.signed(self.claims(method, path, data, **changes))
        headers = {"Authorization": authorization, "Content-Type": "application/json"}
        return self.server.ask(method, path, data=data or None, headers=headers, token="")

    # --- MQTT ------------------------------------------------------------------------------------------------------------

    def connect(self, timeout_s: float = 15.0) -> DeviceRig:
        """Connects with its certificate and subscribes to what a device may read."""
        self._connected.clear()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=self.id, clean_session=False)
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        context.load_cert_chain(str(self.folder / "device.pem"), str(self.folder / "device.key"))
        client.tls_set_context(context)
        client.will_set(topics.state(self.id), wire.encode(wire.State(status="offline", birth=self.birth)), 1, True)
        client.on_connect = self._on_connect
        client.on_subscribe = lambda *_: self._connected.set()
        client.on_message = self._on_message
        deadline = time.monotonic() + timeout_s
        while True:
            # The broker reads its new user a moment after the enrolment's answer.
            try:
                client.connect(self.server.mqtt["host"], self.server.mqtt["port"], keepalive=20)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        client.loop_start()
        if not self._connected.wait(timeout_s):
            client.loop_stop()
            raise AssertionError(f"{self.id}: no MQTT session")
        self.client = client
        return self

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            wanted = [topics.ack(self.id), topics.bell(self.id), topics.group_bell(ids.group_name(self.group))]
            client.subscribe([(topic, 1) for topic in wanted])

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        if message.topic == topics.ack(self.id):
            self.acked = max(self.acked, wire.decode(wire.Ack, message.payload).upto)
        else:
            self.bells.append((message.topic, wire.decode(wire.Bell, message.payload).version))

    def disconnect(self) -> None:
        """Ends the session in order: no will is sent."""
        if self.client is not None:
            self.client.disconnect()
            self.client.loop_stop()
            self.client = None
            self._connected.clear()

    def vanish(self) -> None:
        """Drops the connection as a lost network does: the broker sends the will."""
        if self.client is not None:
            sock = self.client.socket()
            self.client.loop_stop()
            if sock is not None:
                sock.close()
            self.client = None
            self._connected.clear()

    def report(self, running: dict[str, dict[str, str]] | None = None, status: Any = "online", **more: Any) -> None:
        """Publishes its retained state; ``running``: model -> {digest, version, state, variant?}."""
        assert self.client is not None
        run = {
            name: wire.Running(
                digest=r["digest"],
                version=r["version"],
                variant=r.get("variant", "onnx"),
                state=r["state"],  # type: ignore[arg-type]
            )
            for name, r in (running or {}).items()
        }
        state = wire.State(
            status=status,
            birth=self.birth,
            agent="0.1.0",
            group=self.group,
            running=run,
            runtimes={"onnx": "1.20"},
            **more,
        )
        self.client.publish(topics.state(self.id), wire.encode(state), qos=1, retain=True).wait_for_publish(10)

    def send(self, *records: tuple[str, bytes]) -> int:
        """Publishes records as one batch; returns the newest seq."""
        assert self.client is not None
        made = []
        for kind, body in records:
            self.seq += 1
            made.append(wire.Record(seq=self.seq, kind=kind, body=body))  # type: ignore[arg-type]
        batch = wire.encode_batch(wire.Batch(epoch=self.epoch, records=tuple(made)))
        self.client.publish(topics.up(self.id), batch, qos=1).wait_for_publish(10)
        return self.seq


def stop_orphans(pid: int) -> None:
    """Ends a process that a failing test left, by its id."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
