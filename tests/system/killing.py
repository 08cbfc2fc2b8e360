"""kill -9 over the whole story: rounds of a rollout each on one standing fleet, with kills at moments drawn from a seed.

``kill_draws`` says what is to die and when. What cannot be drawn is where the system stands at that moment; so the log says what
was hit. ``kill_tally`` holds the counts against each other.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from skerry_agent import control
from skerry_cli.demo.application import Counts
from skerry_cli.demo.fleet import GROUP, SETTINGS
from skerry_cli.demo.models import MODEL, Made
from skerry_cli.demo.reckoning import server_counts
from skerry_cli.errors import CliError

from tests.system.conftest import Rig
from tests.system.kill_draws import ANOTHER_WORLD, BAD, GOOD, WORLD, Sort, drawn_kills, drawn_sort
from tests.system.kill_processes import members
from tests.system.kill_round import STAGE_S, Round
from tests.system.kill_tally import Filing, Tally, Totals, hold_against, hold_filing, sum_of, tally

SETTLE_S = 120.0


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
        fleet.truth_after_s, fleet.write_every_s = (1.0, 3.0), 0.1
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
            self.settle(
                {device: one.kills_on(device) for device in self.rig.devices},
                {device: one.filing(device) for device in self.rig.devices},
            )
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

    def settle(self, kills: dict[str, Counter[str]], filings: dict[str, Filing] | None = None) -> None:
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
                key = (row["version"], row["arm"], row["rollout"], str(row["stage"]))
                now["filed", row["device"], *key] += sum(row[name] for name in ("ok", "labelled"))
                now["answers", row["device"], *key] += row["ok"]
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
            filed = Counter(
                {(key[0], *key[2:]): n - self.counted[key] for key, n in before.items() if key[1] == device}
            )
            try:
                hold_against(mine, here, kills.get(device, Counter()))
                if filings is not None:
                    hold_filing(filed, filings[device])
            except AssertionError as error:
                raise AssertionError(f"{device}: {error}") from error
            self.totals.add(mine, here)
        assert all(row["conflicts"] == row["tombstoned"] == 0 for row in streams), streams
        found = {(row["device"], row["epoch"]) for row in streams}
        assert found == self.epochs, f"a device began its outbox anew: {found - self.epochs}"
        self.counted, self.told = before, told
        for item in fleet.api.items("/api/v1/accuracy", model=MODEL):
            fates = item["labels"]
            lost = {name: fates[name] for name in ("late", "unknown", "conflicting") if fates[name]}
            assert not lost, f"labels that the server heard were taken for {lost}: {item}"

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
