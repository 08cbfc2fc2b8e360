"""What is remembered of bundles that failed: which of them may come again, and so are worth their room."""

from __future__ import annotations

from pathlib import Path

from skerry_agent.clock import BootSeconds, Clock
from skerry_agent.core.lifecycle import Update
from skerry_agent.failures import Failures
from skerry_agent.store import Store, open_store
from skerry_contract import ids


class Turned(Clock):
    """A clock that a test moves on."""

    now = 1000.0

    def boot_s(self) -> BootSeconds:
        return BootSeconds(self.now)


def known(folder: Path) -> tuple[Store, Failures]:
    """What a new device remembers of bundles that failed, and where."""
    store, _ = open_store(
        folder / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    return store, Failures(store, Turned(), lambda: 0.5, 1.0)


def test_what_is_tried_again_keeps_its_room_until_it_is_spent_or_its_wait_is_over(tmp_path: Path) -> None:
    store, _ = open_store(
        tmp_path / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    clock = Turned()
    failures = Failures(store, clock, lambda: 0.5, 1.0)
    again, spent = "1" * 64, "2" * 64
    failures.penalise(Update(state="revert", digest=again, code="timeout", failed_in="fetch"))
    failures.penalise(Update(state="revert", digest=spent, code="golden_failed", failed_in="prove"))
    assert failures.may_come() == {again}
    # Whether it is still wanted is the plan's to say then.
    clock.now += 3600.0
    assert failures.may_come() == set()
    store.close()


def test_one_wrong_file_of_a_mirror_is_waited_for_as_the_first_whatever_failed_before(tmp_path: Path) -> None:
    store, _ = open_store(
        tmp_path / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    failures = Failures(store, Turned(), lambda: 0.999, 1.0)
    digest = "1" * 64

    def waits_s(code: str) -> float:
        failures.penalise(Update(state="revert", digest=digest, code=code, failed_in="fetch"))
        return failures.wait_s(digest)

    for _ in range(12):
        waits_s("network_not_allowed")
    assert waits_s("mirror_wrong") < 5.0
    assert 5.0 < waits_s("mirror_wrong") < 10.0
    for _ in range(12):
        waits_s("mirror_wrong")
    assert waits_s("mirror_wrong") > 20_000.0
    store.close()


def test_what_counts_towards_a_bar_is_said_each_time_however_often_the_link_broke_before(tmp_path: Path) -> None:
    store, failures = known(tmp_path)
    digest = "1" * 64

    def said(code: str, failed_in: str, *, at_boot: bool = False) -> bool:
        ended = Update(
            state="idle",
            digest=digest,
            attempt=failures.attempt_of(digest),
            code=code,
            failed_in=failed_in,
            at_boot=at_boot,
        )
        failures.penalise(ended)
        found = not failures.was_said(ended)
        failures.said(ended)
        return found

    assert [said("unreachable", "fetch") for _ in range(5)] == [True, True, True, False, False]
    assert [said("trial_crashed", "trial", at_boot=True) for _ in range(2)] == [True, True]
    assert failures.spent() == {digest}
    store.close()


def test_a_refusal_that_is_worth_a_line_is_said_to_its_end(tmp_path: Path) -> None:
    """Of the last word that a server hears: it says that the device is on its way home, or that it is there."""
    store, failures = known(tmp_path)
    heard = []
    for attempt in range(2, 7):
        for state in ("revert", "idle"):
            ended = Update(state=state, digest="1" * 64, attempt=attempt, code="unreachable", failed_in="fetch")
            if not failures.was_said(ended):
                heard.append((attempt, state))
                failures.said(ended)
        if attempt == 4:
            # Power failed, say, before what follows could be noted.
            store.delete("recorded")
    assert heard == [(2, "revert"), (2, "idle"), (3, "revert"), (3, "idle"), (5, "revert"), (5, "idle")]
    store.close()
