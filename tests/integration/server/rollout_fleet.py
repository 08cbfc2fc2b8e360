"""Devices of a real server that follow published documents and count made-up requests: what tests of rollouts share."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from skerry_contract import group as g
from skerry_contract import histogram as h
from skerry_contract import layout, wire
from skerry_contract import window as w
from tuf.api.metadata import Metadata, Targets

from tests.rig_server import DeviceRig, Operator, ServerRig

MODEL = "gas"
BOOT = "b" * 32


class Maker(Operator):
    """The operator of a server that tests share: each version is pushed and approved once, whoever asks for it first."""

    def __init__(self, server: ServerRig, folder: Path) -> None:
        super().__init__(server, folder)
        self._published: dict[tuple[str, str, str, int], str] = {}

    def publish(self, model: str, version: str, kind: str = "classifier", seed: int = 0) -> str:
        key = (model, version, kind, seed)
        if key not in self._published:
            self._published[key] = super().publish(model, version, kind, seed)
        return self._published[key]


def published(server: ServerRig, group: str) -> g.GroupDocument:
    """The group's document as a device finds it: timestamp, snapshot, fleet, target."""

    def read(path: str) -> bytes:
        found = server.ask("GET", f"/repository/{path}", token="")
        assert found.status == 200, path
        return found.data

    timestamp = Metadata.from_bytes(read("metadata/timestamp.json")).signed
    snapshot = Metadata.from_bytes(read(f"metadata/{timestamp.snapshot_meta.version}.snapshot.json")).signed
    version = snapshot.meta["fleet.json"].version
    fleet = Metadata[Targets].from_bytes(read(f"metadata/{version}.fleet.json")).signed
    target = fleet.targets[layout.group_target(group)]  # type: ignore[arg-type]
    return g.parse(read(layout.target_file(target.path, target.hashes["sha256"])))


class Fleet:
    """Devices of one group that do what the published document says, and count made-up requests under its keys.

    ``failing`` is the share of failed requests of a digest; ``wrong`` the share of wrong answers of one whose answers get
    labels; ``refused`` digests that devices go back from, with the code; ``offline`` devices that are not connected.
    """

    def __init__(self, server: ServerRig, group: str, folder: Path, n: int, *, model: str = MODEL) -> None:
        self.server = server
        self.model = model
        self.group = group
        self.devices = [DeviceRig(server, f"{group}-{i:02d}", folder, group=group) for i in range(n)]
        self.failing: dict[str, float] = {}
        self.wrong: dict[str, float] = {}
        self._chance = random.Random(7)
        self.refused: dict[str, str] = {}
        self.running: dict[str, tuple[str, str]] = {}
        self.keys: dict[str, w.Key] = {}
        self.sent: dict[str, int] = {}
        self.offline: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        for device in self.devices:
            device.enrol()
        for device in self.devices:
            device.connect()
            device.report()
        server.wait("all online", lambda: self.online() == n)

    def online(self) -> int:
        return len(self.server.good("GET", f"/api/v1/devices?online=true&group={self.group}")["items"])

    def published(self) -> g.GroupDocument:
        """The group's document as its devices find it."""
        return published(self.server, self.group)

    def start(self, candidate: str, stages: list[dict[str, Any]], **more: Any) -> str:
        return start(self.server, self.group, candidate, stages, **{"model": self.model, **more})

    def live(self) -> list[DeviceRig]:
        return [device for device in self.devices if device.id not in self.offline]

    def follow(self, requests: int = 20) -> None:
        """One step of every connected device: obey the document, report, count some requests."""
        document = self.published()
        for device in self.live():
            found = g.assign(document, device.id, self.model, "")
            if found is None:
                continue
            if found.digest in self.refused:
                self._refuse(device, found)
                continue
            key = w.Key(self.model, found.digest, "onnx-int8", found.arm, found.rollout, found.stage)
            if self.running.get(device.id) != (found.digest, found.version):
                self.running[device.id] = (found.digest, found.version)
                device.report({self.model: {"digest": found.digest, "version": found.version, "state": "confirmed"}})
            failed = round(requests * self.failing.get(found.digest, 0.0))
            wrong = None
            if found.digest in self.wrong:
                wrong = sum(self._chance.random() < self.wrong[found.digest] for _ in range(requests))
            device.send(("window", window(key, requests - failed, failed, wrong)))
            self.keys[device.id] = key
            self.sent[device.id] = self.sent.get(device.id, 0) + requests

    def _refuse(self, device: DeviceRig, found: g.Assignment) -> None:
        if (device.id, found.digest) in self._told:
            return
        self._told.add((device.id, found.digest))
        at = w.Instant(BOOT, 1, 1, True)
        data = {"model": self.model, "digest": found.digest, "rollout": found.rollout}
        event = wire.Event(at=at, name="update", code=self.refused[found.digest], data=data)
        device.send(("event", wire.encode(event)))

    def drive(self, rollout: str, until: set[str], timeout_s: float = 40.0) -> dict[str, Any]:
        """Follows the document until the rollout is in one of the states."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.follow()
            found = self.server.good("GET", f"/api/v1/rollouts/{rollout}")
            if found["state"] in until:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{rollout} is {found['state']}: {found['now']}\n{self.server.log()[-2000:]}")

    def runs(self, digest: str) -> set[str]:
        return {device for device, (running, _) in self.running.items() if running == digest}

    def close(self) -> None:
        for device in self.devices:
            device.disconnect()


def window(key: w.Key, ok: int, failed: int, wrong: int | None = None) -> bytes:
    at = w.Instant(BOOT, time.time_ns(), time.time_ns() // 1_000_000, True)
    latency = w.Latency(total=h.exponential_of([2_000_000] * (ok + failed)))
    labels = w.Labels() if wrong is None else w.Labels(confusion=(ok + failed - wrong, wrong, *[0] * 7))
    counts = w.Counts(ok=ok, failed=failed, rows=ok)
    return wire.encode(w.Window(key=key, start=at, end=at, counts=counts, latency=latency, labels=labels))


def start(server: ServerRig, group: str, candidate: str, stages: list[dict[str, Any]], **more: Any) -> str:
    body = {"group": group, "model": MODEL, "candidate": candidate, "stages": stages, **more}
    return str(server.good("POST", "/api/v1/rollouts", body)["id"])


def decisions(server: ServerRig, rollout: str) -> list[tuple[str, str]]:
    items = server.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    return [(item["action"], item["verdict"]) for item in items if item["action"] != "hold"]


def audited(server: ServerRig) -> list[dict[str, Any]]:
    """The whole audit record, oldest first."""
    rows: list[dict[str, Any]] = []
    after = ""
    while True:
        part = server.good("GET", f"/api/v1/audit?limit=1000{after}")
        rows += part["items"]
        if part["next"] is None:
            return rows
        after = f"&after={quote(part['next'])}"


def first_version(maker: Operator, fleet: Fleet) -> str:
    digest = maker.publish(MODEL, "1.0.0")
    rollout = fleet.start(digest, [{"share": 1, "min_devices": 8, "min_inferences": 50}])
    fleet.drive(rollout, {"completed"})
    return digest
