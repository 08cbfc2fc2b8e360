"""Step 4: a model that looked perfect where it was checked is judged on labelled errors and taken back everywhere, also from a device
that is offline at that moment.
"""

from __future__ import annotations

import time
from typing import Any

from skerry_cli.demo import insight
from skerry_cli.demo.act_rollouts import CANARIES, JUDGE, make
from skerry_cli.demo.run import SECOND, THIRD, Run

ROLLOUT = "third-model"
_END_LABELS = 1000
# A moment ago the world moved, and one device has been back for a short while only: its past is of this world, those of the others of the
# one before. Held against their pasts, a bad model on that device looks no worse than foretold.
_ERRORS = {**JUDGE["guardrails"]["labelled_errors"], "past": False}
_JUDGE = {**JUDGE, "guardrails": {**JUDGE["guardrails"], "labelled_errors": _ERRORS}, "end_labels": _END_LABELS}
_BACK_S = 60.0


def third_model(run: Run) -> None:
    """Step 4."""
    fleet, screen, notes = run.fleet, run.screen, run.notes
    screen.heading(f"4. The third model goes to {CANARIES} devices, is judged, and is taken back")
    fleet.change_world(6)
    moved = time.time()
    screen.say("Now every application reads batch 6.")
    made = make(run, THIRD, (5,))
    screen.say("On batch 5, where it was checked, it is right nearly always. Nobody has checked it on batch 6.")
    run.publish(made)
    insight.wait_until(run, moved + insight.SETTLED_S, "labels of batch 5 still come")
    insight.accuracy(run, "4", SECOND, batch=fleet.batch, since_s=moved + insight.SETTLED_S)
    offline: dict[str, Any] = {}

    def cut(rollout: dict[str, Any]) -> None:
        if offline or rollout["state"] != "running":
            return
        for device in rollout["devices"]["candidate"]:
            if device in fleet.cable_ports and THIRD in fleet.counts(device).versions:
                fleet.cable("cut", device)
                offline.update(device=device, cut_s=time.time())
                notes.away.add((device, made.bundle.digest))
                screen.say(f"{device} answers with {THIRD}, and loses its network at this moment.")
                return

    stages: list[dict[str, Any]] = [
        {"devices": CANARIES, "min_devices": CANARIES, "min_inferences": 200, "max_seconds": 120},
        {"share": 1.0, "min_inferences": 300, "max_seconds": 140},
    ]
    run.roll_out(THIRD, stages, ROLLOUT, judge=_JUDGE, end="rolled_back", meanwhile=cut)
    said = insight.verdict(run, ROLLOUT, action="roll_back", wanted="FAIL")
    run.must(
        any("labelled" in reason for reason in said["reasons"]) and bool(offline),
        f"{THIRD} fails on labelled errors while a candidate is offline",
    )
    candidates = list(said["candidates"])
    online = [device for device in candidates if device != offline.get("device")]

    def back() -> bool:
        fresh = {device: fleet.counts(device).changes[-1][1] for device in online}
        screen.progress(f"{sum(version == SECOND for version in fresh.values())} of {len(online)} answer with {SECOND}")
        return all(version == SECOND for version in fresh.values())

    fleet.wait(f"every online candidate to answer with {SECOND} again", back, _BACK_S)
    first = min(at for device in candidates for at, version in fleet.counts(device).changes if version == THIRD)
    last = max(fleet.counts(device).changes[-1][0] for device in online)
    decided = (said["decided_ms"] or 0) / 1000
    notes.bad_version = {
        "candidates": candidates,
        "candidates_on_tflite": [device for device in candidates if device in fleet.tflite],
        "first_answer_to_verdict_s": round(decided - first, 1),
        "first_answer_to_last_online_device_back_s": round(last - first, 1),
    }
    screen.say(
        f"From its first answer {decided - first:.1f} s passed to the verdict and {last - first:.1f} s until the last online device answered "
        f"with {SECOND} ({run.bundles[SECOND].bundle.digest[:12]}) again.",
        style="green",
    )
    if offline:
        _returns(run, offline, decided)
    _only_candidates(run, candidates)
    insight.accuracy(run, "4", THIRD, batch=fleet.batch)


def _returns(run: Run, offline: dict[str, Any], decided: float) -> None:
    fleet, screen = run.fleet, run.screen
    device = offline["device"]
    there = fleet.counts(device)
    run.must(
        there.changes[-1][1] == THIRD and there.last_answer_s > decided,
        f"{device} still answers with {THIRD} after the verdict, since it has no network",
    )
    screen.say(f"{device}, offline, still answers with {THIRD}. Its cable is mended.")
    mended = time.time()
    fleet.cable("mend", device)

    def returned() -> bool:
        item = fleet.device(device)
        version, state = fleet.running(item)
        screen.progress(f"{device} runs {version} ({state or 'no state'})")
        return (
            bool(item["online"])
            and version == SECOND
            and state.startswith("confirmed")
            and fleet.counts(device).changes[-1][1] == SECOND
        )

    fleet.wait(f"{device} to go back to {SECOND}", returned, _BACK_S)
    took = fleet.counts(device).changes[-1][0] - mended
    run.notes.bad_version |= {
        "offline_device": device,
        "offline_s": round(mended - offline["cut_s"], 1),
        "offline_device_back_after_s": round(took, 1),
    }
    screen.say(f"It answered with {SECOND} again {took:.1f} s after that, by itself.", style="green")


def _only_candidates(run: Run, candidates: list[str]) -> None:
    fleet = run.fleet
    answered = sorted(device for device in fleet.devices if THIRD in fleet.counts(device).versions)
    on_tflite = sum(device in fleet.tflite for device in answered)
    run.must(
        answered == sorted(candidates) and (len(answered), on_tflite) == (CANARIES, 1),
        f"exactly {CANARIES} devices, 1 of them on TFLite, answered with {THIRD}; {len(answered)} and {on_tflite} did",
    )
    wrong = {
        device: version for device, item in fleet.listed().items() if (version := fleet.running(item)[0]) != SECOND
    }
    run.must(not wrong, f"every device runs {SECOND} after the rollback; {wrong} do not")
