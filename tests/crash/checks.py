"""Starts a device on what a power cut left, and says what is not as it must be.

Always: one runnable version, whole to the last byte, and one that this moment of the story allows; an update that rests and says the truth;
a store that opens and has every record that was committed; the run of numbers goes on; nothing of what ``kept`` names is forgotten. With the network back (``finish``): the update
comes to the end that it would have had, real workers answer with it, and no file lies there that a life without a cut would not leave.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from skerry_agent import config as configuration
from skerry_agent import memory_folder, opening
from skerry_agent.control import ask
from skerry_agent.slots import Slots, read_pointers
from skerry_contract import ids, wire

from tests.crash import kept
from tests.crash.disk import Disk, Way, fingerprint, lay_out
from tests.crash.story import Stage
from tests.crash.world import CONFIRMED, MODEL, REFUSED, ROOT, World, infer

BOOT_S, FINISH_S = 60.0, 120.0
OTHER_BOOTS = ("c" * 32, "d" * 32)
BY_DESIGN = frozenset({"rings_damaged", "rings_lost", "inferences_in_damaged_rings", "label_books_damaged"})
"""What a power cut may take: rings are memory of one boot."""

Committed = tuple[str, int, frozenset[tuple[int, str]], kept.Kept]


class Nursery:
    """Agents that are started by forking. ``environment``: more of it, for them and their workers."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "tests.crash.nursery"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, **(environment or {})}
        )

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


def stage_at(disk: Disk, stages: Sequence[Stage], point: int) -> Stage:
    """Where a point lies in a story; behind its last part, as when the agent is ended, it lies in that."""
    return next((stage for stage in stages if point <= disk.point_at(stage.end)), stages[-1])


class Examiner:
    """Cuts a story and looks at what comes of it.

    Args:
        scratch: where devices are laid out; a short path, best in memory.
        boot_id: of the boot that the story was lived in.
    """

    def __init__(self, world: World, disk: Disk, stages: list[Stage], scratch: Path, *, boot_id: str = "") -> None:
        self._boot_id = boot_id
        self.world = world
        self.disk = disk
        self.stages = stages
        self.nursery = Nursery()
        self._scratch = scratch
        scratch.mkdir()
        self._number = 0

    def stage_of(self, point: int) -> Stage:
        """Where a point lies in the story."""
        return stage_at(self.disk, self.stages, point)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 -- lives as long as the test
    def _committed(self, point: int) -> Committed:
        """What the store had on disk at a point that lies behind a synchronisation: (epoch, next number, records, the state)."""
        files = self.disk.files(self.disk.left(point, "killed"))
        return self._held({name: data for name, data in files.items() if name in ("state.db", "state.db-wal")})

    def _held(self, files: dict[str, Any]) -> Committed:
        folder = self._folder()
        lay_out(files, folder)
        try:
            return *held(folder / "state.db"), kept.kept(folder / "state.db")
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
        pid = self.nursery.start(config, log, boot_id=boot_after(self._boot_id, way), real=finish)
        try:
            return self._looked_at(point, way, files, state_dir, log, finish=finish)
        except AssertionError as error:
            return [f"{error}: {log.read_text()[-1500:]}"]
        finally:
            self.nursery.end(pid)
            forget_opened(config)
            _removed(folder)

    def _looked_at(
        self, point: int, way: Way, files: dict[str, bytes | str | None], state_dir: Path, log: Path, *, finish: bool
    ) -> list[str]:
        until(
            lambda: any(word in log.read_text() for word in ("agent up", "refused to start", "Traceback")),
            BOOT_S,
            "a start",
        )
        assert "agent up" in log.read_text(), "it does not start"
        # What the plan takes up again by itself meanwhile is in motion: a second look sees it stand.
        for _ in range(20):
            status = asked(state_dir)
            faults = self._running(point, state_dir, status)
            if not faults:
                break
            time.sleep(0.05)
        faults += self._store(point, state_dir, status)
        faults += self._kept(point, state_dir)
        if finish:
            faults += self._finished(point, state_dir)
            faults += self._kept(point, state_dir)
        return faults

    def _running(self, point: int, state_dir: Path, status: dict[str, Any]) -> list[str]:
        stage, before = self.stage_of(point), self._committed(self.disk.last_sync_before(point))[3]
        faults = []
        forced = before.forced.get(MODEL)
        allowed = {
            version
            for version in (stage.before, stage.after)
            if not (forced and version) or ids.version_key(version) >= ids.version_key(forced)
        }
        if forced:
            # Nothing may answer where nothing permitted is here.
            allowed.add("")
        running = status["running"].get(MODEL)
        update = status["update"] or {"state": "idle", "digest": "", "version": "", "code": "", "attempt": 0}
        offered = update["version"] == stage.offered
        if stage.goes_on and offered and update["state"] in ("ready", "prove", "trial"):
            # It lay ready, may begin, and does: nothing of it needs a network.
            confirmed = read_pointers(state_dir / "slots")[MODEL].confirmed
            assert confirmed is not None
            return (
                []
                if confirmed.version == stage.before
                else [f"{confirmed.version} is confirmed before its trial ended"]
            )
        version = running["version"] if running else ""
        if version not in allowed:
            faults.append(f"runs {version or 'nothing'}, allowed are {sorted(allowed)}")
        # What was interrupted may be tried again at once, from what the device knows; without a network it gets no further.
        retried = update["state"] == "fetch" and offered
        waits = update["state"] == "ready" and offered and bool(before.locks)
        if update["state"] not in ("idle", *CONFIRMED) and not retried and not waits:
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
        epoch, number, records, _ = self._committed(self.disk.last_sync_before(point))
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
        if aside := [name for name in _names_below(state_dir) if "damaged" in name.rpartition("/")[2]]:
            faults.append(f"moved aside: {aside}")
        return faults

    def _kept(self, point: int, state_dir: Path) -> list[str]:
        """What was forgotten of what the device knew, or is done against it."""
        _, number, _, before = self._committed(self.disk.last_sync_before(point))
        stage = self.stage_of(point)
        return kept.faults(
            before, kept.kept(state_dir / "state.db"), events(state_dir / "state.db", since=number),
            pardoned=stage.pardons, released=stage.releases,
        )  # fmt: skip

    # --- with the network back -------------------------------------------------------------------------------------------

    def _finished(self, point: int, state_dir: Path) -> list[str]:
        """The stage's end, reached from here; what answers; and what lies there then."""
        stage = self.stage_of(point)
        wanted = {stage.after}
        stored = self._committed(self.disk.last_sync_before(point))[3].update
        if stage.name == "reverted" and stored["code"] != "reverted_by_operator":
            # Of what a person ordered, power may have failed before it was stored.
            wanted.add(stage.before)
        if stage.repeat is not None:
            stage.repeat(state_dir)
        asked(state_dir, "POST", "/skerry/v1/sync", pardon=stage.pardons)
        rests = ("ready",) if stage.held else ("idle", *CONFIRMED)

        def there() -> bool:
            status = asked(state_dir)
            running, update = status["running"].get(MODEL), status["update"]
            if not update or status["sync"]["at_ms"] == 0 or status["sync"]["code"]:
                return False
            if running and running["state"] == "trial":
                _infer(state_dir, value=REFUSED if stage.code == "trial_crashed" else None)
                return False
            if update["state"] not in rests or (running and running["state"] not in CONFIRMED):
                return False
            # An order may find the update at rest already, waiting for its next try.
            if stage.code not in ("", "cancelled") and (update["version"], update["code"]) != (
                stage.offered,
                stage.code,
            ):
                return False
            return (running["version"] if running else "") in wanted

        until(there, FINISH_S, lambda: f"{sorted(wanted)} {stage.code}, it is {asked(state_dir)['update']}")
        running = asked(state_dir)["running"].get(MODEL)
        answered = _infer(state_dir)
        faults = []
        if answered != (running["version"] if running else ""):
            faults.append(f"{running['version'] if running else 'nothing'} is said to run, {answered} answers")
        return faults + self._leftovers(stage, state_dir)

    def _leftovers(self, stage: Stage, state_dir: Path) -> list[str]:
        end = self.disk.point_at(stage.end)
        clean = {_sort_of(path) for path in self.disk.files(self.disk.left(end, "killed"))}
        time.sleep(0.3)
        here = {_sort_of(name) for name in _names_below(state_dir)}
        more = {path for path in here - clean if not path.endswith((".sock", "-shm"))}
        if not stage.after:
            # A ring that nobody has read yet waits for the next worker.
            more = {path for path in more if not path.startswith("rings/")}
        return [f"left behind: {sorted(more)}"] if more else []

    def close(self) -> None:
        """Ends what was started."""
        self.nursery.close()


def boot_after(boot_id: str, way: Way) -> str:
    """The boot of a start after a cut: another one where power failed."""
    return boot_id if way == "killed" else next(other for other in OTHER_BOOTS if other != boot_id)


def forget_opened(config: Path) -> None:
    """What was encrypted lies opened in memory, in a folder that the device noted."""
    if (folder := opening.folder_of(configuration.load(config, {}))) is not None:
        memory_folder.remove(folder)


def _names_below(folder: Path) -> list[str]:
    """Of files and folders, from the folder on. The agent that is looked at may remove some meanwhile."""
    return [
        os.path.relpath(os.path.join(at, name), folder)
        for at, folders, files in os.walk(folder)
        for name in (*folders, *files)
    ]


def _sort_of(path: str) -> str:
    """A path without what counts up: generations of rings."""
    folder, _, name = path.rpartition("/")
    if folder == "rings":
        return f"{folder}/*.{name.rpartition('.')[2]}"
    return path


def held(path: Path) -> tuple[str, int, frozenset[tuple[int, str]]]:
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


def events(path: Path, since: int = 0) -> list[wire.Event]:
    """The events in an outbox from a number on, oldest first."""
    database = sqlite3.connect(path, timeout=20)
    try:
        query = "SELECT body FROM outbox WHERE kind = 'event' AND seq >= ? ORDER BY id"
        rows = database.execute(query, (since,)).fetchall()
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
