"""What a device goes through while its disk is recorded: the parts of a story, and the scene in which each of them ended.

``FirstStory`` is a device's first updates, good and bad ones; ``second_story`` goes on with what holds an update, orders it, or brings it
in another way.
"""

from __future__ import annotations

import abc
import contextlib
import http.client
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from skerry_cli import catalog

from tests.crash.world import CONFIRMED, MODEL, REFUSED, Agent, World
from tests.integration.agent.rig import wait_for


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The fleet's side as it was: what the repository held, what the server said of the device, what was broken."""

    world: World
    repository: Path
    membership: dict[str, Any]
    spoils: dict[str, Callable[[BaseHTTPRequestHandler, bytes], bool]]

    def play(self) -> None:
        """It is so again."""
        site = self.world.fleet.site
        site.folder = self.repository
        site.membership, site.spoils = dict(self.membership), dict(self.spoils)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the story.

    Attributes:
        name: what happens.
        offered: the version that the group document names in it.
        before, after: what is confirmed when it begins and when it has ended; empty for nothing.
        code: why what was offered was not taken; empty where it was, or where nothing hangs on it.
        begin, end: places in the record, bytes.
        scene: of its end.
        pardons: a person clears what failed; releases: owners whose locks on updates end.
        held: what was offered lies ready at the end, and waits.
        goes_on: an update that lay ready may begin again by itself, without a network.
        repeat: what a person, or an operator, does again after a cut that may have come before it was stored; gets the folder of the device.
    """

    name: str
    offered: str
    before: str
    after: str
    code: str
    begin: int
    end: int
    scene: Scene
    pardons: bool = False
    releases: tuple[str, ...] = ()
    held: bool = False
    goes_on: bool = False
    repeat: Callable[[Path], None] | None = field(default=None, compare=False)


class Story(abc.ABC):
    """The life of a device, recorded. ``tell`` lives it; ``stages`` in order.

    Args:
        state_dir: the device's folder, as it is now; running: the version that is confirmed there.
    """

    def __init__(self, world: World, library: Path, state_dir: Path, running: str = "") -> None:
        self.world = world
        self.state_dir = state_dir
        self.running = running
        self.stages: list[Stage] = []
        self.agents: list[Agent] = []
        self._record = state_dir.with_name(f"{state_dir.name}.record")
        self._record.touch()
        self._environment = {
            "LD_PRELOAD": str(library), "SKERRY_BELOW": str(state_dir), "SKERRY_RECORD": str(self._record),
        }  # fmt: skip
        self.config = world.config(state_dir, state_dir.with_name(f"{state_dir.name}.toml"))

    @property
    def agent(self) -> Agent:
        """The one that runs."""
        return self.agents[-1]

    def start(self) -> None:
        """Starts an agent."""
        log = self.state_dir.with_name(f"{self.state_dir.name}.log")
        self.agents.append(Agent(self.config, self.state_dir, log, self._environment))

    def stage(self, name: str, offered: str, after: str, what: Callable[[], None], code: str = "", **more: Any) -> None:
        """Lives a part."""
        begin = self._record.stat().st_size
        what()
        end = self._record.stat().st_size
        self.stages.append(
            Stage(
                name=name, offered=offered, before=self.running, after=after, code=code, begin=begin, end=end,
                scene=self._scene(name), **more,
            )
        )  # fmt: skip
        self.running = after

    def _scene(self, name: str) -> Scene:
        site = self.world.fleet.site
        folder = self.state_dir.with_name(f"{self.state_dir.name}.scenes") / name
        shutil.copytree(site.folder, folder)
        return Scene(world=self.world, repository=folder, membership=dict(site.membership), spoils=dict(site.spoils))

    def tell(self) -> bytes:
        """Lives the life. Returns the record."""
        self.world.fleet.site.folder = self.world.fleet.path
        self.world.fleet.site.spoils.clear()
        try:
            self.live()
        finally:
            for agent in self.agents:
                agent.stop()
        return self._record.read_bytes()

    @abc.abstractmethod
    def live(self) -> None:
        """The parts."""

    def tried(self, version: str) -> None:
        """A version comes, is asked during its trial, and is confirmed."""
        self.agent.wait_running(version, "trial")
        self.agent.infer(12)
        self.agent.wait_running(version)
        # What follows its confirmation: the event, and what is cleared away.
        self.agent.wait(lambda s: s["update"]["state"] == "confirmed", "its rest")
        time.sleep(0.3)

    def updated(self, version: str) -> Callable[[], None]:
        """An update that is taken."""

        def act() -> None:
            self.world.publish(version)
            self.agent.sync()
            self.tried(version)

        return act

    def ended(self, version: str, code: str, meanwhile: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """An update that is not."""

        def act() -> None:
            self.world.publish(version)
            self.agent.sync()
            meanwhile()
            self.agent.wait_ended(version, code)
            self.agent.wait(lambda s: s["running"][MODEL]["state"] in CONFIRMED, f"what ran before, after {version}")

        return act


class FirstStory(Story):
    """From the first bundle on."""

    def live(self) -> None:
        """The parts."""
        world = self.world
        self.stage("first", "1.0.0", "1.0.0", self._first)
        self.stage("update", "1.1.0", "1.1.0", self.updated("1.1.0"))
        world.spoil("1.2.0", world.flip)
        self.stage("refused", "1.2.0", "1.1.0", self.ended("1.2.0", "mirror_wrong"), "mirror_wrong")
        self.stage("unproved", "1.3.0", "1.1.0", self.ended("1.3.0", "golden_failed"), "golden_failed")
        self.stage("crashed", "1.4.0", "1.1.0", self.ended("1.4.0", "trial_crashed", self._poison), "trial_crashed")
        world.spoil("1.5.0", slowly)
        self.stage("withdrawn", "1.5.0", "1.1.0", self.ended("1.5.0", "withdrawn", self._withdraw))
        self.stage("reverted", "1.1.0", "1.0.0", self._revert)
        self.stage("rotated", "1.1.0", "1.0.0", self._rotate)
        self.stage("again", "1.1.0", "1.1.0", self._pardoned, pardons=True)
        self.stage("collected", "1.6.0", "1.6.0", self.updated("1.6.0"))
        self.stage("restarted", "1.6.0", "1.6.0", self._restarted)

    def _first(self) -> None:
        self.world.publish("1.0.0")
        self.start()
        self.tried("1.0.0")

    def _poison(self) -> None:
        self.agent.wait_running("1.4.0", "trial")
        self.agent.infer(3)
        # The connection of a request that kills its worker breaks.
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.agent.infer(1, value=REFUSED)

    def _withdraw(self) -> None:
        self.agent.wait(lambda s: s["update"]["version"] == "1.5.0" and s["update"]["state"] == "fetch", "a fetch")
        part = self.state_dir / "slots" / ".parts" / self.world.largest("1.5.0")
        wait_for(lambda: part.stat().st_size, why="a part of a download")
        self.world.publish("1.1.0")
        self.agent.sync()

    def _revert(self) -> None:
        # The plan keeps offering 1.1.0, which a person gave up: it is refused until it is pardoned.
        assert self.agent.call("POST", "/skerry/v1/revert", {"model": MODEL}).status == 200
        self.agent.wait_running("1.0.0")

    def _rotate(self) -> None:
        self.world.rotate_root()
        self.world.fleet.install(self.world.fleet.propose(catalog.Change(add=(), floors={MODEL: "1.0.0"})))
        self.agent.synced()

    def _pardoned(self) -> None:
        self.agent.sync(pardon=True)
        self.tried("1.1.0")

    def _restarted(self) -> None:
        self.agent.stop()
        self.start()
        self.agent.wait_running("1.6.0")


def slowly(handler: BaseHTTPRequestHandler, data: bytes) -> bool:
    """Serves half of a file, and then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    threading.Event().wait(2.0)
    return True
