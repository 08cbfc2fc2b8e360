"""A server and one agent that reaches it through a relay that counts: what an update takes on the wire."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from skerry_cli import bundle, catalog, publishing, sealing
from skerry_cli.demo.fleet import GROUP, SETTINGS, Fleet
from skerry_cli.demo.processes import Processes
from skerry_contract import sealed

from tests import models
from tests.relay import Relay

DEVICE = "gas-1"


class Site:
    """One server, one agent that reaches it through a relay."""

    def __init__(self, folder: Path, *, cuttable: bool = False) -> None:
        self.folder = folder
        self._cuttable = cuttable
        self._relays: list[Relay] = []
        self.processes = Processes(folder, leashed=True)
        self.fleet = Fleet(folder, self.processes, seed=1)

    def start(self) -> None:
        fleet = self.fleet
        fleet.start_server()
        self.relay = Relay(int(fleet.server.url.rpartition(":")[2]))
        self._relays = [self.relay, *([Relay(fleet.server.mqtt_port)] if self._cuttable else [])]
        fleet.cable_ports[DEVICE] = [
            self.relay.port,
            self._relays[-1].port if self._cuttable else fleet.server.mqtt_port,
        ]
        fleet.hold_ceremony(dt.datetime.now(dt.UTC))
        fleet.api.put(f"/api/v1/groups/{GROUP}", {"settings": {**SETTINGS, "trial_s": 1.0}})
        fleet.enrol(DEVICE)
        fleet.finish_enrolment(DEVICE)

    def cut(self) -> None:
        """The device has no network any more (where this site is ``cuttable``)."""
        for relay in self._relays:
            relay.cut()

    def mend(self) -> None:
        """It has again."""
        for relay in self._relays:
            relay.mend()

    def publish(self, number: int, further: dict[str, bytes], content_key: bytes | None = None) -> str:
        """Builds, pushes and approves version ``number``, encrypted with the content key; its digest."""
        folder = self.folder / f"bundle-{number}"
        digest = models.build_bundle(folder, version=f"{number}.0.0", further=further, content_key=content_key)
        if content_key is not None:
            sealing.key_file(folder).write_bytes(sealed.encode_key_file(content_key))
        publishing.push(self.fleet.api, bundle.read_bundle(folder))
        addition = catalog.Addition(model="gas", version=f"{number}.0.0", digest=digest, submitter="test")
        self.fleet.approver.change(catalog.Change(add=(addition,)), now=dt.datetime.now(dt.UTC), folder=folder)
        return digest

    def delta_to(self, number: int, most_s: float = 120.0) -> dict[str, Any]:
        """What became of the delta to a version, once that is known."""

        def found() -> Any:
            items = [item for item in self.fleet.api.items("/api/v1/deltas") if item["to_version"] == f"{number}.0.0"]
            return next((item for item in items if item["state"] not in ("waiting", "making")), None)

        return dict(self.fleet.wait(f"the delta to {number}.0.0", found, most_s))

    def assign(self, digest: str) -> None:
        """Gives the group its first bundle, and waits until the device has it."""
        self.fleet.api.put(f"/api/v1/groups/{GROUP}/models/gas", {"stable": digest})
        self.confirmed(digest)

    def confirmed(self, digest: str) -> None:
        def found() -> bool:
            running = self.fleet.device(DEVICE)["running"].get("gas", {})
            return running.get("digest") == digest and str(running.get("state")).startswith("confirmed")

        self.fleet.wait("the version to be confirmed", found, 90.0)

    def update(self, digest: str) -> tuple[int, dict[str, Any]]:
        """Bytes that came through the relay, and what the device says it took."""
        before = self.relay.came
        self.fleet.api.put(f"/api/v1/devices/{DEVICE}/pins/gas", {"digest": digest, "reason": "test"})
        self.confirmed(digest)
        return self.relay.came - before, self.told(digest)

    def told(self, digest: str) -> dict[str, Any]:
        def found() -> Any:
            events = [event["data"] for event in self.fleet.events(DEVICE) if event["name"] == "update"]
            ended = [one for one in events if one.get("digest") == digest and one["state"].startswith("confirmed")]
            return ended[-1] if ended else None

        return dict(self.fleet.wait("the event", found, 30.0))["fetched"]

    def close(self) -> None:
        self.processes.stop()
        for relay in self._relays:
            relay.close()
