"""What a device holds against a bundle: with the state that says so, and no longer than a person wants."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from skerry_agent import config
from skerry_agent.clock import Clock
from skerry_agent.core import effects as e
from skerry_agent.core import lifecycle as lc
from skerry_agent.core import why
from skerry_agent.errand import Errands
from skerry_agent.errors import Degraded, Rejected
from skerry_agent.holding import Holding
from skerry_agent.leftovers import Roll
from skerry_agent.network import Networks
from skerry_agent.obeying import Obeying
from skerry_agent.restoring import Restoring
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Serving
from skerry_agent.slots import Slots
from skerry_agent.store import open_store
from skerry_agent.updating import TrialRules, Updating
from skerry_contract import ids
from skerry_contract.window import Instant

DEVICE = ids.device_id("d-1")
DIGEST = "a" * 64
PATH = (e.ManifestFetched(), e.Admitted(variant="v"), e.FilesFetched(), e.Verified(), e.Staged(), e.Proved())


class Life:
    """The updates of one agent with a real store; no courier and no worker. ``begin`` is a start after a power cut."""

    def __init__(self, folder: Path, *, backoff_scale: float = 1.0) -> None:
        choices = {"state_dir": str(folder), "timing": {"backoff_scale": backoff_scale}}
        self.config = config.build(choices, {})
        (folder / "run").mkdir()
        self.clock, self.slots = Clock(), Slots(folder / "slots")
        self.store, _ = open_store(
            folder / "state.db", binding="m", device=DEVICE, new_epoch=lambda: "e" * 32, wall_s=0.0, bound_bytes=100_000
        )
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.changes: list[tuple[str, dict[str, Any]]] = []
        # What a worker would listen at, where one is to start.
        self.listeners: list[socket.socket] = []
        self.begin()

    def begin(self) -> None:
        roll = Roll(self.config.run_dir / "workers.json", self.clock.boot_id)
        self.rests: list[lc.State] = []
        self.serving = serving = Serving(
            self.config, self.store, self.slots, self.clock, self.listeners, roll, on_health=lambda _: None, on_crash=lambda *_: False,
            on_unruly=lambda *_: False, on_start=lambda *_: None, on_records=lambda: None, on_fault=lambda _: None, draw=lambda: 0.5,
        )  # fmt: skip
        self.holding = Holding(
            self.config, self.store, self.slots, self.clock, windows=lambda: (), opens_at=lambda _model, _digest: 0
        )
        self.updating = Updating(
            self.config, self.store, self.slots, serving, Errands(("sleep", "60")), self.clock,
            Runtimes(self.config, self.clock, lambda: 0.5), Restoring(self.slots, serving, on_damage=lambda *_: None),
            self.holding,
            Networks(self.config, self.clock, wanted=lambda: (), carried=lambda _digest: False), errand_input=dict,
            on_change=lambda code, data: self.changes.append((code, data)), on_progress=lambda: None, on_rest=lambda: self.rests.append(self.updating.update.state),
            on_fault=lambda _: None, draw=lambda: 0.5,
        )  # fmt: skip
        self.obeying = Obeying(self.store, self.updating, on_event=lambda *told: self.events.append(told))

    def cut(self) -> None:
        """Power fails: what was to be done after the stored state is not done."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        self.begin()

    def until(self, state: lc.State, **more: Any) -> None:
        """An update in the state, as it is stored; its effects are never carried out."""
        update, _ = lc.step(
            lc.Update(), e.Assigned(model="gas", digest=DIGEST, version="2.0.0", **more), self.clock.instant()
        )
        for event in PATH:
            if state == "ready" and isinstance(event, e.Staged):
                event = e.Held(detail="a lock")
            if update.state != state:
                update, _ = lc.step(update, event, self.clock.instant())
        assert update.state == state
        self.store.put("update", update)
        self.updating.update = update

    @property
    def refused(self) -> bool:
        """Whether only a person's word lets the bundle try again."""
        return self.updating.why().spent

    def left_s(self) -> float:
        """Until the state's deadline."""
        left_s = self.updating.why().left_s
        assert left_s is not None
        return max(0.0, round(left_s))

    async def rest(self) -> None:
        async with asyncio.timeout(30):
            while not self.updating.update.resting:
                await asyncio.sleep(0.005)


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path)
    yield one
    one.store.close()


@pytest.mark.parametrize(
    "event", [e.Cancelled(detail="a person"), e.Failed(code="golden_failed")], ids=["cancelled", "failed"]
)
def test_power_that_fails_right_behind_the_stored_state_forgets_no_attempt(life: Life, event: e.Event) -> None:
    async def main() -> None:
        life.until("prove")
        life.updating.feed(event)
        assert life.updating.update.state == "revert"
        life.cut()
        assert life.updating.update.state == "revert"
        life.updating.booted()
        assert life.refused

    asyncio.run(main())


def test_of_two_orders_heard_together_the_later_one_stands(life: Life) -> None:
    async def main() -> None:
        life.until("fetch", moves=20)
        assert life.obeying.told({"cancel": 1, "retry": 2})
        assert [code for _, code, _ in life.events] == ["", ""]
        await life.rest()
        assert not life.refused
        assert life.updating.failures.moves_of(DIGEST) < 10
        assert life.obeying.told({"retry": 3, "cancel": 4})
        assert life.events[-1][1] == "nothing_to_cancel"

    asyncio.run(main())


def test_a_pardon_at_rest_stands_over_a_start_and_is_counted_once(life: Life) -> None:
    async def main() -> None:
        life.until("prove", moves=20)
        life.updating.feed(e.Failed(code="golden_failed"))
        await life.rest()
        assert life.updating.pardon() == 1
        life.cut()
        life.updating.booted()
        await asyncio.sleep(0.02)
        assert life.updating.failures.moves_of(DIGEST) == 0
        assert life.updating.pardon() == 0

    asyncio.run(main())


def test_a_number_that_a_restored_server_says_again_is_not_obeyed_again(life: Life) -> None:
    async def main() -> None:
        # An earlier agent kept the last number of each kind alone.
        life.store.put("obeyed", {"retry": 6})
        assert not life.obeying.told({"retry": 6})
        for number in (10, 7, 10, 7, 6):
            life.obeying.told({"retry": number})
        assert [data["number"] for _, _, data in life.events] == [10, 7]
        life.begin()
        assert not life.obeying.told({"retry": 7})
        # A server whose clock was set back gives a lower number: a new order all the same.
        assert life.obeying.told({"retry": 8})

    asyncio.run(main())


def test_a_model_that_waits_is_told_and_can_be_cancelled_whatever_others_did_since(life: Life) -> None:
    async def main() -> None:
        life.until("fetch")
        life.updating.feed(e.Failed(code="unreachable"))
        await life.rest()
        other = "b" * 64
        assigned = e.Assigned(model="pump", digest=other, version="7.0.0")
        for event in (assigned, *PATH, e.HandedOver(), e.TrialKept()):
            update, _ = lc.step(life.updating.update, event, life.clock.instant())
            life.updating.update = update
        life.store.put("update", update)
        life.begin()
        told = {one.about: one for one in why.explain(life.updating.why())}
        assert "unreachable" in told["update to gas 2.0.0"].says
        with pytest.raises(Rejected, match="pump"):
            life.updating.cancel("a person", "pump")
        assert [one.model for one in life.updating.cancel("a person")] == ["gas"]
        assert DIGEST in life.updating.failures.spent()
        told = {one.about: one for one in why.explain(life.updating.why())}
        assert told["update to gas 2.0.0"].waits_for == "another bundle, or a person's word"
        assert "cancelled by a person" in told["update to gas 2.0.0"].says
        assert [(code, data["model"], data["state"]) for code, data in life.changes[-1:]] == [
            ("cancelled", "gas", "idle")
        ]
        with pytest.raises(Rejected, match="none waits"):
            life.updating.cancel("a person")
        # Once it is confirmed, nothing of that is told any more.
        life.until("trial")
        life.updating.feed(e.TrialKept())
        assert not [one for one in why.explain(life.updating.why()) if "gas" in one.about]

    asyncio.run(main())


def test_that_what_waited_was_cancelled_is_said_once_and_stands_over_a_start(life: Life) -> None:
    async def main() -> None:
        life.until("fetch")
        life.updating.feed(e.Failed(code="unreachable"))
        await life.rest()
        await asyncio.sleep(0.02)
        (ended,) = life.updating.cancel("an operator")
        assert (ended.state, ended.code, ended.failed_in) == ("idle", "cancelled", "fetch")
        life.cut()
        assert life.updating.update == ended
        life.updating.booted()
        await asyncio.sleep(0.02)
        told = [(code, data["digest"], data["detail"]) for code, data in life.changes if code == "cancelled"]
        assert told == [("cancelled", DIGEST, "cancelled by an operator")]
        assert life.refused

    asyncio.run(main())


def test_what_made_way_and_waits_for_its_turn_can_be_cancelled(life: Life) -> None:
    async def main() -> None:
        life.until("ready")
        life.updating.make_way("for pump 7.0.0")
        await life.rest()
        assert life.updating.update.code == "yielded"
        (ended,) = life.updating.cancel("a person", "gas")
        assert (ended.digest, ended.code, life.refused) == (DIGEST, "cancelled", True)

    asyncio.run(main())


def test_a_pardon_in_the_middle_of_an_attempt_stands(life: Life) -> None:
    async def main() -> None:
        life.until("prove", moves=lc.MOST_MOVES - 8)
        life.updating.pardon()
        life.cut()
        life.updating.feed(e.Failed(code="start_timeout"))
        await life.rest()
        assert 0 < life.updating.failures.moves_of(DIGEST) < 4
        assert not life.refused

    asyncio.run(main())


def test_an_order_that_could_not_be_stored_is_not_called_obeyed_and_is_heard_again(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        life.until("fetch")
        put: Callable[..., None] = life.store.put

        def full(key: str, value: object) -> None:
            if key == "update":
                raise Degraded("store_full", "no room")
            put(key, value)

        monkeypatch.setattr(life.store, "put", full)
        with pytest.raises(Degraded, match="no room"):
            life.updating.cancel("a person")
        assert not life.obeying.told({"cancel": 5})
        assert life.events == []
        # What was refused is not done behind anybody's back once there is room again.
        monkeypatch.undo()
        life.updating.tick()
        assert life.updating.update.state == "fetch"
        assert life.obeying.told({"cancel": 5})
        assert (life.updating.update.code, life.events[-1][1]) == ("cancelled", "")

    asyncio.run(main())


@pytest.mark.parametrize("state", ["prove", "trial"])
def test_a_stop_in_order_is_told_as_such_before_the_agent_is_gone_and_bars_no_bundle(
    life: Life, state: lc.State
) -> None:
    async def main() -> None:
        waits: list[float] = []
        for _ in range(10):
            life.until(state)
            await life.updating.stop(in_order=True)
            assert life.changes[-1][0] == "interrupted"
            assert "at_boot" not in life.changes[-1][1]
            life.begin()
            life.updating.booted()
            await asyncio.sleep(0.02)
            assert (life.updating.update.code, life.updating.update.failed_in) == ("interrupted", state)
            waits.append(life.updating.failures.wait_s(DIGEST))
        assert not life.refused
        if state == "prove":
            # Nothing of it has answered yet.
            assert set(waits) == {0}
            return
        # Who stops the agent may do so for what the bundle answers: it comes up again, and not in circles.
        assert 0 < waits[0] <= 5
        assert waits[-1] > 400
        for _ in range(2):
            life.until(state)
            await life.updating.stop(in_order=True)
        assert life.refused

    asyncio.run(main())


@pytest.mark.parametrize("state", ["prove", "trial"])
def test_an_end_without_order_says_that_the_agent_went_with_it(life: Life, state: lc.State) -> None:
    async def main() -> None:
        life.until(state)
        # That a link broke before is none of it.
        life.updating.failures.penalise(lc.Update(digest=DIGEST, code="unreachable", failed_in="fetch"))
        await life.updating.stop()
        life.begin()
        life.updating.booted()
        await asyncio.sleep(0.05)
        code, data = life.changes[-1]
        assert code == ("trial_crashed" if state == "trial" else "runtime_crashed")
        assert (data["at_boot"], data["ended_so"]) == (True, 1)

    asyncio.run(main())


def test_the_month_of_what_lies_ready_does_not_begin_anew_with_every_boot(life: Life) -> None:
    async def main() -> None:
        here = life.clock.instant()
        # Nine days of this boot, of which nobody trusts the wall clock.
        since = Instant(here.boot_id, here.boot_ns - 9 * 86_400 * 10**9, here.wall_ms, False)
        life.until("ready")
        life.updating.update = msgspec.structs.replace(life.updating.update, since=since)
        life.store.put("update", life.updating.update)
        life.updating.booted()
        for boot in "abcd":
            left_s = life.left_s()
            await life.updating.stop()
            life.clock.boot_id = boot * 32
            life.begin()
            life.updating.booted()
            # Each of them lasts as long as this machine is up.
            assert life.left_s() < left_s - 0.9 * life.clock.boot_s()
        assert life.left_s() < 22 * 86_400

    asyncio.run(main())


def test_an_update_that_has_lain_ready_for_a_month_ends_at_the_next_start(life: Life) -> None:
    async def main() -> None:
        here = life.clock.instant()
        life.until("ready")
        since = Instant(here.boot_id, here.boot_ns - 32 * 86_400 * 10**9, here.wall_ms, False)
        life.updating.update = msgspec.structs.replace(life.updating.update, since=since)
        life.updating.booted()
        await life.rest()
        assert life.updating.update.code == "activation_overdue"

    asyncio.run(main())


def test_longer_trials_hold_for_the_one_that_runs(life: Life) -> None:
    async def main() -> None:
        life.until("trial")
        life.updating.apply(TrialRules(duration_s=30.0))
        before_s = life.left_s()
        life.updating.apply(TrialRules(duration_s=600.0))
        assert life.left_s() - before_s == pytest.approx(570, abs=1)
        # What has passed of it has passed.
        here = life.clock.instant()
        since = Instant(here.boot_id, here.boot_ns - 500 * 10**9, here.wall_ms, False)
        life.updating.update = msgspec.structs.replace(life.updating.update, since=since)
        life.updating.apply(TrialRules(duration_s=60.0))
        assert life.left_s() == lc.TRIAL_OVER_S

    asyncio.run(main())


@pytest.mark.parametrize("code", ["process_not_started", "not_enough_memory", "mirror_wrong"])
def test_pressure_of_a_moment_makes_a_bundle_wait_longer_and_never_gives_it_up(life: Life, code: str) -> None:
    async def main() -> None:
        waits = []
        for _ in range(20):
            life.until("prove", moves=life.updating.failures.moves_of(DIGEST))
            life.updating.feed(e.Failed(code=code))
            await life.rest()
            waits.append(life.updating.failures.wait_s(DIGEST))
        assert not life.refused
        assert waits[0] < 5
        # Half of what it may be at most: six hours where each try may cost a file.
        most_s = 21_600 if code == "mirror_wrong" else 900
        assert waits[-1] == pytest.approx(most_s / 2, abs=5)

    asyncio.run(main())


def test_a_device_that_is_on_for_a_short_while_at_a_time_tries_again_too(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.until("fetch")
    for _ in range(15):
        life.updating.failures.penalise(msgspec.structs.replace(life.updating.update, code="mirror_wrong"))
    assert life.updating.failures.wait_s(DIGEST) > 10_000
    # Another boot: the wait begins anew, and is over after five minutes of it.
    life.clock.boot_id = "c" * 32
    monkeypatch.setattr(life.clock, "boot_s", lambda: 100.0)
    assert life.updating.failures.wait_s(DIGEST) == 200.0
    monkeypatch.setattr(life.clock, "boot_s", lambda: 301.0)
    assert life.updating.failures.wait_s(DIGEST) == 0.0


def test_what_failed_while_it_was_fetched_is_not_forgiven_for_want_of_a_slot(life: Life) -> None:
    """Else it is taken up at once, over and over, without a wait."""

    async def main() -> None:
        for tries in (1, 2):
            life.until("fetch")
            life.updating.feed(e.Failed(code="hash_mismatch"))
            await life.rest()
            assert life.updating.failures.of(DIGEST) == {"hash_mismatch": tries}
            assert life.updating.failures.wait_s(DIGEST) > 0

    asyncio.run(main())


def test_a_fetch_that_gets_further_outlasts_its_deadline(life: Life) -> None:
    async def main() -> None:
        life.until("fetch")
        downloads = life.updating.fetching.downloads
        downloads._further_s = life.clock.boot_s()
        life.updating._overdue()
        assert life.updating.update.state == "fetch"
        assert life.left_s() == pytest.approx(3600, abs=5)
        downloads._further_s -= 3601
        life.updating._overdue()
        await life.rest()
        assert life.updating.update.code == "timeout"

    asyncio.run(main())


@pytest.mark.parametrize("ended", [e.Yielded(detail="for press 1.0.0"), e.Failed(code="start_timeout")])
def test_what_a_person_cancels_on_its_way_home_is_not_tried_again(life: Life, ended: e.Event) -> None:
    async def main() -> None:
        life.until("prove")
        life.updating.feed(ended)
        assert life.updating.update.state == "revert"
        life.updating.cancel("a person")
        await life.rest()
        assert life.refused

    asyncio.run(main())
