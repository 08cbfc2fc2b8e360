"""Steps 1 to 3: the first model to all; a device loses its network; the second model by stages; the device comes back."""

from __future__ import annotations

import time
from typing import Any

from skerry_cli.demo import models
from skerry_cli.demo.reckoning import server_counts
from skerry_cli.demo.run import Run

FIRST, SECOND = "1.0.0", "2.0.0"
CANARIES = 4


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


def lose_network(run: Run) -> None:
    """Step 3, first half: before step 2."""
    fleet, screen = run.fleet, run.screen
    device = fleet.cabled
    screen.heading(f"3a. {device} loses its network")
    fleet.cable("cut")
    before = fleet.counts(device)
    run.notes.offline = {"device": device, "cut_s": time.time(), "answered_at_cut": before.answered}
    fleet.wait(f"the server to miss {device}", lambda: not fleet.device(device)["online"], 30.0)
    screen.say(
        f"Its cable is cut: HTTP and MQTT both. The server sees it offline. Its application has {before.answered} answers and goes on."
    )


def second_model(run: Run) -> None:
    """Step 2."""
    fleet, screen = run.fleet, run.screen
    screen.heading(f"2. The second model goes to exactly {CANARIES} devices, then to all")
    run.publish(make(run, SECOND, (1, 2, 3)))
    stages: list[dict[str, Any]] = [
        {"devices": CANARIES, "min_devices": CANARIES, "min_inferences": 200, "min_seconds": 3, "max_seconds": 120},
        {"share": 1.0, "min_inferences": 300, "max_seconds": 140},
    ]
    run.roll_out(SECOND, stages, "second-model")
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
    screen.say(_who_runs(run))


def regain_network(run: Run) -> None:
    """Step 3, second half."""
    fleet, screen, notes = run.fleet, run.screen, run.notes
    device = fleet.cabled
    screen.heading(f"3b. {device} comes back")
    there = fleet.counts(device)
    alone = there.answered - notes.offline["answered_at_cut"]
    run.must(alone > 0, f"{device} answered while it had no network")
    run.must(
        set(there.versions) == {FIRST},
        f"{device} ran {FIRST} alone while it had no network, not {sorted(there.versions)}",
    )
    mended = time.time()
    fleet.cable("mend")
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
