"""A device with a whole update side, and what it goes through while its disk is recorded.

All parts are real: TUF repository with an offline-signed catalog, HTTPS server, the program ``skerry-agent`` with its couriers and workers,
ONNX models. The broker alone is away, so that records stay in the outbox.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from skerry_agent.control import ask
from skerry_cli import keys
from skerry_contract import group, ids, layout, sealed
from skerry_contract import manifest as m

from tests import models
from tests.integration.agent.rig import ROOT, wait_for
from tests.integration.tuf.conftest import Bundle, Fleet
from tests.integration.tuf.conftest import Device as Courier

HERE = Path(__file__).parent
MODEL, GROUP = "gas", ids.group_name("line-1")
REFUSED = models.CRASH_VALUE


class Built(Bundle):
    """A bundle that runs. ``content_key``: of an encrypted one."""

    def __init__(
        self, folder: Path, version: str, kind: str = "classifier", *, content_key: bytes | None = None, **choices: Any
    ) -> None:
        self.digest = models.build_bundle(folder, MODEL, version, kind, content_key=content_key, **choices)
        self.manifest = (folder / m.MANIFEST_FILE).read_bytes()
        self.model, self.version = MODEL, version
        found = m.parse(self.manifest).files()
        self.files = [{"path": one.path, "sha256": one.sha256, "size": one.size} for one in found]
        here = {one.sha256: (folder / one.path).read_bytes() for one in found}
        self.blobs = {
            sha256: data if content_key is None else models.seal(data, content_key) for sha256, data in here.items()
        }


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
        weights = random.Random(1).randbytes(60_000)
        changed = weights[:20_000] + b"another" * 200 + weights[21_400:]
        content_key = secrets.token_bytes(sealed.KEY_BYTES)
        more: dict[str, dict[str, Any]] = {
            "1.7.0": {}, "1.8.0": {"further": {"weights.bin": weights}}, "1.9.0": {"further": {"weights.bin": changed}},
            "1.10.0": {}, "2.0.0": {"content_key": content_key},
        }  # fmt: skip
        for seed, (version, choices) in enumerate(more.items(), len(self.bundles)):
            self.bundles[version] = Built(folder / f"bundle-{version}", version, seed=seed, n_golden=3, **choices)
        self.fleet.site.content_keys[self.bundles["2.0.0"].digest] = content_key
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
            self.fleet.site.spoils.pop(prefix, None)
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
