"""Steps 1 to 3: the first model to all; the world moves; a device loses its network; the second model is judged; the device
comes back.
"""

from __future__ import annotations

import time
from typing import Any

from skerry_cli.demo import insight, models
from skerry_cli.demo.reckoning import server_counts
from skerry_cli.demo.run import FIRST, SECOND, Run

CANARIES = 4
JUDGE: dict[str, Any] = {
    "guardrails": {
        "labelled_errors": {"alpha": 0.035, "margin": 1.5, "min_n": 200},
        "trouble": {"alpha": 0.005},
    },
    "look_s": 1.0,
    "guard_s": 3.0,
    "min_devices": CANARIES - 1,
}
"""Times for a demo; failures and latency are left to the gates, since none fail and two cores run all of the fleet."""
_END_LABELS = 400
_DRIFT_S = 60.0


def make(run: Run, version: str, batches: tuple[int, ...], seed: int = 0) -> models.Made:
    """Trains, quantizes and builds; tells what came out."""
    run.screen.progress(f"training {version}")
    made = models.make_bundle(
        run.fleet.folder / "bundles" / version, version=version, batches=batches, created=run.created(), seed=seed
    )
    run.notes.accuracy[version] = made.accuracy
    named = f"batch {batches[0]}" if len(batches) == 1 else f"batches {batches[0]} to {batches[-1]}"
    sizes, right = made.model_bytes, made.accuracy
    run.screen.say(
        f"Trained {version} on {len(made.trained.fitted)} rows of {named}; int8 ONNX of {sizes[models.ONNX]} bytes and int8 TFLite of "
        f"{sizes[models.TFLITE]}; {right[models.ONNX]:.1%} and {right[models.TFLITE]:.1%} right on the {len(made.trained.held_out)} "
        "held-out rows, from which golden cases and reference come."
    )
    return made


def first_model(run: Run) -> None:
    """Step 1."""
    run.screen.heading("1. The first model goes to every device")
    run.publish(make(run, FIRST, (1,)))
    stages = [{"share": 1.0, "min_inferences": 40 * len(run.fleet.devices), "max_seconds": 140}]
    run.roll_out(FIRST, stages, "first-model")
    run.screen.say(_who_runs(run))


def world_moves(run: Run) -> None:
    """Step 2, first half: the sensors age, which the server notices with and without labels."""
    fleet, screen = run.fleet, run.screen
    screen.heading(f"2. The world moves under {FIRST}")
    before = insight.accuracy(run, "1", FIRST, batch=fleet.batch)

    def looked() -> dict[str, Any] | None:
        found = insight.drift(run, FIRST)
        screen.progress(f"drift: {found['reason'] if found else 'not looked for yet'}")
        return found if found and found["verdict"] != "NO_DATA" else None

    calm = fleet.wait("a look for drift with enough rows", looked, _DRIFT_S, every_s=1.0)
    run.must(calm["verdict"] == "STEADY", f"nothing has drifted on batch 1; the server says {calm['verdict']}")
    screen.say(f"Drift on batch 1: {calm['verdict']}, because: {calm['reason']}.")
    fleet.change_world(2)
    moved = time.time()
    screen.say("Now every application reads batch 2: the same sensors, months later.")

    def raised() -> dict[str, Any] | None:
        found = insight.drift(run, FIRST)
        screen.progress(f"drift: {found['reason'] if found else 'not looked for yet'}")
        return found if found and found["findings"] else None

    found = fleet.wait("drift to be raised", raised, _DRIFT_S, every_s=1.0)
    after_s = time.time() - moved
    named = insight.strongest(found["findings"])
    run.notes.drift = {
        "batch_1": calm["verdict"],
        "raised_on_batch": fleet.batch,
        "seconds": round(after_s, 1),
        "findings": len(found["findings"]),
        "strongest": named,
    }
    run.must(found["verdict"] == "DRIFT", f"drift is raised on batch 2; the server says {found['verdict']}")
    screen.say(
        f"Drift raised {after_s:.0f} s later, without any label: {len(found['findings'])} features and outputs, most of all "
        f"{', '.join(named)}.",
        style="yellow",
    )
    insight.wait_until(run, moved + insight.SETTLED_S, "labels of batch 1 still come")
    after = insight.accuracy(run, "2", FIRST, batch=fleet.batch, since_s=moved + insight.SETTLED_S)
    run.must(
        after["interval"][1] < before["interval"][0],
        f"labels show that {FIRST} is right less often on batch 2 ({after['accuracy']:.1%}) than on batch 1 ({before['accuracy']:.1%})",
    )


def lose_network(run: Run) -> None:
    """Step 3, first half: before the second model."""
    fleet, screen = run.fleet, run.screen
    device = fleet.devices[-2]
    screen.heading(f"3a. {device} loses its network")
    fleet.cable("cut", device)
    before = fleet.counts(device)
    run.notes.offline = {"device": device, "cut_s": time.time(), "answered_at_cut": before.answered}
    fleet.wait(f"the server to miss {device}", lambda: not fleet.device(device)["online"], 30.0)
    screen.say(
        f"Its cable is cut: HTTP and MQTT both. The server sees it offline. Its application has {before.answered} answers and goes on."
    )


def second_model(run: Run) -> None:
    """Step 3, the second model."""
    fleet, screen = run.fleet, run.screen
    screen.heading(f"3b. The second model goes to exactly {CANARIES} devices, is judged, and goes to all")
    run.publish(make(run, SECOND, (1, 2, 3)))
    run.notes.away.add((run.notes.offline["device"], run.bundles[SECOND].bundle.digest))
    fleet.change_world(5)
    moved = time.time()
    screen.say(
        f"Now every application reads batch 5, which neither model has seen. {CANARIES} devices are compared with all others on the share of "
        f"wrong answers among labelled ones, once {_END_LABELS} labels have come from them."
    )
    stages: list[dict[str, Any]] = [
        {"devices": CANARIES, "min_devices": CANARIES, "min_inferences": 200, "min_seconds": 3, "max_seconds": 120},
        {"share": 1.0, "min_inferences": 300, "max_seconds": 140},
    ]
    run.roll_out(SECOND, stages, "second-model", judge={**JUDGE, "end_labels": _END_LABELS})
    items, _ = server_counts(fleet)
    run.notes.first_stage = sorted(
        {
            row["device"]
            for row in items
            if row["rollout"] == "second-model" and row["stage"] == 0 and row["arm"] == "candidate"
        }
    )
    on_tflite = [device for device in run.notes.first_stage if device in fleet.tflite]
    screen.say(
        f"In the first stage exactly these answered with {SECOND}: {', '.join(run.notes.first_stage)}; "
        f"{len(run.notes.first_stage) - len(on_tflite)} on ONNX, {len(on_tflite)} on TFLite."
    )
    run.must(
        (len(run.notes.first_stage), len(on_tflite)) == (CANARIES, 1),
        f"the first stage has exactly {CANARIES} devices, 1 of them on TFLite; it had {len(run.notes.first_stage)} and {len(on_tflite)}",
    )
    insight.verdict(run, "second-model", action="advance", wanted="PASS")
    old = insight.accuracy(run, "3", FIRST, batch=fleet.batch, since_s=moved + insight.SETTLED_S)
    new = insight.accuracy(run, "3", SECOND, batch=fleet.batch)
    run.must(new["interval"][0] > old["interval"][1], f"{SECOND} is right more often on batch 5 than {FIRST}")
    screen.say(_who_runs(run))


def regain_network(run: Run) -> None:
    """Step 3, second half."""
    fleet, screen, notes = run.fleet, run.screen, run.notes
    device = notes.offline["device"]
    screen.heading(f"3c. {device} comes back")
    there = fleet.counts(device)
    alone = there.answered - notes.offline["answered_at_cut"]
    run.must(alone > 0, f"{device} answered while it had no network")
    run.must(
        set(there.versions) == {FIRST},
        f"{device} ran {FIRST} alone while it had no network, not {sorted(there.versions)}",
    )
    mended = time.time()
    fleet.cable("mend", device)
    screen.say(
        f"Without a network it gave {alone} answers with {FIRST} in {mended - notes.offline['cut_s']:.0f} s. The cable is mended."
    )

    def updated() -> bool:
        item = fleet.device(device)
        version, state = fleet.running(item)
        screen.progress(
            f"{device} is {'online' if item['online'] else 'offline'}, runs {version} ({state or 'no state'})"
        )
        return bool(item["online"]) and version == SECOND and state.startswith("confirmed")

    fleet.wait(f"{device} to take {SECOND}", updated, 90.0)
    took = time.time() - mended
    digest = run.bundles[FIRST].bundle.digest

    def arrived() -> bool:
        counted = sum(row["ok"] for row in server_counts(fleet, device=device)[0] if row["bundle"] == digest)
        answered = fleet.counts(device).versions[FIRST][0]
        screen.progress(f"{counted} of {answered} answers of {FIRST} have arrived")
        return bool(counted >= answered)

    fleet.wait(f"everything {device} counted to arrive", arrived, 60.0)
    counted = sum(row["ok"] for row in server_counts(fleet, device=device)[0] if row["bundle"] == digest)
    answered = fleet.counts(device).versions[FIRST][0]
    run.must(counted == answered, f"{device} gave {answered} answers with {FIRST}, the server counted {counted}")
    notes.offline |= {
        "answered_offline": alone,
        "offline_s": round(mended - notes.offline["cut_s"], 1),
        "updated_after_s": round(took, 1),
    }
    screen.say(
        f"It took {SECOND} by itself {took:.1f} s after the cable was mended. The server has all {counted} answers it gave with "
        f"{FIRST}, each once."
    )


def _who_runs(run: Run) -> str:
    versions: dict[str, int] = {}
    for item in run.fleet.listed().values():
        version = f"{run.fleet.running(item)[0]} ({run.fleet.variant(item)})" if run.fleet.variant(item) else "nothing"
        versions[version] = versions.get(version, 0) + 1
    parts = [f"{n} device{'' if n == 1 else 's'} run{'s' if n == 1 else ''} {v}" for v, n in sorted(versions.items())]
    return f"Now: {', '.join(parts)}."
