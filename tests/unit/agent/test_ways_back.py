"""A way back is gone, and a confirmation is written, whatever the disk says and whoever else wants something meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from skerry_agent.core import effects as e
from skerry_agent.core import lifecycle as lc
from skerry_agent.core import liveness, why
from skerry_agent.errors import Degraded, Rejected
from skerry_agent.forcing import Forcing
from skerry_agent.remembered import Remembered
from skerry_agent.slots import Slot, Slots, read_pointers
from skerry_contract import manifest as m

from tests import models
from tests.unit.agent.test_attempts import Life


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path, backoff_scale=0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one.listeners.append(listener)
        yield one
    one.store.close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for version in ("1.0.0", "2.0.0"):
        models.build_bundle(folder / version, version=version)
    return {version: folder / version for version in ("1.0.0", "2.0.0")}


def put(slots: Slots, bundle: Path) -> Slot:
    """The bundle's slot, of links to its files."""
    manifest = (bundle / "manifest.json").read_bytes()
    digest, found = m.digest(manifest), m.parse(manifest)
    if not slots.path(digest).exists():
        slots.path(digest).mkdir()
        for file in bundle.iterdir():
            (slots.path(digest) / file.name).hardlink_to(file)
    return Slot(digest=digest, version=found.version, variant=found.variants[0].id, standing="confirmed")


def on_trial(life: Life, bundles: dict[str, Path]) -> Slot:
    """1.0.0 is confirmed, 2.0.0 on trial, as it is stored; its effects are never carried out."""
    life.slots.confirm("gas", put(life.slots, bundles["1.0.0"]))
    new = put(life.slots, bundles["2.0.0"])
    life.slots.activate("gas", msgspec.structs.replace(new, standing="trial"))
    update = lc.Update(
        state="trial", model="gas", digest=new.digest, version=new.version, variant=new.variant, attempt=1,
        since=life.clock.instant(),
    )  # fmt: skip
    life.store.put("update", update)
    life.updating.update = update
    return new


@contextlib.contextmanager
def no_pointer_file(slots: Slots) -> Iterator[None]:
    """The disk takes no new pointer file."""
    there = slots.root / "pointers.json.new"
    there.symlink_to(slots.root / "nowhere" / "pointers")
    yield
    there.unlink()


async def settled(life: Life) -> None:
    async with asyncio.timeout(30):
        while not life.updating.at_rest or life.slots.unwritten:
            life.updating.tick()
            await asyncio.sleep(0.02)


def active_on_disk(slots: Slots) -> str:
    active = read_pointers(slots.root)["gas"].active
    assert active is not None
    return active.version


def test_a_trial_goes_back_on_a_disk_that_takes_no_pointer_file(life: Life, bundles: dict[str, Path]) -> None:
    async def main() -> None:
        on_trial(life, bundles)
        with no_pointer_file(life.slots):
            life.updating.feed(e.Failed(code="trial_errors", detail="failed requests: 90 of 100"))
            await life.rest()
            assert (life.updating.update.state, life.updating.update.code) == ("idle", "trial_errors")
            assert life.serving.models()["gas"].version == "1.0.0"
            assert life.serving.answering("gas")
            assert active_on_disk(life.slots) == "2.0.0"
            # A start that the disk meets so comes up all the same.
            found, complaints = Slots(life.slots.root).boot()
            assert (found["gas"].version, complaints) == ("1.0.0", [])
            told = [said for said, _ in life.changes]
            assert "not_enough_disk" not in told
        life.rests.clear()
        await settled(life)
        assert active_on_disk(life.slots) == "1.0.0"
        # What waited for it is looked at.
        assert life.rests == ["idle"]
        await life.serving.stop()

    asyncio.run(main())


def test_a_worker_that_dies_while_its_trial_goes_back_holds_the_way_back_up_no_more(
    life: Life, bundles: dict[str, Path]
) -> None:
    async def main() -> None:
        new = on_trial(life, bundles)
        life.serving.site.on_crash = lambda generation, _code: not life.updating.crashed(generation, "killed")
        trying = msgspec.structs.replace(new, standing="trial")
        await life.serving.switch(await life.serving.start({"gas": trying}, timeout_s=60))
        generation = life.serving.generation_of("gas")
        assert generation is not None
        life.updating.feed(e.Failed(code="trial_errors", detail="failed requests: 90 of 100"))
        spins = liveness.Unruly(code="worker_spun", detail="90 % of a core for 60 s")
        assert life.updating.unruly(generation, spins), "no other of it is started: what ran before takes its place"
        generation.worker.kill()
        async with asyncio.timeout(30):
            while not generation.gone:
                await asyncio.sleep(0.005)
        assert life.updating.update.state == "revert"
        await life.rest()
        assert life.updating.update.code == "trial_errors"
        assert (life.serving.models()["gas"].version, life.serving.answering("gas")) == ("1.0.0", True)
        await life.serving.stop()

    asyncio.run(main())


def test_a_confirmation_stands_on_such_a_disk_and_holds_no_way_back_up(life: Life, bundles: dict[str, Path]) -> None:
    async def main() -> None:
        new = on_trial(life, bundles)
        with no_pointer_file(life.slots):
            life.updating.feed(e.TrialKept(detail="100 requests, 0 failed"))
            async with asyncio.timeout(30):
                while not life.rests:
                    await asyncio.sleep(0.01)
            assert [data["state"] for _, data in life.changes if data] == ["confirmed"]
            assert life.slots.unwritten
            assert any(one.about == "disk" and one.do for one in why.explain(life.updating.why()))
            # A start finds the word in the store, and begins with that bundle.
            life.slots = Slots(life.slots.root)
            life.cut()
            life.updating.turnover.finish()
            found, _ = life.slots.boot()
            assert found["gas"].digest == new.digest
            life.updating.booted()
            life.updating.tick()
            assert life.updating.order_revert("gas").version == "1.0.0"
            await life.rest()
            assert life.serving.models()["gas"].version == "1.0.0"
        await settled(life)
        assert active_on_disk(life.slots) == "1.0.0"
        assert all(one.about != "disk" for one in why.explain(life.updating.why()))
        await life.serving.stop()

    asyncio.run(main())


def test_a_step_back_on_such_a_disk_stands_and_is_known_after_a_cut(life: Life, bundles: dict[str, Path]) -> None:
    async def main() -> None:
        life.slots.confirm("gas", put(life.slots, bundles["1.0.0"]))
        new = put(life.slots, bundles["2.0.0"])
        life.slots.confirm("gas", new)
        with no_pointer_file(life.slots):
            assert life.updating.order_revert("gas").version == "1.0.0"
            await life.rest()
            assert life.updating.update.code == "reverted_by_operator"
            assert life.serving.models()["gas"].version == "1.0.0"
            confirmed = life.slots.pointers("gas").confirmed
            assert confirmed is not None
            assert confirmed.version == "1.0.0"
            # What a start would begin with stays, whoever makes room.
            assert life.slots.collect(()) == ()
            assert life.slots.whole(new.digest, new.variant)
            await life.serving.stop()
        life.slots = Slots(life.slots.root)
        life.cut()
        life.updating.booted()
        owed = life.updating.turnover.ordered_back()
        assert owed is not None
        assert owed[1].version == "1.0.0"

    asyncio.run(main())


@pytest.mark.attack("rollback of a model")
def test_a_person_goes_back_to_nothing_below_a_floor_that_the_device_has_seen(
    life: Life, bundles: dict[str, Path]
) -> None:
    async def main() -> None:
        life.slots.confirm("gas", put(life.slots, bundles["1.0.0"]))
        life.slots.confirm("gas", put(life.slots, bundles["2.0.0"]))
        life.store.put("floors", {"gas": "2.0.0"})
        with pytest.raises(
            Rejected, match=r"below_floor: gas 1\.0\.0, which ran before, is below the signed floor 2\.0\.0"
        ):
            life.updating.order_revert("gas")
        life.store.put("floors", {"gas": "1.0.0"})
        assert life.updating.order_revert("gas").version == "1.0.0"
        await life.rest()
        await life.serving.stop()

    asyncio.run(main())


def test_a_way_back_that_a_person_cancelled_is_gone_by_no_start(life: Life, bundles: dict[str, Path]) -> None:
    async def main() -> None:
        life.slots.confirm("gas", put(life.slots, bundles["1.0.0"]))
        new = put(life.slots, bundles["2.0.0"])
        life.slots.confirm("gas", new)
        await life.serving.switch(await life.serving.start({"gas": new}, timeout_s=60))
        life.updating.order_revert("gas")
        life.updating.cancel("a person")
        assert life.updating.failures.of(new.digest) == {}, "it goes on, whatever becomes of power now"
        await settled(life)
        assert life.serving.models()["gas"].version == "2.0.0"
        (told,) = [data["detail"] for code, data in life.changes if code == "reverted_by_operator"]
        assert told == "the way back was given up (cancelled by a person): 2.0.0 goes on"
        await life.serving.stop()
        life.cut()
        life.updating.booted()
        assert life.updating.turnover.ordered_back() is None

    asyncio.run(main())


def test_a_start_gives_a_way_back_up_that_does_not_come_up_and_brings_up_what_is_confirmed(
    life: Life, bundles: dict[str, Path]
) -> None:
    async def main() -> None:
        life.slots.confirm("gas", put(life.slots, bundles["1.0.0"]))
        new = put(life.slots, bundles["2.0.0"])
        life.slots.confirm("gas", new)
        life.updating.order_revert("gas")
        life.cut()
        found, _ = life.slots.boot()
        life.updating.booted()
        assert life.updating.turnover.ordered_back() is not None
        # Within that no worker starts.
        error = await life.updating.come_up(found, timeout_s=0.01)
        assert error is not None
        assert error.code == "start_timeout"
        async with asyncio.timeout(30):
            while not life.serving.answering("gas"):
                await asyncio.sleep(0.01)
        assert life.serving.models()["gas"].version == "2.0.0"
        assert (life.updating.update.code, life.updating.failures.of(new.digest)) == ("reverted_by_operator", {})
        assert "2.0.0 goes on" in life.changes[-1][1]["detail"]
        await life.serving.stop()
        life.cut()
        assert life.updating.turnover.ordered_back() is None, "nor does any later start"

    asyncio.run(main())


@pytest.mark.parametrize("dies", [True, False])
def test_a_way_back_that_is_given_up_leaves_what_is_confirmed_answering(
    life: Life, bundles: dict[str, Path], dies: bool
) -> None:
    async def main() -> None:
        old = put(life.slots, bundles["1.0.0"])
        life.slots.confirm("gas", old)
        new = put(life.slots, bundles["2.0.0"])
        life.slots.confirm("gas", new)
        life.serving.site.on_crash = lambda generation, _code: not life.updating.crashed(generation, "killed")
        await life.serving.switch(await life.serving.start({"gas": new}, timeout_s=60))
        open_bundles = life.serving.site.open_bundles

        async def old_does_not_start(wanted: Iterable[tuple[str, str]]) -> None:
            if any(digest == old.digest for digest, _ in wanted):
                while dies and not generation.gone:
                    await asyncio.sleep(0.005)
                raise Rejected("golden_failed", "other outputs", model="gas")
            await open_bundles(wanted)

        generation = life.serving.generation_of("gas")
        assert generation is not None
        life.serving.site.open_bundles = old_does_not_start
        life.updating.tick()
        assert life.updating.go_back("gas", new, "it crashes")
        if dies:
            # It goes anyway: nobody starts it again while what was before it is brought up.
            generation.worker.kill()
        await settled(life)
        assert "2.0.0 goes on" in life.updating.update.detail
        async with asyncio.timeout(30):
            while not life.serving.answering("gas"):
                await asyncio.sleep(0.01)
        assert life.serving.models()["gas"].version == "2.0.0"
        await life.serving.stop()

    asyncio.run(main())


def test_what_comes_back_later_takes_nothing_from_a_trial_that_began_meanwhile(
    life: Life, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No other worker of what is confirmed.
    monkeypatch.setattr(life.updating.turnover.standby, "begin", lambda _models: None)

    async def main() -> None:
        old, new, third = (put(life.slots, bundle) for bundle in (*bundles.values(), tmp_path / "3.0.0"))
        life.slots.confirm("gas", old)
        life.slots.confirm("gas", new)
        await life.serving.switch(await life.serving.start({"gas": old}, timeout_s=60))
        open_bundles, begun, goes_on = life.serving.site.open_bundles, asyncio.Event(), asyncio.Event()

        async def slowly(wanted: Iterable[tuple[str, str]]) -> None:
            await open_bundles(wanted)
            if any(digest == new.digest for digest, _ in wanted):
                begun.set()
                await goes_on.wait()

        life.serving.site.open_bundles = slowly
        life.updating.turnover.replace_later("gas", new)
        await asyncio.wait_for(begun.wait(), 30)
        life.updating.update = lc.Update(
            state="prove", model="gas", digest=third.digest, version="3.0.0", variant=third.variant, attempt=1,
            since=life.clock.instant(),
        )  # fmt: skip
        life.updating.feed(await life.updating.turnover.prove())
        async with asyncio.timeout(30):
            while life.serving.models()["gas"].version != "3.0.0" or len(life.serving.site.alive) > 1:
                await asyncio.sleep(0.01)
        goes_on.set()
        async with asyncio.timeout(30):
            # It comes up, and one of the two is ended.
            for workers in (2, 1):
                while len(life.serving.site.alive) != workers:
                    await asyncio.sleep(0.001)
        assert (life.updating.update.state, life.serving.models()["gas"].version) == ("trial", "3.0.0")
        await life.serving.stop()

    models.build_bundle(tmp_path / "3.0.0", version="3.0.0")
    asyncio.run(main())


def put_sealed(slots: Slots, folder: Path, version: str) -> Slot:
    """The slot of an encrypted bundle; ``folder`` keeps it in the clear."""
    key = bytes(32)
    models.build_bundle(folder, version=version, content_key=key)
    manifest = (folder / "manifest.json").read_bytes()
    digest, found = m.digest(manifest), m.parse(manifest)
    slots.path(digest).mkdir()
    (slots.path(digest) / "manifest.json").write_bytes(manifest)
    for file in found.files():
        (slots.path(digest) / file.path).write_bytes(models.seal((folder / file.path).read_bytes(), key))
    return Slot(digest=digest, version=version, variant=found.variants[0].id, standing="confirmed")


@pytest.mark.parametrize("before", [True, False])
def test_an_only_model_that_cannot_be_opened_is_replaced_by_what_it_was_before_until_it_can(
    life: Life, bundles: dict[str, Path], tmp_path: Path, before: bool
) -> None:
    slots = life.slots
    slots.opened = tmp_path / "memory"
    slots.opened.mkdir(mode=0o700)
    key_is_there = False

    async def open_bundles(wanted: Iterable[tuple[str, str]]) -> None:
        if any(slots.is_closed(*one) for one in wanted):
            if not key_is_there:
                raise Degraded("encryption_key_unusable", "the token is locked")
            shutil.copytree(tmp_path / "clear", tmp_path / "memory" / closed.digest)

    async def main() -> None:
        nonlocal key_is_there
        life.serving.site.open_bundles = open_bundles
        error = await life.updating.come_up({"gas": closed}, timeout_s=60.0)
        assert life.serving.answering("gas") == before
        if before:
            assert error is None
            assert life.serving.models()["gas"].version == "1.0.0"
        else:
            assert isinstance(error, Degraded)
            assert error.code == "encryption_key_unusable"
        key_is_there = True
        async with asyncio.timeout(30):
            while not life.serving.answering("gas") or life.serving.models()["gas"].version != "2.0.0":
                life.serving.tick()
                await asyncio.sleep(0.02)
        await life.serving.stop()

    if before:
        slots.confirm("gas", put(slots, bundles["1.0.0"]))
    closed = put_sealed(slots, tmp_path / "clear", "2.0.0")
    slots.confirm("gas", closed)
    asyncio.run(main())


def test_a_confirmation_is_written_before_a_person_or_a_crash_loop_has_the_bundle_go(
    life: Life, bundles: dict[str, Path]
) -> None:
    async def main() -> None:
        new = on_trial(life, bundles)
        life.updating.tick()
        life.updating.feed(e.TrialKept(detail="100 requests, 0 failed"))
        assert life.updating.update.resting
        assert not life.updating.go_back("gas", new, "it crashes"), "nothing is known to be before it yet"
        assert life.updating.order_revert("gas").version == "1.0.0"
        assert life.updating.update.state == "confirmed"
        async with asyncio.timeout(30):
            while life.updating.update.code != "reverted_by_operator" or not life.updating.at_rest:
                await asyncio.sleep(0.01)
        said = [(data["state"], code) for code, data in life.changes if data]
        assert said[0] == ("confirmed", "")
        assert ("revert", "reverted_by_operator") in said
        await settled(life)
        confirmed = life.slots.pointers("gas").confirmed
        assert confirmed is not None
        assert (confirmed.version, life.slots.pointers("gas").previous) == ("1.0.0", None)
        await life.serving.stop()

    asyncio.run(main())


def test_a_forced_floor_of_another_model_waits_for_a_confirmation_that_is_being_written(
    life: Life, bundles: dict[str, Path], tmp_path: Path
) -> None:
    async def main() -> None:
        on_trial(life, bundles)
        old = life.slots.pointers("gas").confirmed
        assert old is not None
        await life.serving.switch(await life.serving.start({"gas": old}, timeout_s=60))
        remembered = Remembered(life.store, life.clock, tmp_path)
        remembered.forced = {"gas": "1.5.0"}
        forcing = Forcing(remembered, life.slots, life.serving, life.updating, life.clock)
        life.updating.feed(e.TrialKept(detail="100 requests, 0 failed"))
        # Both come in one callback of the loop.
        forcing.tick()
        assert life.updating.update.state == "confirmed"
        async with asyncio.timeout(30):
            while not life.updating.at_rest:
                await asyncio.sleep(0.01)
        assert [data["state"] for _, data in life.changes if data] == ["confirmed"]
        confirmed = life.slots.pointers("gas").confirmed
        assert confirmed is not None
        assert confirmed.version == "2.0.0"
        forcing.tick()
        assert (life.updating.update.state, life.updating.update.code) == ("revert", "below_forced_floor")
        await life.updating.stop()
        await life.serving.stop()

    asyncio.run(main())


def test_a_store_that_is_busy_when_a_trial_ends_swallows_no_word_and_keeps_no_failure(
    life: Life, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        new = on_trial(life, bundles)
        life.updating.failures.penalise(msgspec.structs.replace(life.updating.update, code="unreachable"))
        put_value = life.store.put

        def busy(key: str, value: object) -> None:
            if key in ("waits", "failures"):
                raise Degraded("store_busy", "another process locks the file", advice="")
            put_value(key, value)

        monkeypatch.setattr(life.store, "put", busy)
        life.updating.feed(e.TrialKept(detail="100 requests, 0 failed"))
        await asyncio.sleep(0.05)
        assert life.updating.update.state == "trial"
        monkeypatch.undo()
        await settled(life)
        assert life.updating.update.state == "confirmed"
        async with asyncio.timeout(30):
            while not life.rests:
                await asyncio.sleep(0.01)
        assert [data["state"] for _, data in life.changes if data] == ["confirmed"]
        assert life.updating.failures.of(new.digest) == {}
        assert life.updating.failures.wait_s(new.digest) == 0

    asyncio.run(main())


def test_a_start_that_cannot_note_whom_it_blames_goes_on(
    life: Life, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    life.slots.confirm("gas", put(life.slots, bundles["1.0.0"]))
    new = put(life.slots, bundles["2.0.0"])
    life.slots.confirm("gas", new)
    update = lc.Update(state="confirmed", model="gas", digest=new.digest, version="2.0.0", variant=new.variant)
    life.updating.update = update

    def full(*_: object) -> None:
        raise Degraded("store_full", "no room", advice="")

    monkeypatch.setattr(life.store, "put", full)
    assert not life.updating.blame("the agent itself ended 5 times")
    assert life.updating.update == update
    monkeypatch.undo()
    assert life.updating.blame("the agent itself ended 5 times")
    assert life.updating.update.code == "crash_loop"


def test_a_lock_that_comes_in_the_middle_of_a_proof_has_the_next_worker_started_after_a_wait(
    life: Life, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        new = on_trial(life, bundles)
        ready = msgspec.structs.replace(life.updating.update, state="ready")
        life.slots.revert_active("gas")
        life.updating.update = ready
        now_s: float = life.clock.boot_s()
        monkeypatch.setattr(life.clock, "boot_s", lambda: now_s)
        for wait_s in (0.025, 0.05):
            life.updating.tick()
            assert life.updating.update.state == "prove"
            assert life.holding.take("robot", "a seam", 60.0).status == 200
            async with asyncio.timeout(30):
                while life.updating.update.state != "ready":
                    await asyncio.sleep(0.01)
            assert life.holding.give_back("robot").status == 200
            now_s += wait_s - 0.001
            life.updating.tick()
            assert (life.updating.update.state, life.updating.update.since) == ("ready", ready.since)
            (told,) = [one for one in why.explain(life.updating.why()) if one.about == "update to gas 2.0.0"]
            assert "a pause" in told.waits_for and "robot" not in told.waits_for
            now_s += 0.002
        assert life.updating.update.digest == new.digest
        # A person's word ends the wait.
        now_s -= 0.002
        life.updating.activate(despite_locks=False)
        assert life.updating.update.state == "prove"
        await life.updating.stop()
        await life.serving.stop()

    asyncio.run(main())
