"""A device's later life: an update that is held, orders, a delta, a way back that overtakes a download, a forced floor, and an encrypted bundle that comes on a stick."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from skerry_agent.control import ask
from skerry_cli import catalog
from skerry_contract import layout
from skerry_runtime import delta

from tests.crash.kept import kept
from tests.crash.story import Story, slowly
from tests.crash.world import CONFIRMED, MODEL
from tests.integration.agent.rig import wait_for

OWNER = "welder"
FLOOR = "2.0.0"


class SecondStory(Story):
    """From 1.6.0 on."""

    def live(self) -> None:
        """The parts."""
        world = self.world
        self.stage("held", "1.7.0", "1.6.0", self._held, held=True, repeat=self._lock)
        self.stage("activated", "1.7.0", "1.7.0", self._activated, releases=(OWNER,), goes_on=True, repeat=_activate)
        world.spoil("1.8.0", slowly)
        self.stage("cancelled", "1.8.0", "1.7.0", self._cancelled, "cancelled", repeat=self._cancel)
        world.spoil("1.8.0", None)
        self.stage("retried", "1.8.0", "1.8.0", self._retried, pardons=True)
        self._make_delta("1.8.0", "1.9.0")
        self.stage("delta", "1.9.0", "1.9.0", self._delta)
        world.spoil("1.10.0", slowly)
        self.stage("overtaken", "1.10.0", "1.8.0", self._overtaken, repeat=_revert)
        self.stage("forced", "1.8.0", "", self._forced)
        self.stage("carried", "2.0.0", "2.0.0", self._carried, repeat=self._import)

    def _lock(self, state_dir: Path) -> None:
        body = {"owner": OWNER, "reason": "a seam", "for_s": 3600}
        answer = ask(state_dir / "run" / "control.sock", "POST", "/skerry/v1/lock", body)
        assert answer.status == 200, answer

    def _held(self) -> None:
        self.start()
        self.agent.wait_running("1.6.0")
        self._lock(self.state_dir)
        self.world.publish("1.7.0")
        self.agent.sync()
        self.agent.wait(lambda s: (u := s["update"]) and (u["version"], u["state"]) == ("1.7.0", "ready"), "1.7.0")

    def _activated(self) -> None:
        _activate(self.state_dir)
        self.tried("1.7.0")
        assert self.agent.call("POST", "/skerry/v1/unlock", {"owner": OWNER}).status == 200

    def _order(self, **orders: int) -> None:
        self.world.fleet.site.membership["orders"] = orders

    def _fetching(self, version: str) -> None:
        """In the middle of a download that goes no further."""
        self.world.publish(version)
        self.agent.sync()
        self.agent.wait(lambda s: (u := s["update"]) and (u["version"], u["state"]) == (version, "fetch"), "a fetch")
        part = self.state_dir / "slots" / ".parts" / self.world.largest(version)
        wait_for(lambda: part.stat().st_size, why="a part of a download")

    def _cancelled(self) -> None:
        self._fetching("1.8.0")
        self._order(cancel=11)
        self.agent.sync()
        self.agent.wait_ended("1.8.0", "cancelled")

    def _cancel(self, state_dir: Path) -> None:
        """The operator orders it again, until the device gave it up: an order that came to nothing is not obeyed later."""
        digest, number = self.world.bundles["1.8.0"].digest, 11
        while digest not in kept(state_dir / "state.db").spent(told=True):
            number += 1
            assert number < 60, "the order is not obeyed"
            self._order(cancel=number)
            ask(state_dir / "run" / "control.sock", "POST", "/skerry/v1/sync", {})
            time.sleep(0.5)

    def _retried(self) -> None:
        self._order(cancel=11, retry=12)
        self.agent.sync()
        self.tried("1.8.0")

    def _make_delta(self, base: str, target: str) -> None:
        known, wanted = (self.world.bundles[version].blobs for version in (base, target))
        start, end = (self.world.largest(version) for version in (base, target))
        folder = self.world.folder / "delta"
        folder.mkdir()
        (folder / "base").write_bytes(known[start])
        (folder / "target").write_bytes(wanted[end])
        path = self.world.fleet.path / layout.delta(start, end)
        path.parent.mkdir(parents=True)
        delta.make(folder / "base", folder / "target", path)

    def _delta(self) -> None:
        asked = self.world.fleet.site.asked
        asked.clear()
        self.updated("1.9.0")()
        name = layout.delta(self.world.largest("1.8.0"), self.world.largest("1.9.0"))
        assert f"/repository/{name}" in asked
        assert f"/repository/{layout.blob(self.world.largest('1.9.0'))}" not in asked

    def _overtaken(self) -> None:
        # A person's way back is owed until the download has made way for it.
        self._fetching("1.10.0")
        _revert(self.state_dir)
        self.agent.wait_running("1.8.0")
        self.world.publish("1.8.0")
        self.agent.sync()
        self.agent.wait(lambda s: s["update"]["state"] in ("idle", *CONFIRMED) and not s["sync"]["code"], "its rest")

    def _forced(self) -> None:
        change = catalog.Change(add=(), floors={MODEL: FLOOR}, forced={MODEL: FLOOR})
        self.world.fleet.install(self.world.fleet.propose(change))
        self.agent.sync()
        self.agent.wait(lambda s: MODEL not in s["running"] and s["update"]["state"] == "idle", "that it stops")
        time.sleep(0.3)

    @property
    def _stick(self) -> Path:
        return self.world.folder / "stick"

    def _import(self, state_dir: Path) -> None:
        answer = ask(state_dir / "run" / "control.sock", "POST", "/skerry/v1/import", {"folder": str(self._stick)})
        assert answer.status in (200, 409), answer

    def _carried(self) -> None:
        self.world.publish("2.0.0")
        shutil.copytree(self.world.fleet.path, self._stick)
        asked = self.world.fleet.site.asked
        asked.clear()
        self._import(self.state_dir)
        self.agent.wait_running("2.0.0", "trial", *CONFIRMED)
        self.tried("2.0.0")
        assert not any("/blobs/" in path for path in asked), asked


def _revert(state_dir: Path) -> None:
    answer = ask(state_dir / "run" / "control.sock", "POST", "/skerry/v1/revert", {"model": MODEL})
    # There is nothing to go back to, or it is on its way, where it was ordered before the cut.
    assert answer.status in (200, 409), answer


def _activate(state_dir: Path) -> None:
    body = {"despite_locks": True}
    answer = ask(state_dir / "run" / "control.sock", "POST", "/skerry/v1/activate", body)
    # Nothing lies ready any more where it began before the cut.
    assert answer.status in (200, 409), answer
