"""One round of kills: a rollout, and what dies in it."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skerry_agent.core import lifecycle
from skerry_cli.demo.models import MODEL
from skerry_cli.explaining import explain_stage

from tests.system.kill_draws import ENDS, Kill, Kind, Sort
from tests.system.kill_processes import children, kill_9, soon
from tests.system.kill_tally import Filing

if TYPE_CHECKING:
    from tests.system.killing import Field

STAGE_S, ROUND_S = 240.0, 300.0
SEE_EVERY_S = 0.1
FEW_CRASHES = lifecycle.CRASHES - 1
"""Kills of one device's worker within ``lifecycle.CRASHES_WITHIN_S``: one more, and it goes back by itself, which is its right."""


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
        self.seen: dict[str, int] = dict.fromkeys(field_.rig.devices, 0)
        self.seen_s = 0.0
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
            self._see(now_s)
            if now_s - looked_s > 0.4:
                state, looked_s = self._look(now_s), now_s
                if state in ENDS.values() and self.ended_s is None:
                    self.ended_s = now_s
            if state in ENDS.values() and not self.left and not self.down and self._look(now_s) == state:
                # Looked at anew: a server that was started again a moment ago may not answer yet.
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

    def _see(self, now_s: float) -> None:
        """How many answers of the candidate the applications tell of, while the agents say after that that they file it as candidate."""
        if now_s - self.seen_s < SEE_EVERY_S:
            return
        self.seen_s = now_s
        for device in self.rig.devices:
            answered = self.fleet.counts(device).versions.get(self.candidate, [0])[0]
            key = self.field.own_word(device).get("keys", {}).get(MODEL) if device not in self.down else None
            if key is not None and (key["arm"], key["rollout"]) == ("candidate", self.rollout):
                before = self.field.told[device]["answered", self.candidate]
                self.seen[device] = max(self.seen[device], answered - before)

    def filing(self, device: str) -> Filing:
        """What must be true of the keys under which the device's counts stand."""
        completed = ENDS[self.sort] == "completed"
        return Filing(candidate=self.candidate, rollout=self.rollout, completed=completed, seen=self.seen[device])

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
            explained = explain_stage(self.fleet.api, self.rollout, 0)
            assert explained["identical"] and explained["looks"], explained
            assert explained["ruling"]["verdict"] == ("FAIL" if self.sort == "bad" else "PASS"), explained["ruling"]
        for device in self.rig.devices:
            # The next round's versions come round again: failures that were kills must not add up.
            assert soon(lambda device=device: bool(self.field.tell(device, "sync", pardon=True)), 20.0), device
