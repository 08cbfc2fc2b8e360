"""The whole server composed: database, CA, repository, broker child, ingest, orchestrator, API; one process, one folder.

``folder.initialise`` makes the folder; ``Server`` opens it. A server that was killed at any point starts again from its folder: the
database and the repository on disk are the truth, ports are kept in ``run.json`` so that devices find it again, and the
kernel ends the broker with its parent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
from sqlalchemy import Connection

from skerry_server import (
    ca,
    clock,
    collector,
    content_keys,
    device_auth,
    durable,
    listener,
    online_keys,
    ports,
    renewal,
)
from skerry_server.api.context import Context
from skerry_server.application import create_app
from skerry_server.broker.embedded import EmbeddedBroker
from skerry_server.broker.external import Broker, ExternalBroker
from skerry_server.broker.natsconf import Client
from skerry_server.config import Address, Settings
from skerry_server.db import queries
from skerry_server.db.engine import BUSY_TIMEOUT_MS, can_write, open_engine, reading
from skerry_server.db.migrations import migrate
from skerry_server.delta_maker import DeltaMaker
from skerry_server.errors import NotFound, Unavailable
from skerry_server.folder import only_server, require_initialised
from skerry_server.ingest import Ingest, IngestSettings
from skerry_server.mqtt import Endpoint, ServerLink
from skerry_server.orchestrator import Orchestrator
from skerry_server.provenance import ModelSigners
from skerry_server.publication import Publication
from skerry_server.repository import Repository
from skerry_server.telemetry import Telemetry
from skerry_server.validation import Validator
from skerry_server.watch import DriftWatch

log = logging.getLogger(__name__)

RUN_FILE = "run.json"


class Server:
    """One running server. ``run`` blocks until ``stop`` or a signal."""

    def __init__(self, settings: Settings) -> None:
        """Opens the folder and starts nothing yet.

        Raises:
            NotInitialised: ``initialise`` was never run here. AlreadyRunning: another server holds the folder.
        """
        self._settings = settings
        self._data = data = settings.data
        require_initialised(data)
        self._stack = contextlib.ExitStack()
        self._http: listener.Listener | None = None
        self._users_lock = threading.Lock()
        self._wrote_at = 0.0
        self._stack.enter_context(only_server(data))
        try:
            self._compose(data, settings)
        except BaseException:
            self._stack.close()
            raise

    def _compose(self, data: Path, settings: Settings) -> None:
        descriptors = listener.raise_descriptors()
        self._patience = listener.Patience(
            most=settings.limits.connections or listener.places(descriptors),
            first_s=settings.limits.first_request_s,
            stall_s=4 * settings.limits.stall_s,
        )
        log.info("limits descriptors=%d connections=%d", descriptors, self._patience.most)
        self._model_signers = ModelSigners.read(settings.policy.model_signers, data)
        now = clock.utc_now()
        last = ports.last_run(data / RUN_FILE)
        self._authority = ca.open_ca(data / "ca", now)
        names = (settings.server.public_host, *settings.server.public_names)
        self._authority.ensure_own(names, now)
        self._renewal = renewal.Renewal(
            self._authority,
            names,
            clock.utc_now,
            every_s=settings.server.certificate_check_s,
            renewed=self._use_certificates,
        )
        self._engine = open_engine(settings.database_url)
        self._stack.callback(self._engine.dispose)
        migrate(self._engine)
        self._repository = Repository(data / "repository", online_keys.open_all(data / "keys"), clock.utc_now)
        self._release_key = content_keys.ReleaseKey(data / "keys")
        self._publication = Publication(self._engine, self._repository, clock.now_ms)
        self._socket = ports.listen(settings.server.host, settings.server.port, last.get("port", 0))
        self._stack.callback(self._socket.close)
        self._port = int(self._socket.getsockname()[1])
        with reading(self._engine) as conn:
            enrolled = _broker_clients(conn)
        self._broker = self._choose_broker(enrolled, last.get("mqtt_port", 0))
        self._telemetry = Telemetry(
            self._engine, self.probe, clock.now_ms, self._certificates_left_s, lambda: self._publication.clock_behind
        )
        self._link: ServerLink | None = None
        self._ingest: Ingest | None = None
        self._orchestrator: Orchestrator | None = None

    def _certificates_left_s(self) -> dict[str, float]:
        """Seconds to the end of each certificate; that of an external broker too, which nobody renews but a person."""
        ends_s = self._link.broker_ends_s if self._link is not None else None
        if ends_s is None or not isinstance(self._broker, ExternalBroker):
            return self._renewal.left_s()
        return {**self._renewal.left_s(), "broker": ends_s - clock.now_ms() / 1000}

    def _choose_broker(self, enrolled: list[Client], last_port: int) -> Broker:
        settings, files_ = self._settings, self._authority.files
        if settings.broker.kind == "external":
            return ExternalBroker(settings.broker.public.port)
        return EmbeddedBroker(
            self._data,
            ca_file=files_.ca,
            certificate_file=files_.server_certificate,
            key_file=files_.server_key,
            clients=enrolled,
            host=settings.server.host,
            port=settings.mqtt.port or ports.if_free(settings.server.host, last_port),
        )

    @property
    def _mqtt(self) -> Address:
        """Where devices find the broker."""
        if isinstance(self._broker, ExternalBroker):
            return self._settings.broker.public
        return Address(self._settings.server.public_host, self._broker.port)

    def _endpoint(self) -> Endpoint:
        """Where this server finds the broker, and how it is known there."""
        settings, files_, data = self._settings, self._authority.files, self._data
        if isinstance(self._broker, ExternalBroker):
            wanted = settings.broker
            return Endpoint(
                host=wanted.own.host,
                port=wanted.own.port,
                ca_file=data / wanted.ca_file if wanted.ca_file else files_.ca,
                certificate_file=data / wanted.certificate_file
                if wanted.certificate_file
                else files_.client_certificate,
                key_file=data / wanted.key_file if wanted.key_file else files_.client_key,
            )
        return Endpoint(
            host="127.0.0.1" if settings.server.host in ("0.0.0.0", "::") else settings.server.host,  # noqa: S104
            port=self._broker.port,
            ca_file=files_.ca,
            certificate_file=files_.client_certificate,
            key_file=files_.client_key,
        )

    def _broker_is_well(self) -> bool:
        if isinstance(self._broker, EmbeddedBroker):
            return self._broker.pid is not None
        return self._link is not None and self._link.connected

    @property
    def url(self) -> str:
        """Where the API is."""
        host = self._settings.server.public_host
        return f"https://[{host}]:{self._port}" if ":" in host else f"https://{host}:{self._port}"

    def probe(self) -> dict[str, bool]:
        """Whether each part is well."""
        orchestrator, patience_s = self._orchestrator, 10 + 5 * self._settings.rollout.tick_s
        ticking = orchestrator is not None and time.monotonic() - orchestrator.last_tick < patience_s
        return {
            "database": self._database_answers(),
            "broker": self._broker_is_well(),
            "ingest": self._ingest is not None and self._ingest.healthy,
            "orchestrator": ticking and orchestrator is not None and orchestrator.last_tick > 0,
            "certificates": self._renewal.healthy,
        }

    def _database_answers(self) -> bool:
        """Whether what is to be written could be, lately: a writer that works long is no fault, one that never ends is."""
        now = time.monotonic()
        patient = now - self._wrote_at < BUSY_TIMEOUT_MS / 1000
        try:
            if can_write(self._engine, 0.0 if patient else 2.0):
                self._wrote_at = time.monotonic()
                return True
        except Exception:
            log.exception("the database does not answer")
            return False
        if not patient:
            log.error("nothing can be written for_s=%.0f", now - self._wrote_at)
        return patient

    def run(self) -> None:
        """Starts every part, prints the ready line, serves until told to stop, and stops every part again."""
        try:
            self._start_parts()
            collector.settle()
            self._serve()
        finally:
            self._stack.close()

    def _start_parts(self) -> None:
        data, settings = self._data, self._settings
        self._broker.start()
        self._stack.callback(_stop_part, "broker", self._broker.stop)
        link = self._link = ServerLink(self._engine, self._endpoint())
        self._broker.when_back(link.hurry)
        self._ingest = Ingest(self._engine, link, settings=IngestSettings(bucket_s=settings.telemetry.bucket_s))
        orchestrator = self._orchestrator = Orchestrator(
            self._engine,
            self._publication,
            link,
            settings.rollout,
            clock.now_ms,
            self._telemetry.observe_tick,
            self._telemetry.observe_fault,
        )
        # Before any bell can ring: what a crash left unpublished or unrecorded, and states that follow from the catalog.
        self._publication.align(starting=True)
        self._publication.publish(link)
        self._ingest.start()
        self._stack.callback(_stop_part, "ingest", self._ingest.stop)
        orchestrator.start()
        self._stack.callback(_stop_part, "orchestrator", orchestrator.stop)
        watch = DriftWatch(self._engine, settings.drift, settings.telemetry.bucket_s, clock.now_ms)
        watch.start()
        self._stack.callback(_stop_part, "drift", watch.stop)
        if settings.deltas.enabled:
            maker = DeltaMaker(
                self._engine,
                data / "repository",
                data / "deltas",
                settings.deltas,
                clock.now_ms,
                self._telemetry.observe_delta,
                self._content_key,
            )
            maker.start()
            self._stack.callback(_stop_part, "deltas", maker.stop)
        self._app = create_app(
            Context(
                settings=settings,
                engine=self._engine,
                authority=self._authority,
                publication=self._publication,
                repository=self._repository,
                validator=Validator(
                    data / "repository",
                    data / "validation",
                    settings.validation,
                    self._model_signers,
                ),
                release_key=self._release_key,
                nonces=device_auth.Nonces(life_s=settings.devices.nonce_s, most=settings.limits.nonces),
                telemetry=self._telemetry,
                url=self.url,
                mqtt=self._mqtt._asdict(),
                online_keys=online_keys.public(data / "keys"),
                wake=orchestrator.wake,
                refresh_broker_users=self._refresh_broker_users,
                probe=self.probe,
                now_ms=clock.now_ms,
            )
        )

    def _content_key(self, digest: str) -> bytes | None:
        """For deltas of encrypted bundles; None when it is not here, or cannot be read."""
        try:
            with reading(self._engine) as conn:
                return content_keys.find(conn, self._release_key, digest)
        except (NotFound, Unavailable):
            return None

    def _use_certificates(self) -> None:
        """The listener, the broker and the link's next session show the certificates that lie on disk now."""
        certificates = self._authority.files
        if self._http is not None:
            self._http.use_certificate(str(certificates.server_certificate), str(certificates.server_key))
        self._broker.reload()

    def _refresh_broker_users(self) -> None:
        # Read and told under one lock: of two enrolments at once, the later teller knows both.
        with self._users_lock, reading(self._engine) as conn:
            self._broker.set_clients(_broker_clients(conn))

    def _serve(self) -> None:
        certificates = self._authority.files
        config = uvicorn.Config(
            self._app,
            ssl_certfile=str(certificates.server_certificate),
            ssl_keyfile=str(certificates.server_key),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=30,
            # Connections are known by their peers, and nothing here believes a header about them.
            proxy_headers=False,
            ws="none",
        )
        self._http = listener.Listener(config, self._patience)
        self._renewal.start()
        self._stack.callback(_stop_part, "renewal", self._renewal.stop)
        announcer = threading.Thread(target=self._announce, name="announce", daemon=True)
        announcer.start()
        try:
            self._http.run(sockets=[self._socket])
        finally:
            log.info("stopped part=http")

    def _announce(self) -> None:
        """Prints the ready line once requests are answered and ingest is connected; an external broker is not waited for."""
        http, ingest = self._http, self._ingest
        assert http is not None
        assert ingest is not None
        deadline = time.monotonic() + 30
        while not (http.started and (ingest.healthy or isinstance(self._broker, ExternalBroker))):
            if http.should_exit:
                return
            if time.monotonic() > deadline:
                log.error("not ready parts=%s", self.probe())
                http.should_exit = True
                return
            time.sleep(0.02)
        line = {
            "ready": True,
            "url": self.url,
            "mqtt": self._mqtt._asdict(),
            "data": str(self._data),
        }
        kept = line | {"pid": os.getpid(), "port": self._port}
        if isinstance(self._broker, EmbeddedBroker):
            kept |= {"mqtt_port": self._broker.port}
        durable.write(self._data / RUN_FILE, json.dumps(kept).encode() + b"\n")
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def stop(self) -> None:
        """Ends ``run`` soon. May be called from any thread."""
        if self._http is not None:
            self._http.should_exit = True


def _broker_clients(conn: Connection) -> list[Client]:
    return [Client(device, key_sha256) for device, key_sha256 in queries.enrolled_keys(conn)]


def _stop_part(name: str, stop: Callable[[], None]) -> None:
    begun = time.monotonic()
    stop()
    log.info("stopped part=%s took_s=%.2f", name, time.monotonic() - begun)
