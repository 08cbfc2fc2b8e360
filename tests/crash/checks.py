"""Starts a device on what a power cut left, and says what is not as it must be.

Always: one runnable version, whole to the last byte, and one that this moment of the story allows; an update that rests and says the truth;
a store that opens and has every record that was committed; the run of numbers goes on. With the network back (``finish``): the update
comes to the end that it would have had, real workers answer with it, and no file lies there that a life without a cut would not leave.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from skerry_agent.control import ask
from skerry_agent.slots import Slots, read_pointers
from skerry_contract import wire

from tests.crash.disk import Disk, Way, fingerprint, lay_out
from tests.crash.world import CONFIRMED, MODEL, REFUSED, ROOT, Stage, World, infer

BOOT_S, FINISH_S = 60.0, 120.0
OTHER_BOOT = "c" * 32
BY_DESIGN = frozenset({"rings_damaged", "rings_lost", "inferences_in_damaged_rings", "label_books_damaged"})
"""What a power cut may take: rings are memory of one boot."""

Committed = tuple[str, int, frozenset[tuple[int, str]]]


class Nursery:
    """Agents that are started by forking."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.crash.nursery"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)

    def _say(self, **asked: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, config: Path, log: Path, *, boot_id: str, real: bool = False) -> int:
        """An agent. Returns its process id."""
        return self._say(config=str(config), log=str(log), boot_id=boot_id, real=real)

    def end(self, pid: int) -> None:
        """Kills it."""
        self._say(end=pid)

    def close(self) -> None:
        """Ends the process that forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Examiner:
    """Cuts a story and looks at what comes of it.

    Args:
        scratch: where devices are laid out; a short path, best in memory.
    """

    def __init__(self, world: World, disk: Disk, stages: list[Stage], scratch: Path) -> None:
        self.world = world
        self.disk = disk
        self.stages = stages
        self.nursery = Nursery()
        self._scratch = scratch
        scratch.mkdir()
        self._number = 0

    def stage_of(self, point: int) -> Stage:
        """Where a point lies in the story."""
        for stage in self.stages:
            if point <= self.disk.point_at(stage.end):
                return stage
        return self.stages[-1]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 -- lives as long as the test
    def _committed(self, point: int) -> Committed:
        """What the store had on disk at a point that lies behind a synchronisation: (epoch, next number, records)."""
        files = self.disk.files(self.disk.left(point, "killed"))
        return self._held({name: data for name, data in files.items() if name in ("state.db", "state.db-wal")})

    def _held(self, files: dict[str, Any]) -> Committed:
        folder = self._folder()
        lay_out(files, folder)
        try:
            return held(folder / "state.db")
        finally:
            shutil.rmtree(folder)

    def _folder(self) -> Path:
        self._number += 1
        return self._scratch / str(self._number)

    def state(self, point: int, way: Way, seed: int = 0) -> dict[str, bytes | str | None]:
        """What is left."""
        return self.disk.files(self.disk.left(point, way, seed))

    def key(self, point: int, files: dict[str, bytes | str | None]) -> tuple[str, str, int]:
        """Equal for cuts of which one need be looked at: the same is left, and the same may be asked of it."""
        return fingerprint(files), self.stage_of(point).name, self.disk.last_sync_before(point)

    def examine(self, point: int, way: Way, files: dict[str, bytes | str | None], *, finish: bool = False) -> list[str]:
        """Faults of a start on these files."""
        folder = self._folder()
        state_dir, log = folder / "d", folder / "log"
        folder.mkdir()
        lay_out(files, state_dir)
        # The stand-in serves nobody; and of starts beside each other each would take up the story's address.
        config = self.world.config(state_dir, folder / "agent.toml", local=not finish)
        log.touch()
        boot_id = "" if way == "killed" else OTHER_BOOT
        pid = self.nursery.start(config, log, boot_id=boot_id, real=finish)
        try:
            return self._looked_at(point, way, files, state_dir, log, finish=finish)
        except AssertionError as error:
            return [f"{error}: {log.read_text()[-1500:]}"]
        finally:
            self.nursery.end(pid)
            _removed(folder)

    def _looked_at(
        self, point: int, way: Way, files: dict[str, bytes | str | None], state_dir: Path, log: Path, *, finish: bool
    ) -> list[str]:
        stage = self.stage_of(point)
        until(
            lambda: any(word in log.read_text() for word in ("agent up", "refused to start", "Traceback")),
            BOOT_S,
            "a start",
        )
        assert "agent up" in log.read_text(), "it does not start"
        # What the plan takes up again by itself meanwhile is in motion: a second look sees it stand.
        for _ in range(20):
            status = asked(state_dir)
            faults = self._running(stage, state_dir, status)
            if not faults:
                break
            time.sleep(0.05)
        faults += self._store(point, state_dir, status)
        if finish:
            faults += self._finished(stage, state_dir)
        return faults

    def _running(self, stage: Stage, state_dir: Path, status: dict[str, Any]) -> list[str]:
        faults = []
        allowed = {stage.before, stage.after}
        running = status["running"].get(MODEL)
        version = running["version"] if running else ""
        if version not in allowed:
            faults.append(f"runs {version or 'nothing'}, allowed are {sorted(allowed)}")
        update = status["update"] or {"state": "idle", "digest": "", "version": "", "code": "", "attempt": 0}
        # What was interrupted may be tried again at once, from what the device knows; without a network it gets no further.
        retried = update["state"] == "fetch" and update["version"] == stage.offered
        if update["state"] not in ("idle", *CONFIRMED) and not retried:
            faults.append(f"the update does not rest: {update}")
        if running:
            if running["state"] not in CONFIRMED:
                faults.append(f"what runs is {running['state']}")
            pointers = read_pointers(state_dir / "slots")[MODEL]
            slots = Slots(state_dir / "slots")
            for slot in (pointers.confirmed, pointers.active):
                assert slot is not None
                if slot.digest != running["digest"]:
                    faults.append(f"the pointer file names {slot.version}, {version} runs")
            if fault := slots.fault(pointers.confirmed):  # type: ignore[arg-type]
                faults.append(f"what runs is not whole: {fault}")
            if update["state"] in CONFIRMED and update["digest"] != running["digest"]:
                faults.append(f"{update['version']} is called confirmed, {version} runs")
            if update["state"] == "idle" and update["digest"] == running["digest"] and update["code"] == "":
                faults.append("what runs is called idle without a reason")
        if update["state"] == "idle" and update["version"] and not update["code"]:
            faults.append(f"an update ended and nothing says why: {update}")
        told = [event for event in events(state_dir / "state.db") if event.name == "update" and "digest" in event.data]
        if update["version"]:
            last = told[-1] if told else None
            said = (last.data["version"], last.data["state"], last.code) if last is not None else None
            if said != (update["version"], update["state"], update["code"]):
                faults.append(f"the last event says {said}, the update is {update}")
        return faults

    def _store(self, point: int, state_dir: Path, status: dict[str, Any]) -> list[str]:
        faults = []
        epoch, number, records = self._committed(self.disk.last_sync_before(point))
        got_epoch, got_number, got_records = held(state_dir / "state.db")
        if epoch and got_epoch != epoch:
            faults.append(f"a new epoch: {epoch} became {got_epoch}")
        if got_number < number:
            faults.append(f"the next number was {number}, and is {got_number}")
        if missing := records - got_records:
            faults.append(f"{len(missing)} committed records are gone: {sorted(missing)[:5]}")
        lost = set(status["outbox"]["lost"]) - BY_DESIGN
        if lost:
            faults.append(f"something is called lost: {status['outbox']['lost']}")
        # A power cut is no damage: what is set aside for being damaged was not written as it must be.
        if aside := [str(path.relative_to(state_dir)) for path in state_dir.rglob("*damaged*")]:
            faults.append(f"moved aside: {aside}")
        return faults

    # --- with the network back -------------------------------------------------------------------------------------------

    def _finished(self, stage: Stage, state_dir: Path) -> list[str]:
        """The stage's end, reached from here; what answers; and what lies there then."""
        # Of what a person ordered, power may have failed before it was stored.
        wanted = {stage.after} if stage.name != "reverted" else {stage.before, stage.after}
        asked(state_dir, "POST", "/skerry/v1/sync", pardon=stage.name == "again")

        def there() -> bool:
            status = asked(state_dir)
            running, update = status["running"].get(MODEL), status["update"]
            if not running or not update or status["sync"]["at_ms"] == 0 or status["sync"]["code"]:
                return False
            if running["state"] == "trial":
                _infer(state_dir, value=REFUSED if stage.code == "trial_crashed" else None)
                return False
            if update["state"] not in ("idle", *CONFIRMED) or running["state"] not in CONFIRMED:
                return False
            if stage.code and (update["version"], update["code"]) != (stage.offered, stage.code):
                return False
            return running["version"] in wanted

        until(there, FINISH_S, lambda: f"{sorted(wanted)} {stage.code}, it is {asked(state_dir)['update']}")
        answered, running = _infer(state_dir), asked(state_dir)["running"][MODEL]
        faults = []
        if answered != running["version"]:
            faults.append(f"{running['version']} is said to run, {answered} answers")
        return faults + self._leftovers(stage, state_dir)

    def _leftovers(self, stage: Stage, state_dir: Path) -> list[str]:
        end = self.disk.point_at(stage.end)
        clean = {_sort_of(path) for path in self.disk.files(self.disk.left(end, "killed"))}
        # The repository is at the story's end whatever the stage: roots and roles are there that came later.
        last = self.disk.files(self.disk.left(len(self.disk.operations), "killed"))
        clean |= {path for path in last if path.startswith("tuf/")}
        time.sleep(0.3)
        here = {_sort_of(str(path.relative_to(state_dir))) for path in state_dir.rglob("*")}
        more = {path for path in here - clean if not path.endswith((".sock", "-shm"))}
        return [f"left behind: {sorted(more)}"] if more else []

    def close(self) -> None:
        """Ends what was started."""
        self.nursery.close()


def _sort_of(path: str) -> str:
    """A path without what counts up: generations of rings."""
    folder, _, name = path.rpartition("/")
    if folder == "rings":
        return f"{folder}/*.{name.rpartition('.')[2]}"
    return path


def held(path: Path) -> Committed:
    """(epoch, next number, records) of a store; empty for one that is not there or has no tables yet."""
    if not path.exists():
        return "", 0, frozenset()
    database = sqlite3.connect(path, timeout=20)
    try:
        rows = database.execute("SELECT epoch, next_seq FROM epochs WHERE current = 1").fetchall()
        found = database.execute("SELECT seq, body FROM outbox").fetchall()
    except sqlite3.OperationalError:
        return "", 0, frozenset()
    finally:
        database.close()
    epoch, number = rows[0] if rows else ("", 0)
    return epoch, number, frozenset((seq, hashlib.sha256(body).hexdigest()[:16]) for seq, body in found)


def events(path: Path) -> list[wire.Event]:
    """The events in an outbox, oldest first."""
    database = sqlite3.connect(path, timeout=20)
    try:
        rows = database.execute("SELECT body FROM outbox WHERE kind = 'event' ORDER BY id").fetchall()
    finally:
        database.close()
    return [wire.decode(wire.Event, body) for (body,) in rows]


def asked(state_dir: Path, method: str = "GET", path: str = "/skerry/v1/status", **body: Any) -> dict[str, Any]:
    """What the agent answers on its control socket."""
    answer = ask(state_dir / "run" / "control.sock", method, path, body or None)
    assert answer.status == 200, answer
    return msgspec.convert(answer.body, dict[str, Any])


def until(what: Callable[[], Any], timeout_s: float, why: str | Callable[[], str]) -> None:
    """Waits for it."""
    end = time.monotonic() + timeout_s
    last = ""
    while time.monotonic() < end:
        try:
            if what():
                return
            last = ""
        except (OSError, KeyError) as error:
            last = repr(error)
        time.sleep(0.004)
    raise AssertionError(f"waited {timeout_s:g} s for {why() if callable(why) else why} {last}")


def _infer(state_dir: Path, value: float | None = None) -> str:
    """Asks a few times. Returns the version that answered last; empty when nobody does."""
    try:
        return infer(state_dir, 4, value=value)[-1]
    except (OSError, AssertionError, http.client.HTTPException):
        return ""


def _removed(folder: Path) -> None:
    """The worker of a killed agent may still write."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} cannot be removed")
