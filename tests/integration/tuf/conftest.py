"""A fleet's update side from real parts: CA, ceremony, repository, HTTPS server, couriers as processes.

Only the server's time is ours to turn, and the network ours to spoil.
"""

import contextlib
import datetime as dt
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from securesystemslib.signer import CryptoSigner, Signer
from skerry_agent.courier import __main__ as courier
from skerry_agent.errors import AgentError, Degraded, Rejected, Transient
from skerry_cli import catalog, key_files, keys
from skerry_contract import canonical, enrolment, group, layout, sealed
from skerry_contract import manifest as m
from skerry_server import ca
from skerry_server.metadata import make_online_key
from skerry_server.repository import Repository
from tuf.api.metadata import Metadata

from tests import warm

_KINDS = {Rejected: "rejected", Degraded: "degraded", Transient: "transient"}
Spoil = Callable[[BaseHTTPRequestHandler, bytes], bool]
"""Gets the request and the file's bytes before they are sent; True when it has answered itself."""


class Clock:
    """The server's clock, ahead of the real one by ``ahead``."""

    def __init__(self) -> None:
        self.ahead = dt.timedelta()

    def __call__(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + self.ahead


class Site:
    """An HTTPS server for one folder and a small device API; ``spoils`` by path prefix breaks answers.

    A spoil that keeps its client waiting waits for ``over``, so that no thread and no connection outlives the test.
    """

    def __init__(self, folder: Path, authority: ca.FleetCA, first_url: str = "") -> None:
        self.folder = folder
        self.authority = authority
        self.spoils: dict[str, Spoil] = {}
        self.over = threading.Event()
        self.connections: list[socket.socket] = []
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.tokens: dict[str, str] = {}  # secret -> device id
        self.devices: dict[str, tuple[str, ec.EllipticCurvePublicKey]] = {}  # kid -> (id, key)
        self.nonces: set[str] = set()
        self.membership: dict[str, Any] = {"group": "line-1", "tags": {"hall": "a"}, "version": 3}
        self.content_keys: dict[str, bytes] = {}  # digest -> key
        self.key_answers: list[tuple[int, Any]] = []  # given first, in the place of a content key
        self.shown_ca = authority.pem
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.get(self)

            def do_POST(self) -> None:
                site.post(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            # ``server_close`` waits for them.
            daemon_threads = False

            def get_request(self) -> tuple[socket.socket, Any]:
                found = super().get_request()
                site.connections.append(found[0])
                return found

            def handle_error(self, *_: object) -> None:
                pass  # clients that are killed in the middle are part of the tests

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.files.server_certificate, authority.files.server_key)
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server.server_close()
        for connection in self.connections:
            connection.close()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(path)
        if path == "/device/v1/ca":
            return _send(handler, 200, self.shown_ca.encode())
        if path == "/device/v1/nonce":
            nonce = os.urandom(12).hex()
            self.nonces.add(nonce)
            return _send(handler, 200, json.dumps({"nonce": nonce}).encode())
        if path == "/device/v1/self":
            if self.authenticate(handler, b"") is None:
                return _refuse(handler, 401, "unknown_device")
            return _send(handler, 200, json.dumps(self.membership).encode())
        if path.startswith("/repository/") and ".." not in path:
            file = self.folder / path.removeprefix("/repository/")
            if file.is_file():
                data = file.read_bytes()
                for prefix, spoil in self.spoils.items():
                    if path.startswith(prefix) and spoil(handler, data):
                        return None
                return self.send_file(handler, data)
        return _refuse(handler, 404, "not_found")

    def send_file(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        wanted = handler.headers.get("Range")
        start = 0
        if wanted:
            self.ranges.append(wanted)
            if handler.headers.get("If-Range", tag) == tag:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
        extra = {"ETag": tag}
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        _send(handler, 206 if start else 200, data[start:], extra)

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", "0")))
        self.asked.append(handler.path)
        value = json.loads(body)
        if handler.path.startswith("/device/v1/keys/"):
            return self._give_key(handler, body, handler.path.rpartition("/")[2])
        _, public = ca.read_request(value["csr"])
        now = dt.datetime.now(dt.UTC)
        if handler.path == "/device/v1/renew":
            device = self.authenticate(handler, body)
            if device is None:
                return _refuse(handler, 401, "unknown_device")
            issued = self.authority.issue_device(device, public, now)
            return _send(handler, 200, json.dumps({"certificate": issued.certificate_pem}).encode())
        device = self.tokens.get(value["token"])
        if device is None:
            return _refuse(handler, 401, "bad_enrolment_token")
        issued = self.authority.issue_device(device, public, now)
        self.devices[issued.public_key_sha256] = (device, public)
        answer = {
            "device_id": device,
            "group": "line-1",
            "certificate": issued.certificate_pem,
            "ca": self.authority.pem,
            "mqtt": {"host": "127.0.0.1", "port": 8883},
            "repository_url": f"{self.url}/repository",
        }
        return _send(handler, 200, json.dumps(answer).encode())

    def _give_key(self, handler: BaseHTTPRequestHandler, body: bytes, digest: str) -> None:
        device = self.authenticate(handler, body)
        if self.key_answers:
            status, value = self.key_answers.pop(0)
            return _send(handler, status, json.dumps(value).encode())
        if device is None or digest not in self.content_keys:
            return _refuse(handler, 404, "not_found")
        receiver = serialization.load_pem_public_key(json.loads(body)["encryption_key"].encode())
        assert isinstance(receiver, ec.EllipticCurvePublicKey)
        once = ec.generate_private_key(ec.SECP256R1())
        sender, point = (
            key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
            for key in (once.public_key(), receiver)
        )
        secret = once.exchange(ec.ECDH(), receiver)
        key, about = sealed.wrapping_key(secret, sender=sender, receiver=point, device=device, digest=digest)
        wrapped = sealed.Wrapped(point=sender, box=sealed.wrap(self.content_keys[digest], key, about, AESGCM))
        return _send(handler, 200, json.dumps({"wrapped": sealed.encode_wrapped(wrapped)}).encode())

    def authenticate(self, handler: BaseHTTPRequestHandler, body: bytes) -> str | None:
        token = handler.headers.get("Authorization", "").removeprefix("Skerry-JWT ")
        known = self.devices.get(jwt.get_unverified_header(token)["kid"])
        if known is None:
            return None
        claims = jwt.decode(token, known[1], algorithms=["ES256"], options={"require": ["exp", "iat", "sub"]})
        bound = (claims["htm"], claims["htu"], claims["body"], claims["sub"])
        assert bound == (handler.command, handler.path, hashlib.sha256(body).hexdigest(), known[0])
        self.nonces.remove(claims["nonce"])
        return known[0]


def _send(handler: BaseHTTPRequestHandler, status: int, data: bytes, extra: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(extra or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def _refuse(handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
    _send(handler, status, json.dumps({"error": {"code": code, "message": "no"}}).encode())


class Bundle:
    """A bundle's bytes."""

    def __init__(self, model: str, version: str, *, weights: bytes = b"weights" * 1000, again: bytes = b"") -> None:
        golden = b'{"inputs":[],"outputs":[]}\n'
        self.blobs = {hashlib.sha256(data).hexdigest(): data for data in (weights, golden)}
        files = tuple(
            m.File(path=path, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            for path, data in (("golden/cases.jsonl", golden), ("model.onnx", weights), ("twin.bin", again))
            if data
        )
        self.manifest = m.encode(
            m.Manifest(
                schema=1,
                model=model,
                version=version,
                created="2026-01-01T00:00:00Z",
                owner=m.Owner(name="Ada", contact="ada@example.org"),
                licence="MIT",
                variants=(
                    m.Variant(
                        id="onnx",
                        runtime="onnx",
                        model="model.onnx",
                        files=files,
                        golden=m.Golden(cases="golden/cases.jsonl"),
                        needs=m.Needs(rss_mb=10, disk_mb=1),
                    ),
                ),
                inputs=(m.Tensor(name="x", datatype="FP32", shape=(-1, 2)),),
                outputs=(m.Tensor(name="y", datatype="FP32", shape=(-1, 2)),),
                reference=m.Reference(n=0),
            )
        )
        self.model, self.version = model, version
        self.digest = str(m.digest(self.manifest))
        self.files = [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in files]

    def addition(self, submitter: str = "ci") -> catalog.Addition:
        return catalog.Addition(model=self.model, version=self.version, digest=self.digest, submitter=submitter)


class Fleet:
    """Everything but devices."""

    def __init__(self, folder: Path, *, approvers: tuple[str, ...] = ("ada",), threshold: int = 1) -> None:
        self.folder = folder
        self.clock = Clock()
        self.authority = ca.open_ca(folder / "ca", dt.datetime.now(dt.UTC))
        self.authority.ensure_own([], dt.datetime.now(dt.UTC))
        self.online = make_online_key(folder / "keys" / "online.pem", folder / "keys" / "online.pub.json")
        self.ceremony = keys.hold_ceremony(
            folder / "ceremony",
            online_keys=key_files.read_online_keys((folder / "keys" / "online.pub.json").read_text()),
            password=None,
            now=self.clock(),
            approvers=approvers,
            threshold=threshold,
        )
        self.path = folder / "repository"
        self.repository = Repository(self.path, self.online, self.clock)
        self.repository.install_root(self.ceremony.root)
        self.repository.install_targets(self.ceremony.targets)
        self.repository.install_catalog(self.ceremony.catalog, self.ceremony.floors, lambda _: None)
        self.site = Site(self.path, self.authority)
        self.bundles: dict[str, Bundle] = {}

    @property
    def url(self) -> str:
        return f"{self.site.url}/repository"

    def signer(self, name: str) -> CryptoSigner:
        return key_files.load_signer(self.ceremony.key_path(name), None)

    def push(self, bundle: Bundle) -> Bundle:
        self.bundles[bundle.digest] = bundle
        for sha256, data in bundle.blobs.items():
            self.repository.put_blob([data], sha256)
        return bundle

    def source(self) -> catalog.RepositorySource:
        return catalog.RepositorySource(
            self.url, lambda d: self.bundles[d].manifest, self.authority.files.ca, self.site.content_keys.__getitem__
        )

    def verified(self) -> catalog.VerifiedCatalog:
        return catalog.read_catalog(
            self.url,
            root=self.ceremony.root,
            cache_dir=self.folder / "approver-cache",
            ca_file=self.authority.files.ca,
            now=self.clock(),
        )

    def propose(
        self, change: catalog.Change, *, approver: str = "ada", others: tuple[str, ...] = ()
    ) -> catalog.Proposal:
        return catalog.propose(
            self.verified(),
            change,
            source=self.source(),
            signer=self.signer(approver),
            approvers=(approver, *others),
            now=self.clock(),
        )

    def install(self, proposal: catalog.Proposal) -> None:
        self.repository.install_catalog(proposal.metadata, proposal.floors, self.manifest)

    def manifest(self, digest: str) -> bytes | None:
        return self.bundles[digest].manifest if digest in self.bundles else None

    def approve(self, *bundles: Bundle, **floors: str) -> None:
        change = catalog.Change(add=tuple(self.push(b).addition() for b in bundles), floors=floors)
        self.install(self.propose(change))

    def document(self, generation: int = 1, name: str = "line-1") -> bytes:
        return group.encode(group.GroupDocument(schema=1, group=name, generation=generation))

    def metadata_file(self, name: str) -> Path:
        return self.path / layout.METADATA_DIR / name

    def resign(self, name: str, signer: Signer, change: Callable[[Any], None]) -> bytes:
        """Changes a metadata file as somebody with that key would."""
        metadata: Metadata[Any] = Metadata.from_bytes(self.metadata_file(name).read_bytes())
        change(metadata.signed)
        metadata.sign(signer)
        return metadata.to_bytes()

    def token(self, device: str = "press-7", **wrong: str) -> str:
        secret = f"secret-{device}"
        self.site.tokens[secret] = device
        right = {
            "server_url": self.site.url,
            "token": secret,
            "ca_sha256": self.authority.sha256,
            "root_sha256": self.ceremony.root_sha256,
        }
        return enrolment.build(enrolment.Enrolment(**{**right, **wrong}))


class Device:
    """A state folder, and couriers that run as processes on it."""

    def __init__(self, fleet: Fleet, state_dir: Path) -> None:
        self.fleet = fleet
        self.state_dir = state_dir
        self.progress: list[dict[str, Any]] = []

    def request(self, **fields: Any) -> bytes:
        common = {
            "state_dir": str(self.state_dir),
            "server_url": self.fleet.site.url,
            "repository_url": self.fleet.url,
            "now_s": time.time(),
            "lower_bound_s": 0,
            "limits": {"gap_s": 5.0, "errand_s": 30.0, "pause_s": 0.02, **fields.pop("limits", {})},
        }
        return json.dumps({**common, **fields}).encode()

    def start(self, verb: str, **fields: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "skerry_agent.courier", verb]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(self.request(**fields))
        process.stdin.close()
        process.stdin = None
        return process

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """The answer line; a crash fails the test."""
        given = self.request(**fields).decode()
        done = warm.run("skerry_agent.courier", [verb], env=os.environ, given=given, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        self.progress = [line["progress"] for line in lines[:-1]]
        return lines[-1]

    def ok(self, verb: str, **fields: Any) -> dict[str, Any]:
        answer = self.ask(verb, **fields)
        assert "ok" in answer, answer
        return answer["ok"]

    def error(self, verb: str, **fields: Any) -> tuple[str, str]:
        """Kind and code of the refusal."""
        answer = self.ask(verb, **fields)
        assert "error" in answer, answer
        assert answer["error"]["detail"]
        return answer["error"]["kind"], answer["error"]["code"]

    def enrol(self) -> "Device":
        self.ok("enrol", token=self.fleet.token())
        return self

    def sync(self, **fields: Any) -> dict[str, Any]:
        return self.ok("sync", group="line-1", **fields)

    def manifest(self, bundle: Bundle, **fields: Any) -> dict[str, Any]:
        return self.ok("manifest", model=bundle.model, version=bundle.version, digest=bundle.digest, **fields)

    def files(self) -> dict[str, bytes]:
        """Everything on disk but locks, to show that a refusal changed nothing."""
        return {
            str(path.relative_to(self.state_dir)): path.read_bytes()
            for path in sorted(self.state_dir.rglob("*"))
            if path.is_file() and "lock" not in path.name
        }


class DeviceHere(Device):
    """The same couriers in this process, for tests with many errands: what a start costs is not theirs to show."""

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        try:
            return {"ok": json.loads(json.dumps(courier.run(verb, self.request(**fields))))}
        except AgentError as error:
            kind = next(name for kind, name in _KINDS.items() if isinstance(error, kind))
            return {"error": {"kind": kind, "code": error.code, "detail": error.detail}}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "fleet")
    yield made
    made.site.close()


@pytest.fixture
def device(fleet: Fleet, tmp_path: Path) -> Device:
    return Device(fleet, tmp_path / "device").enrol()


@pytest.fixture
def blank(fleet: Fleet, tmp_path: Path) -> Device:
    return Device(fleet, tmp_path / "blank")


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(name: str, **how: Any) -> Fleet:
        made.append(Fleet(tmp_path / name, **how))
        return made[-1]

    yield make
    for one in made:
        one.site.close()


@pytest.fixture
def make_bundle() -> type[Bundle]:
    return Bundle


@pytest.fixture
def make_device(tmp_path: Path) -> Callable[[Fleet, str], Device]:
    return lambda fleet, name: Device(fleet, tmp_path / name)


@pytest.fixture
def sha256() -> Callable[[bytes], str]:
    return canonical.sha256
