"""kill -9 over the whole story: rounds of a rollout each on one standing fleet, with kills at moments drawn from a seed.

A round is drawn from ``(seed, number)`` alone: what kind of rollout, which parts die, when, and how long until an init system
would have started them again. What cannot be drawn is where the system stands at that moment; so the log says what was
hit. A kill counts only when it is what ended the process: it is stopped first (SIGSTOP), found stopped, and only then killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skerry_agent import control
from skerry_agent.core import lifecycle
from skerry_cli.demo.application import Counts
from skerry_cli.demo.fleet import GROUP, SETTINGS
from skerry_cli.demo.models import MODEL, Made
from skerry_cli.demo.processes import start_time
from skerry_cli.demo.reckoning import server_counts
from skerry_cli.errors import CliError

from tests.system.conftest import Rig

Kind = Literal["server", "broker", "supervisor", "worker", "courier"]
Sort = Literal["plain", "judged", "bad"]
Tally = Counter[tuple[str, ...]]
KINDS: tuple[Kind, ...] = ("server", "broker", "supervisor", "worker", "courier")
ERRANDS = ("sync", "manifest", "fetch")
SORTS: tuple[Sort, ...] = ("plain", "judged", "bad", "plain")
ENDS = {"plain": "completed", "judged": "completed", "bad": "rolled_back"}
DEVICES, TFLITE = ("gas-1", "gas-2", "gas-3", "gas-4"), ("gas-4",)
GOOD, BAD = ("1.0.0", "2.0.0", "3.0.0"), "9.0.0"
"""Good versions take turns; of three, a device keeps two, so that every round downloads."""
WORLD, ANOTHER_WORLD = 1, 5
"""What applications read and good versions were trained on; what the bad one was trained on: it is right one time in five."""
MARK = "TEST_KILLS_FLEET"
"""Environment variable by which every process of the fleet is known."""
STAGE_S, ROUND_S = 240.0, 300.0
SETTLE_S = 120.0
FEW_CRASHES = lifecycle.CRASHES - 1
"""Kills of one device's worker within ``lifecycle.CRASHES_WITHIN_S``: one more, and it goes back by itself, which is its right."""
_BROKEN = ("ConnectionResetError", "RemoteDisconnected", "BrokenPipeError", "IncompleteRead", "ConnectionAbortedError")
_REFUSED = "ConnectionRefusedError"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill as it was drawn.

    Attributes:
        at: after the rollout's start, as a share of what the last rollout of the sort took; of a courier: from then on the next one.
        device: of supervisor, worker, courier.
        wait_s: of a courier how long after it was first seen; of server and supervisor how long until they are started again.
        which: in [0, 1), of several workers.
        errand: of a courier; any will do once the rollout has ended.
    """

    kind: Kind
    at: float
    device: str
    wait_s: float
    which: float
    errand: str = ""


@dataclass(kw_only=True)
class Pending:
    """A kill that has not happened yet.

    Attributes:
        at_s: after the rollout's start.
        kind: what is to die now: the drawn kind, but for a worker that may not crash again.
        prey: the courier that was seen, 0 for none; it is killed at ``due_s``.
        wait_s: how long after the next courier was seen; half as long after each that was missed.
    """

    drawn: Kill
    at_s: float
    kind: Kind
    wait_s: float
    prey: int = 0
    due_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One kill as it happened."""

    kind: Kind
    device: str
    at_s: float
    what: str

    def __str__(self) -> str:
        where = f" of {self.device}" if self.device else ""
        return f"{self.at_s:6.2f} s {self.kind}{where} ({self.what})"


def drawn_sort(seed: int, number: int) -> Sort:
    """Every four rounds have each sort once, ``plain`` twice."""
    block = list(SORTS)
    random.Random(f"{seed}:sorts:{number // len(block)}").shuffle(block)
    return block[number % len(block)]


def drawn_kills(seed: int, number: int) -> list[Kill]:
    """2 to 5 kills, by time. Every five rounds in a row each kind is sure to come, the rest is chance."""
    draw = random.Random(f"{seed}:kills:{number}")
    block = list(KINDS)
    random.Random(f"{seed}:kinds:{number // len(block)}").shuffle(block)
    kinds = [block[number % len(block)], *(draw.choice(KINDS) for _ in range(draw.randint(1, 4)))]
    kills = []
    for kind in kinds:
        at, device, which = draw.random(), draw.choice(DEVICES), draw.random()
        if kind == "courier":
            errand = draw.choice(ERRANDS)
            # What belongs to the update itself is over early.
            at = at if errand == "sync" else at / 3
            kill = Kill(kind=kind, at=at, device=device, wait_s=draw.uniform(0.0, 0.6), which=which, errand=errand)
        else:
            own = device if kind in ("supervisor", "worker") else ""
            kill = Kill(kind=kind, at=at, device=own, wait_s=draw.uniform(0.0, 2.5), which=which)
        kills.append(kill)
    return sorted(kills, key=lambda kill: kill.at)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A living process of the fleet."""

    pid: int
    parent: int
    command: str


def members(mark: str) -> list[Member]:
    """Every living process that carries the fleet's mark in its environment."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if fields[0] not in ("Z", "X"):
                found.append(Member(pid=int(folder.name), parent=int(fields[1]), command=command))
    return found


def children(pid: int) -> Iterator[tuple[int, str]]:
    """Living children of a process with their command lines."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{child}/cmdline").read_bytes()
                    if line:
                        yield int(child), line.replace(b"\0", b" ").decode(errors="replace").strip()


def kill_9(pid: int) -> bool:
    """Ends a process by SIGKILL and sees it go. False when it had ended, or ended by itself before it could be stopped."""
    began = start_time(pid)
    if began is None:
        return False
    try:
        os.kill(pid, signal.SIGSTOP)
        if not _soon(lambda: _state(pid) == "T" or start_time(pid) != began) or start_time(pid) != began:
            return False
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    assert _soon(lambda: start_time(pid) != began), f"process {pid} survived SIGKILL"
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _soon(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


@dataclass(kw_only=True)
class Totals:
    """What a run did and counted."""

    rounds: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    answered: int = 0
    counted: int = 0
    cut_off_and_counted: int = 0
    refused: int = 0
    broken: int = 0
    labels: int = 0
    labelled: int = 0
    labels_sent_again: int = 0
    pardons: int = 0
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        span = f"{min(self.seconds):.0f} to {max(self.seconds):.0f} s each, {sum(self.seconds):.0f} s in all"
        cut_off = f"{self.broken} cut off by a kill, of which {self.cut_off_and_counted} had been counted"
        lines = [
            f"rounds: {sum(self.rounds.values())} ({_told(self.rounds)}), {span}",
            f"kills: {sum(self.kills.values())} ({_told(self.kills)})",
            f"hit: {_told(self.hit)}",
            f"requests: {self.attempts} asked, {self.answered} answered, {self.counted} counted",
            f"  {cut_off}; {self.refused} refused while a supervisor was down",
            f"labels: {self.labels} matched, {self.labelled} counted, {self.labels_sent_again} requests sent again",
            f"pardons after a kill on trial: {self.pardons}",
        ]
        return "\n".join(lines)

    def add(self, told: Tally, here: Tally) -> None:
        """One device's part of a round, once it was held against the server's."""
        answered, failed = sum_of(told, "answered"), sum_of(told, "failed")
        self.attempts += answered + failed
        self.answered += answered
        self.counted += sum_of(here, "ok")
        self.cut_off_and_counted += sum_of(here, "ok") - answered
        self.refused += told["failed", _REFUSED]
        self.broken += failed - told["failed", _REFUSED]
        self.labels += told["label", "matched"]
        self.labelled += sum_of(here, "labelled")
        self.labels_sent_again += told["labels sent again",]


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


def tally(counts: Counts) -> Tally:
    """What an application counted, as numbers that can be taken from one another."""
    found: Tally = Counter({("labels sent again",): counts.label_retries})
    found.update({("answered", version): n for version, (n, _) in counts.versions.items()})
    found.update({("failed", name): n for name, n in counts.failed_by.items()})
    found.update({("label", outcome): n for outcome, n in counts.labels.items()})
    found.update({("matched", version): n for version, n in counts.matched.items()})
    return found


def sum_of(counts: Tally, *first: str) -> int:
    """Sum over all keys that begin so."""
    return sum(n for key, n in counts.items() if key[: len(first)] == first)


def hold_against(told: Tally, here: Tally, kills: Counter[str]) -> None:
    """One device, one round: nothing lost, nothing doubled, and no request failed that a kill does not account for.

    Args:
        told: by the application, as ``tally`` gives it; here: what the server counted, by (name, version).
        kills: of the device's parts.
    """
    what = f"the application tells {dict(told)}, the server counted {dict(+here)}, kills {dict(kills)}"
    lost = {
        key[1]: n - here["ok", key[1]] for key, n in told.items() if key[0] == "answered" and here["ok", key[1]] < n
    }
    assert not lost, f"lost answers, by version: {lost}; {what}"
    refused, broken = told["failed", _REFUSED], sum(told["failed", name] for name in _BROKEN)
    assert refused + broken == sum_of(told, "failed"), f"failures of another kind; {what}"
    # A kill takes one request with it, the one in work: the application has one connection. A supervisor takes its worker.
    # With it goes the socket that listened, and with that one a connection that nobody had taken up.
    assert broken <= kills["worker"] + 2 * kills["supervisor"], f"more requests were cut off than kills can; {what}"
    assert refused == 0 or kills["supervisor"], f"refused although the supervisor lived; {what}"
    surplus = sum_of(here, "ok") - sum_of(told, "answered")
    assert surplus <= broken, f"counted twice: {surplus} more than answered, {broken} may; {what}"
    assert not any(sum_of(here, name) for name in ("invalid", "failed", "shed")), f"not answered well; {what}"
    matched = told["label", "matched"]
    assert sum_of(told, "label") == matched, f"a label was not taken for what it was; {what}"
    assert matched == sum_of(here, "labelled"), f"labels lost or doubled; {what}"
    versions = {key[1]: n for key, n in told.items() if key[0] == "matched"}
    counted = {key[1]: n for key, n in here.items() if key[0] == "labelled" and n}
    assert versions == counted, (
        f"labels counted under a version that did not answer: {versions}, counted {counted}; {what}"
    )


class Field:
    """The standing fleet, and what it ran and counted up to the round before."""

    def __init__(self, rig: Rig, *, seed: int, mark: str) -> None:
        self.rig = rig
        self.fleet = rig.fleet
        self.seed = seed
        self.mark = mark
        self.bundles: dict[str, Made] = {}
        self.stable = GOOD[0]
        self.totals = Totals()
        self.counted: Tally = Counter()
        self.told: dict[str, Tally] = {}
        self.took_s: dict[Sort, float] = {"plain": 8.0, "judged": 16.0, "bad": 10.0}
        self.crashes: dict[str, list[float]] = {device: [] for device in rig.devices}

    def start(self) -> None:
        """Server, agents, applications; good and bad versions approved; the first of them on every device."""
        rig, fleet = self.rig, self.fleet
        fleet.truth_after_s = (1.0, 3.0)
        rig.start(world=WORLD)
        settings = {**SETTINGS, "window_s": 1.0, "trial_inferences": 10, "max_kib_s": 100}
        fleet.api.put(f"/api/v1/groups/{GROUP}", {"settings": settings})
        self.bundles[self.stable] = rig.publish(self.stable, (WORLD,), seed=1)
        rig.start_rollout("first", self.bundles[self.stable], [{"share": 1.0, "max_seconds": STAGE_S}])
        for device in rig.devices:
            fleet.start_application(device)
        for number, version in enumerate(GOOD[1:], 2):
            self.bundles[version] = rig.publish(version, (WORLD,), seed=number)
        self.bundles[BAD] = rig.publish(BAD, (ANOTHER_WORLD,))
        rig.wait_for_version(self.stable, SETTLE_S)
        fleet.wait("the first rollout to end", lambda: self.ended("first") == "completed", SETTLE_S)
        self.ports = {device: fleet.status_address(device) for device in rig.devices}
        self.own = json.loads((fleet.server.data / "run.json").read_bytes())
        self.epochs = self.streams()
        self.settle({})

    def ended(self, rollout: str) -> str:
        """State of a rollout; empty while the server does not answer."""
        found = self.asked(lambda: self.fleet.api.get(f"/api/v1/rollouts/{rollout}"))
        return "" if found is None else str(found["state"])

    def asked(self, call: Callable[[], Any]) -> Any:
        """What the server says; None while it is not there. An answer that is an error is none of these: it is a bug."""
        try:
            return call()
        except CliError as error:
            if "cannot be reached" in error.message:
                return None
            raise

    def own_word(self, device: str) -> dict[str, Any]:
        """What an agent says of itself; nothing while it starts."""
        try:
            return self.fleet.status(device)
        except CliError:
            return {"running": {}, "update": None}

    def tell(self, device: str, target: str, **body: Any) -> dict[str, Any]:
        """Asks an agent for something on its control socket, as a person on the device would; nothing comes back while it starts."""
        path = self.fleet.device_folder(device) / "state" / "run" / "control.sock"
        with contextlib.suppress(OSError):
            answer = control.ask(path, "POST", f"/skerry/v1/{target}", body)
            assert answer.status == 200 and isinstance(answer.body, dict), answer
            return answer.body
        return {}

    def streams(self) -> set[tuple[str, str]]:
        """(device, epoch) of every outbox the server knows; a new epoch would be a store that was given up."""
        return {(row["device"], row["epoch"]) for row in server_counts(self.fleet)[1]}

    # --- one round -----------------------------------------------------------------------------------------------------------

    def round(self, number: int) -> str:
        """Runs one round and checks it. Returns a line for the log."""
        sort, kills = drawn_sort(self.seed, number), drawn_kills(self.seed, number)
        candidate = BAD if sort == "bad" else GOOD[(GOOD.index(self.stable) + 1) % len(GOOD)]
        began, before = time.monotonic(), self.totals.answered
        self.fleet.change_world(WORLD)
        one = Round(self, number, sort, candidate, kills)
        try:
            one.run()
            if sort != "bad":
                self.stable = candidate
            self.reached(self.stable)
            self.settle({device: one.kills_on(device) for device in self.rig.devices})
            self.nothing_stale()
        except BaseException:
            print(
                f"round {number} of seed {self.seed} failed: {sort}, candidate {candidate}; {one.story()}", flush=True
            )
            raise
        self.totals.rounds[sort] += 1
        self.totals.kills.update(hit.kind for hit in one.hits)
        self.totals.hit.update(f"{hit.kind} {hit.what}" for hit in one.hits)
        self.totals.pardons += one.pardons
        took_s = time.monotonic() - began
        self.totals.seconds.append(took_s)
        return f"round {number}: {sort} {candidate}, {took_s:.1f} s, {self.totals.answered - before} answers, each counted; {one.story()}"

    def reached(self, version: str) -> None:
        """Everyone runs the version: by what the server heard, by what the agent says, and by what its application is told."""

        def there() -> bool:
            heard = self.asked(self.fleet.listed) or {}
            if set(heard) != set(self.rig.devices):
                return False
            for device in self.rig.devices:
                own = self.own_word(device)["running"].get(MODEL) or {}
                version_heard, state = self.fleet.running(heard[device])
                answers = self.fleet.counts(device).changes
                told = {version_heard, own.get("version"), answers[-1][1] if answers else ""}
                if told != {version} or not (state.startswith("confirmed") and heard[device]["online"]):
                    return False
            return True

        self.fleet.wait(f"every device to end on {version}", there, SETTLE_S)

    def settle(self, kills: dict[str, Counter[str]]) -> None:
        """Lets the applications pause and holds what they counted in this round against the server, device by device."""
        fleet, rig = self.fleet, self.rig
        fleet.change_world(0)

        def rests(told: Counts) -> bool:
            return told.batch == 0 and told.labels_due == 0

        fleet.wait(
            "the applications to send their labels",
            lambda: all(rests(fleet.counts(device)) for device in rig.devices),
            SETTLE_S,
        )
        told = {device: tally(fleet.counts(device)) for device in rig.devices}
        for device in rig.devices:
            assert self.tell(device, "flush"), f"{device} does not answer"
        deadline = time.monotonic() + SETTLE_S
        before: Tally = Counter()
        steady = 0
        while steady < 3 and time.monotonic() < deadline:
            items, streams = server_counts(fleet)
            now: Tally = Counter()
            for row in items:
                for name in ("ok", "invalid", "failed", "shed", "labelled"):
                    now[row["device"], name, row["version"]] += row[name]
            enough = all(
                sum_of(now, device, name) >= sum_of(told[device], mine)
                for device in rig.devices
                for name, mine in (("ok", "answered"), ("labelled", "label"))
            )
            idle = all(fleet.status(device)["outbox"]["pending"] == 0 for device in rig.devices)
            steady = steady + 1 if enough and idle and now == before else 0
            before = now
            time.sleep(0.2)
        for device in rig.devices:
            here = Counter({key[1:]: n - self.counted[key] for key, n in before.items() if key[0] == device})
            mine = told[device] - self.told.get(device, Counter())
            try:
                hold_against(mine, here, kills.get(device, Counter()))
            except AssertionError as error:
                raise AssertionError(f"{device}: {error}") from error
            self.totals.add(mine, here)
        assert all(row["conflicts"] == row["tombstoned"] == 0 for row in streams), streams
        found = {(row["device"], row["epoch"]) for row in streams}
        assert found == self.epochs, f"a device began its outbox anew: {found - self.epochs}"
        self.counted, self.told = before, told

    def nothing_stale(self) -> None:
        """Nobody is left over, and everybody is where they were: addresses, one process of each part."""
        told = json.loads((self.fleet.server.data / "run.json").read_bytes())
        assert (told["url"], told["mqtt"]) == (self.own["url"], self.own["mqtt"]), "the server moved to another port"
        for device in self.rig.devices:
            assert self.fleet.status_address(device) == self.ports[device], f"{device} moved to another port"
            lost = self.fleet.status(device)["outbox"]["lost"]
            assert not any(lost.values()), f"{device} says that it lost something: {lost}"
        # A sync may be under way: its courier is somebody's child and goes.
        deadline = time.monotonic() + 10.0
        while (left := self.strangers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, left

    def strangers(self) -> list[str]:
        """What is there and should not be, or is not there and should be."""
        found = members(self.mark)
        supervisors = {device: self.rig.processes.pid(device) for device in self.rig.devices}
        server = self.rig.processes.pid("server")
        owners = {server, *supervisors.values(), *(self.rig.processes.pid(f"app-{device}") for device in supervisors)}
        wrong = [f"left over: {m}" for m in found if m.pid not in owners and m.parent not in owners]
        wrong += [f"a courier: {m}" for m in found if "skerry_agent.courier" in m.command]
        for device, pid in supervisors.items():
            workers = [m.pid for m in found if m.parent == pid and "skerry_agent.worker" in m.command]
            if len(workers) != 1:
                wrong.append(f"{device} has workers {workers}")
        brokers = [m.pid for m in found if m.parent == server and "nats-server" in m.command]
        if len(brokers) != 1:
            wrong.append(f"the server has brokers {brokers}")
        return wrong


class Round:
    """One rollout and what dies in it."""

    def __init__(self, field_: Field, number: int, sort: Sort, candidate: str, kills: Sequence[Kill]) -> None:
        self.field = field_
        self.rig, self.fleet = field_.rig, field_.fleet
        self.sort, self.candidate = sort, candidate
        self.rollout = f"round-{number}"
        span_s = field_.took_s[sort]
        self.left = [Pending(drawn=kill, at_s=kill.at * span_s, kind=kill.kind, wait_s=kill.wait_s) for kill in kills]
        self.hits: list[Hit] = []
        self.pardons = 0
        self.down: dict[str, float] = {}
        self.asked_s = 0.0
        self.pardoned_s = 0.0
        self.ended_s: float | None = None
        self.decision = ""
        self.may_go_back = {kill.device for kill in kills if kill.kind in ("supervisor", "worker")}

    def story(self) -> str:
        """What was drawn and what happened, for whoever reads the log."""
        happened = "; ".join(map(str, self.hits)) or "none"
        unkilled = f"; not yet: {self.left}" if self.left else ""
        return f"kills: {happened}{unkilled}; {self.decision}"

    def kills_on(self, device: str) -> Counter[str]:
        """How often each part of a device was killed."""
        return Counter(hit.kind for hit in self.hits if hit.device == device)

    def run(self) -> None:
        """From the start of the rollout to its end, with every kill carried out and everybody started again."""
        self._start()
        self.began_s = time.monotonic()
        looked_s = 0.0
        state = ""
        while True:
            now_s = time.monotonic() - self.began_s
            self._restart(now_s)
            self._kill(now_s)
            if now_s - looked_s > 0.4:
                state, looked_s = self._look(now_s), now_s
                if state in ENDS.values() and self.ended_s is None:
                    self.ended_s = now_s
            if state in ENDS.values() and not self.left and not self.down:
                break
            assert state not in ("paused", "aborted"), f"the rollout is {state}"
            dead = [text for text in self.rig.processes.died() if text.split()[0] not in self.down]
            dead = [text for text in dead if not text.startswith(("enrol-", "server-init"))]
            assert not dead, f"ended by itself: {dead}"
            assert now_s < ROUND_S, f"the rollout is {state or 'not to be asked'} after {ROUND_S:g} s"
            time.sleep(0.015)
        assert state == ENDS[self.sort], f"the rollout is {state}"
        assert self.ended_s is not None
        self.field.took_s[self.sort] = self.ended_s
        self._ended_once(state)

    def _start(self) -> None:
        least: list[dict[str, Any]] = [{"share": 1.0, "min_inferences": 40, "max_seconds": STAGE_S}]
        judge = None
        if self.sort != "plain":
            least.insert(0, {"devices": 2, "min_inferences": 20, "min_seconds": 1, "max_seconds": STAGE_S})
            judge = {
                "guardrails": {"labelled_errors": {"alpha": 0.035, "margin": 1.5, "min_n": 30, "limit": 0.2}},
                "look_s": 0.5,
                "guard_s": 0.5,
                "end_labels": 60,
                "small_fleet": True,
            }
        self.rig.start_rollout(
            self.rollout,
            self.field.bundles[self.candidate],
            least,
            stratified=False,
            judge=judge,
            # A worker that is killed on trial sends its device back, as it must; nothing else may.
            gates={"max_error_rate": 0.01, "latency_p95_ms": 5000.0, "max_reverts": len(self.may_go_back)},
        )

    # --- killing -------------------------------------------------------------------------------------------------------------

    def _kill(self, now_s: float) -> None:
        for pending in [pending for pending in self.left if pending.at_s <= now_s]:
            hit = self._strike(pending, now_s)
            if hit is not None:
                self.left.remove(pending)
                self.hits.append(hit)

    def _strike(self, pending: Pending, now_s: float) -> Hit | None:
        """Kills what was drawn; None while it is not there to be killed."""
        kill = pending.drawn
        name = kill.device or "server"
        if name in self.down:
            return None
        if pending.kind == "worker" and not self._may_crash(kill.device):
            pending.kind = "supervisor"
        pid, doing = self.rig.processes.pid(name), self._doing(kill.device)
        match pending.kind:
            case "server" | "supervisor":
                if not kill_9(pid):
                    return None
                assert self.rig.processes.wait(name, 10.0) == -signal.SIGKILL
                self.down[name] = now_s + kill.wait_s
                if kill.device:
                    self.field.crashes[kill.device].clear()
            case "broker":
                found = [child for child, line in children(pid) if "nats-server" in line and "child.py" not in line]
                if not found or not kill_9(found[0]):
                    return None
            case "worker":
                found = sorted(child for child, line in children(pid) if "skerry_agent.worker" in line)
                which = int(kill.which * len(found))
                if not found or not kill_9(found[which]):
                    return None
                self.field.crashes[kill.device].append(time.monotonic())
                doing += f", {'newer' if which else 'older'} of two" if len(found) > 1 else ""
            case "courier":
                verb = self._hunt(pending, pid, now_s)
                if not verb:
                    return None
                doing = f"at {verb}"
        return Hit(kind=pending.kind, device=kill.device, at_s=now_s, what=doing)

    def _may_crash(self, device: str) -> bool:
        since = time.monotonic() - lifecycle.CRASHES_WITHIN_S
        return sum(at > since for at in self.field.crashes[device]) < FEW_CRASHES

    def _doing(self, device: str) -> str:
        """What the device's update is doing, for the log."""
        if not device:
            return "at work"
        said = self.field.own_word(device)
        return f"in {(said['update'] or {}).get('state', 'no update')}" if said["running"] else "starting"

    def _hunt(self, pending: Pending, supervisor: int, now_s: float) -> str:
        """Waits for a courier of the device to appear, then for the time that was drawn. Returns the verb of the one it killed."""
        errand = pending.drawn.errand if self.ended_s is None else ""
        found = {
            child: line
            for child, line in children(supervisor)
            if "skerry_agent.courier" in line and line.endswith(errand)
        }
        if pending.prey and now_s < pending.due_s:
            return ""
        if pending.prey:
            if pending.prey in found and kill_9(pending.prey):
                return found[pending.prey].rpartition(" ")[2]
            pending.prey, pending.wait_s = 0, pending.wait_s / 2
        if found:
            pending.prey = next(iter(found))
            pending.due_s = now_s + pending.wait_s
        elif now_s - max(self.asked_s, pending.at_s) > 1.5:
            # None in sight: somebody asks the device to look at the repository now.
            self.asked_s = now_s
            self.field.tell(pending.drawn.device, "sync")
        return ""

    def _restart(self, now_s: float) -> None:
        """As an init system would: the process alone, at its old place. What it left running it finds."""
        for name in [name for name, due_s in self.down.items() if due_s <= now_s]:
            if name == "server":
                self.rig.start_server_again()
            else:
                self.fleet.start_agent(name)
            del self.down[name]

    # --- looking -------------------------------------------------------------------------------------------------------------

    def _look(self, now_s: float) -> str:
        """The rollout's state, empty while there is no server. Devices that went back because of a kill are pardoned."""
        found = None
        if "server" not in self.down:
            found = self.field.asked(lambda: self.fleet.api.get(f"/api/v1/rollouts/{self.rollout}"))
        if found is None:
            return ""
        self.decision = f"{found['state']}, stage {found['stage']}: {found['reason']}; now {found['now']['reason']}"
        if now_s - self.pardoned_s > 1.0:
            self.pardoned_s = now_s
            for device in self.rig.devices:
                self._pardon(device)
        return str(found["state"])

    def _pardon(self, device: str) -> None:
        """Only of a device whose worker or supervisor was killed: what sends another back must hold the rollout."""
        kills = self.kills_on(device)
        if device in self.down or not kills["worker"] + kills["supervisor"]:
            return
        update = self.field.own_word(device)["update"] or {}
        if update.get("state") == "idle" and "crashed" in update.get("code", ""):
            self.pardons += int(self.field.tell(device, "sync", pardon=True).get("pardoned", 0))

    def _ended_once(self, state: str) -> None:
        """The decisions are those of one rollout that ended once, and the judge's rulings come out the same from what is stored."""
        path = f"/api/v1/rollouts/{self.rollout}"
        decisions = list(self.fleet.api.items(f"{path}/decisions"))
        actions = [d["action"] for d in decisions if d["action"] != "hold"]
        wanted = {
            "plain": ["start", "complete", "finish"],
            "judged": ["start", "advance", "complete", "finish"],
            "bad": ["start", "roll_back", "rolled_back"],
        }[self.sort]
        assert actions == wanted, actions
        reverted = decisions[-1]["evidence"]["reverted"]
        assert set(reverted) <= {"trial_crashed", "runtime_crashed"}, f"devices went back: {reverted}"
        assert sum(reverted.values()) <= len(self.may_go_back), f"devices went back: {reverted}"
        if self.sort != "plain":
            explained = self.fleet.api.get(f"{path}/explain", stage=0)
            assert explained["identical"] and explained["looks"], explained
            assert explained["ruling"]["verdict"] == ("FAIL" if self.sort == "bad" else "PASS"), explained["ruling"]
        for device in self.rig.devices:
            # The next round's versions come round again: failures that were kills must not add up.
            assert _soon(lambda device=device: bool(self.field.tell(device, "sync", pardon=True)), 20.0), device
