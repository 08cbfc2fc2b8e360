"""A real Mosquitto for tests, with the configuration that an operator takes from ``packaging/mosquitto``, on free ports.

As systemd would, it starts the broker again when it dies. The kernel ends it with the test run.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from skerry_server.broker import child
from skerry_server.broker.natsconf import Client

PACKAGED = Path(__file__).parents[3] / "packaging" / "mosquitto"
START_S = 15.0


def program() -> str | None:
    """The broker's path; Debian keeps it where only root looks."""
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """``folder``: for everything; ``ca.pem``, ``broker.pem`` and ``broker.key`` are taken from ``certificates``."""

    kind = "mosquitto"
    binds_client_ids = True

    def __init__(self, folder: Path, certificates: Path) -> None:
        self.folder = folder / "mosquitto"
        self.folder.mkdir(parents=True)
        self.port, self.server_port = free_port(), free_port()
        self.restarts = 0
        self.acl_file = self.folder / "skerry.acl"
        self.log_file = self.folder / "broker.log"
        self.config_file = self.folder / "skerry.conf"
        for name in ("ca.pem", "broker.pem", "broker.key"):
            shutil.copy(certificates / name, self.folder / name)
        shutil.copy(PACKAGED / "skerry.acl", self.acl_file)
        self.config_file.write_text(self._config())
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._keep_running, daemon=True)

    def _config(self) -> str:
        text = (PACKAGED / "skerry.conf").read_text()
        for packaged, here in (
            ("/etc/mosquitto/skerry/", f"{self.folder}/"),
            ("persistence_location /var/lib/mosquitto/\n", f"persistence_location {self.folder}/\n"),
            ("listener 8883\n", f"listener {self.port} 127.0.0.1\n"),
            ("listener 8884 127.0.0.1\n", f"listener {self.server_port} 127.0.0.1\n"),
        ):
            assert packaged in text, packaged
            text = text.replace(packaged, here)
        # Debug: what it denies, it says at this level alone.
        return text + f"\nuser {getpass.getuser()}\nlog_dest file {self.log_file}\nlog_type all\n"

    @property
    def host(self) -> str:
        return "127.0.0.1"

    @property
    def pid(self) -> int | None:
        found = self._child
        return found.pid if found is not None and found.poll() is None else None

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(START_S + 5), f"mosquitto did not start:\n{self.log()[-2000:]}"

    def stop(self) -> None:
        self._stopping.set()
        found = self._child
        if found is not None and found.poll() is None:
            found.terminate()
        if self._thread.is_alive():
            self._thread.join(20)

    def reload(self) -> None:
        """Lets it read its list of rights again."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGHUP)

    def revoke(self, device: str) -> None:
        """As an operator does: the two lines of the packaged file, and SIGHUP."""
        text = self.acl_file.read_text()
        assert "#user <device>\n#topic deny #\n" in text
        self.acl_file.write_text(
            text.replace(
                "#user <device>\n#topic deny #\n", f"user {device}\ntopic deny #\n#user <device>\n#topic deny #\n"
            )
        )
        self.reload()

    def set_clients(self, clients: Iterable[Client]) -> None:
        """It takes no list: certificates are enough."""

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def refused_publishes(self) -> int:
        """How many messages it has refused by name."""
        return len(re.findall(r"Denied PUBLISH from", self.log()))

    def _keep_running(self) -> None:
        # The kernel's death signal follows the thread that started a child: this one lives as long as the broker.
        while not self._stopping.is_set():
            command = [
                sys.executable,
                "-I",
                child.__file__,
                str(os.getpid()),
                str(program()),
                "-c",
                str(self.config_file),
            ]
            with (self.folder / "output").open("ab") as output:
                self._child = subprocess.Popen(command, stdout=output, stderr=output)
            if self._listens():
                self._started.set()
            self._child.wait()
            if not self._stopping.is_set():
                self.restarts += 1

    def _listens(self) -> bool:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._child is not None and self._child.poll() is None:
            try:
                for port in (self.port, self.server_port):
                    socket.create_connection(("127.0.0.1", port), 0.5).close()
                return True
            except OSError:
                time.sleep(0.05)
        return False
