"""What the device says of itself: every state has its words, what it waits for, and what a person can do."""

from __future__ import annotations

from typing import Any

import pytest
from skerry_agent.core import lifecycle as lc
from skerry_agent.core import why


def update(state: str, code: str = "", **more: Any) -> lc.Update:
    return lc.Update(
        state=state, model="gas", digest="a" * 64, version="2.0.0", attempt=2, code=code, detail=more.pop("detail", "so it is" if code else ""), **more
    )  # type: ignore[arg-type]  # fmt: skip


def told(**facts: Any) -> dict[str, why.Told]:
    found = why.explain(why.Facts(sync_age_s=3.0, running={"gas": ("1.0.0", "confirmed")}, **facts))
    return {one.about: one for one in found}


@pytest.mark.parametrize("state", sorted(set(lc.STATES) - lc.RESTING))
def test_every_state_under_way_says_what_it_waits_for_and_what_ends_it(state: str) -> None:
    code = "trial_errors" if state == "revert" else ""
    found = told(update=update(state, code), since_s=65.0, left_s=55.0, trial=(30, 100, 20.0))["update to gas 2.0.0"]
    assert found.since_s == 65.0
    assert "attempt 2" in found.says and (not code or code in found.says)
    assert "skerry-agent cancel" in found.do
    if state == "ready":
        assert found.waits_for == "what holds it to end, at most 55 s"
        assert "`skerry-agent activate`" in found.do
        locked = update("ready", detail="the lock of welder to end (a seam)")
        assert "`skerry-agent activate --despite-locks`" in told(update=locked)["update to gas 2.0.0"].do
        return
    assert found.waits_for == (
        "70 of 100 inferences, or the end of its time in 20 s" if state == "trial" else "the end of that, within 55 s"
    )


def test_a_bundle_that_is_given_up_waits_for_its_try_or_for_a_person() -> None:
    waits = told(update=update("idle", "unreachable", failed_in="fetch"), wait_s=90.0)["update to gas 2.0.0"]
    assert waits.waits_for.startswith("its next try, in 1 min 30 s; it needs a way to the server")
    assert "skerry-agent sync --pardon" in waits.do
    for code in ("golden_failed", "cancelled", "too_many_moves", "crash_loop"):
        spent = told(update=update("idle", code, failed_in="prove"), spent=True)["update to gas 2.0.0"]
        assert "a person" in spent.waits_for and "skerry device retry" in spent.do
        assert code in spent.says and spent.code == code
    withdrawn = told(update=update("idle", "withdrawn", failed_in="trial"))["update to gas 2.0.0"]
    assert (withdrawn.waits_for, withdrawn.do) == ("what its group offers next", "")


def test_what_keeps_the_device_from_news_is_named_with_its_cure() -> None:
    assert told().keys() == {"gas"}
    found = told(sync_code="expired", sync_detail="timestamp", linked=False, membership="unknown_device", restarts=3)
    assert "publishes it anew" in found["look for news"].do
    assert "enrol it anew" in found["server"].do
    assert found["broker"].waits_for == "the broker"
    assert "3 times in a row" in found["agent"].says
    ended = told(certificate_left_s=-90_000.0, linked=False)
    assert "ended 1 d 1 h ago" in ended["certificate"].says
    assert "broker" not in ended
    assert why.explain(why.Facts())[0].says == "nothing answers"


def test_of_what_should_answer_and_does_not_it_says_so_and_what_to_do() -> None:
    dead = why.explain(
        why.Facts(running={"gas": ("2.0.0", "stopped"), "pump": ("1.0.0", "confirmed_on_golden")}, sync_age_s=3.0)
    )
    assert [one.says for one in dead] == [
        "nothing answers: 2.0.0 should, and no worker does",
        "answers as 1.0.0, confirmed on golden",
    ]
    assert dead[0].waits_for.startswith("a worker")
    assert "skerry-agent logs" in dead[0].do and "skerry-agent revert" in dead[0].do
    forced = why.explain(why.Facts(running={"gas": ("2.0.0", "stopped")}, update=update("idle", "below_forced_floor")))
    assert (forced[0].says, forced[0].do) == ("nothing answers: 2.0.0 must not any more", "")
    assert "floor that the approvers forced" in forced[0].waits_for
    other = why.Ended(update=update("idle", "below_forced_floor"), since_s=None, wait_s=0.0, spent=False)
    since = lc.Update(state="confirmed", model="pump", digest="b" * 64, version="3.0.0")
    beside = why.explain(why.Facts(running={"gas": ("2.0.0", "stopped")}, update=since, beside=(other,)))
    assert beside[0] == forced[0]
    lost = why.explain(
        why.Facts(running={"gas": ("2.0.0", "stopped")}, unstarted={"gas": ("encryption_key_differs", "HTTP 403")})
    )[0]
    assert lost.says == "nothing answers: 2.0.0 should, and does not start: encryption_key_differs (HTTP 403)"
    assert "skerry device forget-key" in lost.waits_for and "skerry device forget-key" in lost.do
    refused = why.explain(why.Facts(update=update("idle", "below_floor")))[0]
    assert refused.waits_for == "a bundle that may run here"


def test_a_document_that_wants_a_newer_agent_is_named_with_what_it_wants() -> None:
    found = told(lacks="windows")["group document"]
    assert "windows" in found.says and "goes on" in found.says
    assert (found.waits_for, found.do, found.code) == ("a newer agent", "install a newer agent", "agent_too_old")
