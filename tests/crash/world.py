"""A device with a whole update side, and what it goes through while its disk is recorded.

All parts are real: TUF repository with an offline-signed catalog, HTTPS server, the program ``skerry-agent`` with its couriers and workers,
ONNX models. The broker alone is away, so that records stay in the outbox.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from skerry_agent.control import ask
from skerry_cli import keys
from skerry_contract import group, ids, layout
from skerry_contract import manifest as m

from tests import models
from tests.integration.agent.rig import ROOT, wait_for
from tests.integration.tuf.conftest import Bundle, Fleet
from tests.integration.tuf.conftest import Device as Courier

HERE = Path(__file__).parent
MODEL, GROUP = "gas", ids.group_name("line-1")
REFUSED = models.CRASH_VALUE


class Built(Bundle):
    """A bundle that runs."""

    def __init__(self, folder: Path, version: str, kind: str = "classifier", **choices: Any) -> None:
        self.digest = models.build_bundle(folder, MODEL, version, kind, **choices)
        self.manifest = (folder / m.MANIFEST_FILE).read_bytes()
        self.model, self.version = MODEL, version
        found = m.parse(self.manifest).files()
        self.files = [{"path": one.path, "sha256": one.sha256, "size": one.size} for one in found]
        self.blobs = {one.sha256: (folder / one.path).read_bytes() for one in found}


class World:
    """The fleet's side, with every bundle of the story approved, and a device that is enrolled and has never run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet = Fleet(folder / "fleet")
        self.bundles = {
            version: Built(folder / f"bundle-{version}", version, kind, seed=seed, n_golden=3)
            for seed, (version, kind) in enumerate(
                {
                    "1.0.0": "classifier", "1.1.0": "classifier", "1.2.0": "classifier", "1.3.0": "always-one",
                    "1.4.0": "crash-on-rows", "1.5.0": "classifier", "1.6.0": "classifier",
                }.items()
            )
        }  # fmt: skip
        self.fleet.approve(*self.bundles.values())
        self.generation = 0
        self.state_dir = folder / "device"
        self.courier = Courier(self.fleet, self.state_dir)

    def enrol(self) -> None:
        """Gives the device its identity. Nobody answers at the broker's address."""
        self.courier.enrol()
        path = self.state_dir / "identity" / "enrolled.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "mqtt": {"host": "127.0.0.1", "port": 9}}))

    def publish(self, version: str) -> None:
        """Makes a version stable."""
        self.generation += 1
        target = group.Target(digest=self.bundles[version].digest, version=version)
        plan = {MODEL: group.ModelPlan(stable=target)}
        document = group.GroupDocument(schema=1, group=GROUP, generation=self.generation, models=plan)
        self.fleet.repository.publish_group(GROUP, group.encode(document))

    def rotate_root(self) -> None:
        """The ceremony's people sign the next root."""
        found = keys.next_root(self.fleet.ceremony.root, signers=[self.fleet.signer("root")], now=self.fleet.clock())
        self.fleet.repository.install_root(found)

    def spoil(self, version: str, how: Callable[[BaseHTTPRequestHandler, bytes], bool] | None) -> None:
        """Breaks what is served of a version's largest file; None mends it."""
        prefix = f"/repository/{layout.blob(self.largest(version))}"
        if how is None:
            self.fleet.site.spoils.pop(prefix)
        else:
            self.fleet.site.spoils[prefix] = how

    def largest(self, version: str) -> str:
        """The sha256 of a version's largest file."""
        return str(max(self.bundles[version].files, key=lambda one: one["size"])["sha256"])

    def flip(self, handler: BaseHTTPRequestHandler, data: bytes) -> bool:
        """Serves a file with one bit changed."""
        self.fleet.site.send_file(handler, bytes([data[0] ^ 1]) + data[1:])
        return True

    def config(self, state_dir: Path, path: Path, *, local: bool = False) -> Path:
        """Writes a configuration of the agent; ``local``: with a unix socket alone for applications."""
        times = {
            "fold_interval_s": 0.2, "health_interval_s": 0.1, "sync_s": 60, "jitter_s": 0, "trial_s": 120,
            "trial_inferences": 10, "drain_s": 3, "ack_s": 2, "backoff_scale": 0.02,
        }  # fmt: skip
        serving = ["[serving]", 'port = "none"', f'socket = "{path.parent}/s"'] if local else []
        lines = [
            f'state_dir = "{state_dir}"',
            *serving,
            "[limits]",
            "disk_reserve_mb = 0.0",
            "[timing]",
        ]
        path.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in times.items())]) + "\n")
        return path

    def close(self) -> None:
        """Ends the server."""
        self.fleet.site.close()


class Agent:
    """A running ``skerry-agent``, and what it says."""

    def __init__(self, config: Path, state_dir: Path, log: Path, environment: dict[str, str] | None = None) -> None:
        self.state_dir = state_dir
        self.log_file = log
        command = [sys.executable, "-m", "skerry_agent", "run", "--config", str(config)]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **(environment or {})}
            )
        wait_for(self.status, why=lambda: f"the control socket: {log.read_text()[-3000:]}")

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Asks the control socket."""
        return ask(self.state_dir / "run" / "control.sock", method, path, body)

    def status(self) -> dict[str, Any]:
        """What ``skerry-agent status`` shows."""
        return dict(self.call("GET", "/skerry/v1/status").body)

    def sync(self, **body: Any) -> None:
        """Looks at the repository now."""
        assert self.call("POST", "/skerry/v1/sync", body).status == 200

    def synced(self) -> None:
        """Looks, and waits for the answer."""
        before = self.status()["sync"]["at_ms"]
        self.sync()
        self.wait(lambda s: s["sync"]["at_ms"] > before and not s["sync"]["code"], "a sync")

    def wait(self, what: Callable[[dict[str, Any]], Any], why: str) -> dict[str, Any]:
        """Until the status fits."""

        def found() -> dict[str, Any] | None:
            status = self.status()
            return status if what(status) else None

        return dict(wait_for(found, why=lambda: f"{why}: {self.log_file.read_text()[-3000:]}"))

    def wait_running(self, version: str, *states: str) -> None:
        """Until a version answers in one of these states."""
        self.wait(
            lambda s: (
                (r := s["running"].get(MODEL)) and r["version"] == version and r["state"] in (states or CONFIRMED)
            ),
            f"{version} in {states or CONFIRMED}",
        )

    def wait_ended(self, version: str, code: str) -> None:
        """Until an update of a version ended for a reason."""
        self.wait(
            lambda s: (u := s["update"]) and (u["version"], u["state"], u["code"]) == (version, "idle", code),
            f"the end of {version} by {code}",
        )

    def infer(self, n: int, *, value: float | None = None) -> list[str]:
        """Asks n times. Returns the versions that answered."""
        return infer(self.state_dir, n, value=value)

    def stop(self) -> None:
        """SIGTERM, and its end."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def infer(state_dir: Path, n: int, *, value: float | None = None) -> list[str]:
    """Asks the device's worker n times. Returns the versions that answered."""
    port = int(json.loads((state_dir / "run" / "serving.json").read_bytes())["port"])
    wait_for(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None, why="the address")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = models.rows(1)[0][0].tolist()
    if value is not None:
        data[0] = value
    versions = []
    for _ in range(n):
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}]}
        connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps(body))
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        versions.append(answer["model_version"])
    connection.close()
    return versions


CONFIRMED = ("confirmed", "confirmed_on_golden")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the story.

    Attributes:
        name: what happens.
        offered: the version that the group document names in it.
        before, after: what is confirmed when it begins and when it has ended; empty for nothing.
        code: why what was offered was not taken; empty where it was, or where nothing hangs on it.
        begin, end: places in the record, bytes.
    """

    name: str
    offered: str
    before: str
    after: str
    code: str
    begin: int
    end: int


class Story:
    """The life of a device, recorded. ``stages`` in order, ``record`` the bytes, ``start`` the folder as it was at first."""

    def __init__(self, world: World, library: Path) -> None:
        self._world = world
        self._record = world.folder / "record"
        self._record.touch()
        self._environment = {
            "LD_PRELOAD": str(library), "SKERRY_BELOW": str(world.state_dir), "SKERRY_RECORD": str(self._record),
        }  # fmt: skip
        self._config = world.config(world.state_dir, world.folder / "agent.toml")
        self.stages: list[Stage] = []
        self.running = ""

    def _start(self) -> Agent:
        return Agent(self._config, self._world.state_dir, self._world.folder / "agent.log", self._environment)

    def _stage(self, name: str, offered: str, after: str, what: Callable[[], None], code: str = "") -> None:
        begin = self._record.stat().st_size
        what()
        end = self._record.stat().st_size
        stage = Stage(name=name, offered=offered, before=self.running, after=after, code=code, begin=begin, end=end)
        self.stages.append(stage)
        self.running = after

    def tell(self) -> bytes:
        """Lives the life. Returns the record."""
        world = self._world
        agents: list[Agent] = []

        def first() -> None:
            world.publish("1.0.0")
            agents.append(self._start())
            self._tried("1.0.0", agents[-1])

        def updated(version: str) -> Callable[[], None]:
            def act() -> None:
                world.publish(version)
                agents[-1].sync()
                self._tried(version, agents[-1])

            return act

        def ended(version: str, code: str, meanwhile: Callable[[], None] = lambda: None) -> Callable[[], None]:
            def act() -> None:
                world.publish(version)
                agents[-1].sync()
                meanwhile()
                agents[-1].wait_ended(version, code)
                agents[-1].wait(
                    lambda s: s["running"][MODEL]["state"] in CONFIRMED, f"what ran before, after {version}"
                )

            return act

        def poison() -> None:
            agents[-1].wait_running("1.4.0", "trial")
            agents[-1].infer(3)
            # The connection of a request that kills its worker breaks.
            with contextlib.suppress(OSError, http.client.HTTPException):
                agents[-1].infer(1, value=REFUSED)

        def withdraw() -> None:
            agents[-1].wait(lambda s: s["update"]["version"] == "1.5.0" and s["update"]["state"] == "fetch", "a fetch")
            part = world.state_dir / "slots" / ".parts" / world.largest("1.5.0")
            wait_for(lambda: part.stat().st_size, why="a part of a download")
            world.publish("1.1.0")
            agents[-1].sync()

        def revert() -> None:
            # The plan keeps offering 1.1.0, which a person gave up: it is refused until it is pardoned.
            assert agents[-1].call("POST", "/skerry/v1/revert", {"model": MODEL}).status == 200
            agents[-1].wait_running("1.0.0")

        def rotate() -> None:
            world.rotate_root()
            world.fleet.install(world.fleet.propose(_floor("1.0.0")))
            agents[-1].synced()

        def pardoned() -> None:
            agents[-1].sync(pardon=True)
            self._tried("1.1.0", agents[-1])

        def restarted() -> None:
            agents[-1].stop()
            agents.append(self._start())
            agents[-1].wait_running("1.6.0")

        try:
            self._stage("first", "1.0.0", "1.0.0", first)
            self._stage("update", "1.1.0", "1.1.0", updated("1.1.0"))
            world.spoil("1.2.0", world.flip)
            self._stage("refused", "1.2.0", "1.1.0", ended("1.2.0", "mirror_wrong"), "mirror_wrong")
            self._stage("unproved", "1.3.0", "1.1.0", ended("1.3.0", "golden_failed"), "golden_failed")
            self._stage("crashed", "1.4.0", "1.1.0", ended("1.4.0", "trial_crashed", poison), "trial_crashed")
            world.spoil("1.5.0", _slowly)
            self._stage("withdrawn", "1.5.0", "1.1.0", ended("1.5.0", "withdrawn", withdraw))
            self._stage("reverted", "1.1.0", "1.0.0", revert)
            self._stage("rotated", "1.1.0", "1.0.0", rotate)
            self._stage("again", "1.1.0", "1.1.0", pardoned)
            self._stage("collected", "1.6.0", "1.6.0", updated("1.6.0"))
            self._stage("restarted", "1.6.0", "1.6.0", restarted)
        finally:
            for agent in agents:
                agent.stop()
        return self._record.read_bytes()

    def _tried(self, version: str, agent: Agent) -> None:
        agent.wait_running(version, "trial")
        agent.infer(12)
        agent.wait_running(version)
        # What follows its confirmation: the event, and what is cleared away.
        agent.wait(lambda s: s["update"]["state"] == "confirmed", "its rest")
        time.sleep(0.3)


def _slowly(handler: BaseHTTPRequestHandler, data: bytes) -> bool:
    """Serves half of a file, and then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    threading.Event().wait(2.0)
    return True


def _floor(version: str) -> Any:
    from skerry_cli import catalog

    return catalog.Change(add=(), floors={MODEL: version})


def recorder(folder: Path) -> Path:
    """The library, compiled."""
    library = folder / "recorder.so"
    make = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(HERE / "recorder.c"), "-ldl"]
    subprocess.run(make, check=True)
    return library


def tree_of(folder: Path) -> Iterator[tuple[str, bytes | str | None]]:
    """A folder as ``Disk.files`` tells it, sockets left out."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.endswith("-shm"):
            continue
        if path.is_symlink():
            yield name, os.readlink(path)
        elif path.is_dir():
            yield name, None
        elif path.is_file():
            yield name, path.read_bytes()
