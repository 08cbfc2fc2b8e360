"""The demo's fleet: one server, sixteen agents, an application and a cable for each, and a hostile mirror; all real processes.

Owns starting them and asking after them. What happens to them is told in the acts; how they are ended is in ``processes``.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from skerry_contract import enrolment

from skerry_cli import key_files, keys, publishing
from skerry_cli.client import Api, quote
from skerry_cli.demo.application import TRUTH_AFTER_S, WRITE_EVERY_S, Counts, read_counts, write_world
from skerry_cli.demo.control import ask_agent
from skerry_cli.demo.models import MODEL
from skerry_cli.demo.processes import Processes
from skerry_cli.enrolling import complete_token
from skerry_cli.errors import Failed
from skerry_cli.profile import Profile

GROUP = "field"
RATE = 10.0
SETTINGS = {
    "window_s": 2.0,
    "sync_s": 60.0,
    "jitter_s": 0.0,
    "trial_s": 45.0,
    "trial_inferences": 30,
}
SERVER_SETTINGS = {
    "SKERRY_SERVER_ROLLOUT_TICK_S": "0.5",
    "SKERRY_SERVER_TELEMETRY_BUCKET_S": "5",
    "SKERRY_SERVER_DRIFT_LOOKBACK_S": "60",
    "SKERRY_SERVER_DELTAS_LOOK_S": "1",
}
"""Hours squeezed into seconds: buckets of 5 s, drift is looked for over the last minute, and what lacks a delta each second."""
_AGENT_TIMING = {"health_interval_s": 0.5, "backoff_scale": 0.1, "drain_s": 5.0, "ack_s": 10.0}
_START_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The running server. ``data``: its folder."""

    url: str
    mqtt_host: str
    mqtt_port: int
    data: Path


class Fleet:
    """See the module.

    Args:
        folder: the demo's folder.
        seed: of the rows that the applications draw.

    Attributes:
        batch: which rows the applications read now; ``change_world`` changes it.
        cable_ports: of each device whose network can be cut; mirrored: the one behind the mirror that lies.
        tflite: the devices that run TFLite and nothing else; the others run ONNX and nothing else.
        truth_after_s: between an answer and its label, at least and at most; write_every_s: how often applications leave their counts.
    """

    def __init__(self, folder: Path, processes: Processes, *, seed: int) -> None:
        self.folder = folder
        self.processes = processes
        self.batch = 0
        self.seed = seed
        self.devices: list[str] = []
        self.cable_ports: dict[str, list[int]] = {}
        self.mirrored = ""
        self.tflite: frozenset[str] = frozenset()
        self.truth_after_s = TRUTH_AFTER_S
        self.write_every_s = WRITE_EVERY_S
        self.overlay = folder / "mirror"

    def start_server(self) -> Server:
        """Starts the server in a new data folder and waits until it is ready."""
        data = self.folder / "server"
        command = [sys.executable, "-m", "skerry_server"]
        self.processes.start("server-init", [*command, "init", "--data", str(data)])
        if self.processes.wait("server-init", _START_S) != 0:
            raise Failed(f"skerry-server init failed: {self.processes.tail('server-init', 4)}")
        self.processes.start("server", [*command, "run", "--data", str(data)], environment=SERVER_SETTINGS)
        told = self.wait("the server to be ready", lambda: _read_json(data / "run.json"), _START_S)
        self.server = Server(
            url=told["url"], mqtt_host=told["mqtt"]["host"], mqtt_port=int(told["mqtt"]["port"]), data=data
        )
        token = (data / "admin.token").read_text().strip()
        self.api = Api(Profile(server=self.server.url, token=token, ca=data / "ca" / "ca.pem"))
        return self.server

    def hold_ceremony(self, now: dt.datetime) -> keys.Ceremony:
        """Throwaway keys of the demo's own; the server gets the signed documents and never the keys."""
        online = self.api.fetch("/api/v1/repository/online-keys")
        if online is None:
            raise Failed("the server names no online keys")
        self.ceremony = keys.hold_ceremony(
            self.folder / "keys", online_keys=key_files.read_online_keys(online), password=None, now=now
        )
        for role, metadata in (("root", self.ceremony.root), ("targets", self.ceremony.targets)):
            self.api.post("/api/v1/repository/metadata", {"role": role, "metadata": metadata.decode()})
        first = {"role": "catalog", "metadata": self.ceremony.catalog.decode(), "floors": self.ceremony.floors.decode()}
        self.api.post("/api/v1/repository/metadata", first)
        self.approver = publishing.Approver(
            self.api,
            root=self.ceremony.root,
            signer=key_files.load_signer(self.ceremony.key_path("approver"), None),
            name="approver",
            cache_dir=self.folder / "approver",
        )
        self.api.put(f"/api/v1/groups/{GROUP}", {"settings": SETTINGS})
        return self.ceremony

    def start_cables(self, devices: Sequence[str]) -> None:
        """The network of each of these devices goes through a relay of its own that can be cut."""
        ends = [self.server.url.removeprefix("https://"), f"{self.server.mqtt_host}:{self.server.mqtt_port}"]
        named = [argument for device in devices for argument in ("--device", device)]
        process = self.processes.start(
            "cable", [sys.executable, "-m", "skerry_cli.demo.cable", *named, *ends], stdin=True, stdout=True
        )
        assert process.stdout is not None
        self._cable = process
        told = _answer(process.stdout.readline(), "cable")["ports"]
        self.cable_ports = {str(device): [int(port) for port in ports] for device, ports in told.items()}

    def cable(self, command: str, device: str) -> None:
        """``cut`` or ``mend``."""
        assert self._cable.stdin is not None
        assert self._cable.stdout is not None
        self._cable.stdin.write(f"{command} {device}\n".encode())
        self._cable.stdin.flush()
        _answer(self._cable.stdout.readline(), "cable")

    def start_mirror(self, device: str) -> None:
        """The device gets its updates from a mirror that can lie."""
        self.overlay.mkdir(parents=True, exist_ok=True)
        own = self.server.data / "ca"
        process = self.processes.start(
            "mirror",
            [
                *(sys.executable, "-m", "skerry_cli.demo.mirror", "--upstream", self.server.url),
                *(
                    "--ca",
                    str(own / "ca.pem"),
                    "--certificate",
                    str(own / "server.pem"),
                    "--key",
                    str(own / "server.key"),
                ),
                *("--overlay", str(self.overlay)),
            ],
            stdout=True,
        )
        assert process.stdout is not None
        self.mirror_port = int(_answer(process.stdout.readline(), "mirror")["port"])
        self.mirrored = device

    def be_honest(self) -> None:
        """Empties the mirror's overlay: it passes everything through again."""
        shutil.rmtree(self.overlay, ignore_errors=True)
        self.overlay.mkdir(parents=True, exist_ok=True)

    def enrol(self, device: str) -> None:
        """Writes the device's configuration and lets its agent enrol with a one-time token."""
        folder = self.device_folder(device)
        folder.mkdir(parents=True)
        (folder / "agent.toml").write_text(self._config(device), encoding="utf-8")
        token = complete_token(
            self.api, self.ceremony.root_sha256, {"device_id": device, "group": GROUP, "expires_s": 600}
        )
        if device in self.cable_ports:
            there = enrolment.parse(token)
            token = enrolment.build(
                enrolment.Enrolment(
                    server_url=f"https://127.0.0.1:{self.cable_ports[device][0]}",
                    token=there.token,
                    ca_sha256=there.ca_sha256,
                    root_sha256=there.root_sha256,
                )
            )
        self.processes.start(
            f"enrol-{device}",
            [*_AGENT, "enrol", "--config", str(folder / "agent.toml")],
            environment={"SKERRY_ENROLMENT_TOKEN": token},
        )
        self.devices.append(device)

    def finish_enrolment(self, device: str) -> None:
        """Waits for the enrolment, then starts the daemon."""
        if self.processes.wait(f"enrol-{device}", _START_S) != 0:
            raise Failed(f"{device} could not enrol: {self.processes.tail(f'enrol-{device}', 4)}")
        self.start_agent(device)

    def start_agent(self, device: str) -> None:
        """Starts the device's daemon."""
        config = self.device_folder(device) / "agent.toml"
        self.processes.start(device, [*_AGENT, "run", "--config", str(config)])

    def start_application(self, device: str) -> None:
        """Starts the application that asks this device's agent."""
        self.processes.start(
            f"app-{device}",
            [
                *(sys.executable, "-m", "skerry_cli.demo.application", "--device", device, "--model", MODEL),
                *("--serving", str(self.device_folder(device) / "state" / "run" / "serving.json")),
                *("--out", str(self._counts_file(device)), "--world", str(self._world_file), "--rate", str(RATE)),
                *("--seed", str(self.seed * 1000 + self.devices.index(device))),
                *("--truth-after", *map(str, self.truth_after_s), "--write-every", str(self.write_every_s)),
            ],
        )

    def change_world(self, batch: int) -> None:
        """From now on every application reads rows of this batch."""
        write_world(self._world_file, batch)
        self.batch = batch

    def counts(self, device: str) -> Counts:
        """What the device's application has counted."""
        return read_counts(self._counts_file(device)) or Counts(device=device)

    def sync(self, device: str) -> None:
        """Asks the agent on its control socket to look at the repository now."""
        ask_agent(self.device_folder(device) / "state" / "run" / "control.sock", "POST", "/skerry/v1/sync")

    def status(self, device: str) -> dict[str, Any]:
        """What the agent says of itself."""
        return ask_agent(self.device_folder(device) / "state" / "run" / "control.sock", "GET", "/skerry/v1/status")

    def status_address(self, device: str) -> str:
        """``host:port`` where the agent answers applications."""
        told = _read_json(self.device_folder(device) / "state" / "run" / "serving.json") or {}
        return f"{told.get('host', '?')}:{told.get('port', '?')}"

    def device(self, device: str) -> dict[str, Any]:
        """What the server knows of a device."""
        return dict(self.api.get(f"/api/v1/devices/{quote(device)}"))

    def listed(self) -> dict[str, dict[str, Any]]:
        """What the server knows of all devices, by id."""
        return {str(item["id"]): item for item in self.api.items("/api/v1/devices", group=GROUP)}

    def events(self, device: str) -> list[dict[str, Any]]:
        """The device's events, oldest first."""
        return sorted(self.api.items(f"/api/v1/devices/{quote(device)}/events"), key=lambda event: int(event["id"]))

    def running(self, item: dict[str, Any]) -> tuple[str, str]:
        """Version and state of the model on a device, as the server heard."""
        run = (item.get("running") or {}).get(MODEL) or {}
        return str(run.get("version", "")), str(run.get("state", ""))

    def variant(self, item: dict[str, Any]) -> str:
        """Variant of the model on a device, as the server heard."""
        return str(((item.get("running") or {}).get(MODEL) or {}).get("variant", ""))

    def runtime(self, device: str) -> str:
        """The one runtime that the device's configuration allows."""
        return "tflite" if device in self.tflite else "onnx"

    def wait(
        self,
        what: str,
        condition: Callable[[], T | None],
        timeout_s: float,
        *,
        every_s: float = 0.25,
        progress: Callable[[], None] | None = None,
    ) -> T:
        """Waits until the condition gives something true.

        Raises:
            Failed: not in time, or a process of the fleet ended by itself.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = condition()
            if found:
                return found
            dead = [text for text in self.processes.died() if not text.startswith(("enrol-", "server-init"))]
            if dead:
                name = dead[0].partition(" ")[0]
                raise Failed(f"{', '.join(dead)} ended by itself while waiting for {what}\n{self.processes.tail(name)}")
            if time.monotonic() > deadline:
                raise Failed(f"waited {timeout_s:g} s for {what}")
            if progress is not None:
                progress()
            time.sleep(every_s)

    def device_folder(self, device: str) -> Path:
        """Configuration and state of a device."""
        return self.folder / "devices" / device

    @property
    def _world_file(self) -> Path:
        return self.folder / "world"

    def _counts_file(self, device: str) -> Path:
        return self.device_folder(device) / "application.json"

    def _config(self, device: str) -> str:
        lines = [f"state_dir = {json.dumps(str(self.device_folder(device) / 'state'))}"]
        lines += ["[device]", f"runtimes = [{json.dumps(self.runtime(device))}]"]
        if device in self.cable_ports:
            http_port, mqtt_port = self.cable_ports[device]
            lines += ["[server]", f'url = "https://127.0.0.1:{http_port}"']
            lines += ["[repository]", f'url = "https://127.0.0.1:{http_port}/repository"']
            lines += ["[mqtt]", 'host = "127.0.0.1"', f"port = {mqtt_port}"]
        if device == self.mirrored:
            lines += ["[server]", f'url = "https://127.0.0.1:{self.mirror_port}"']
            lines += ["[repository]", f'url = "https://127.0.0.1:{self.mirror_port}/repository"']
        lines += ["[timing]", *(f"{name} = {value}" for name, value in _AGENT_TIMING.items())]
        return "\n".join(lines) + "\n"


_AGENT = (sys.executable, "-m", "skerry_agent")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None


def _answer(line: bytes, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        raise Failed(f"{name}: wanted a line of JSON, got {line[:80]!r}") from None
