"""What an hour of counting writes to the disk, by commit interval: bytes an inference and MB an hour, as the kernel counts them for this process.

A device online: eight models, each with a worker of its own, so that their windows are cut at eight different moments; each window is stored
with its ring position, marked as sent, published, acknowledged and deleted, in the transactions that the agent makes. Time is
simulated, every write is real. The ring's part is a mapped ring that the kernel writes back every thirty seconds, its own default.
What a file system's journal adds is not in it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from skerry_agent.store import Entry, RingAt, Store, open_store
from skerry_agent.worker import ring as r
from skerry_agent.worker.plan import FeatureColumn, OutputColumn, Plan
from skerry_contract import window as w
from skerry_contract import wire

from tests.bench.result import Result, scratch

MODELS, PER_S = 8, 10
"""Models of the device, and inferences a second of all of them."""
HOUR_S = 3600.0
BODY_BYTES = 1400
"""A window of a model with some thirty features."""
FEATURES = 30
WRITE_BACK_S = 30.0
COMMITS_S = (0.2, 0.5, 1.0, 5.0, 30.0, 60.0)
WINDOWS_S = (5.0, 300.0)
"""A device that is looked at closely, and the default."""


def run() -> Result:
    # Beside this file, not in a folder that may lie in memory: nothing written there counts.
    with tempfile.TemporaryDirectory(prefix="wear-", dir=scratch()) as name:
        folder = Path(name)
        stored = {
            (window_s, commit_s): _store_hour(folder / f"{window_s}-{commit_s}.db", window_s, commit_s)
            for window_s in WINDOWS_S
            for commit_s in COMMITS_S
        }
        ring = _ring_hour(folder / "a.ring")
    cells = "; ".join(
        f"windows of {window_s:g} s: "
        + ", ".join(f"{commit_s:g} s {_told(stored[window_s, commit_s])}" for commit_s in COMMITS_S)
        for window_s in WINDOWS_S
    )
    return Result(
        bench="outbox_wear",
        value=(stored[300.0, 0.5] + ring) / (HOUR_S * PER_S),
        unit="bytes written per inference",
        n=int(HOUR_S * PER_S),
        note=(
            f"{MODELS} models, {PER_S} inferences/s together, windows of 300 s, commit_s 0.5, of it the rings {_told(ring)}; "
            f"the store by commit_s, {cells}"
        ),
    )


def _told(hour_bytes: int) -> str:
    return f"{hour_bytes / 1e6:.1f} MB/h ({hour_bytes / (HOUR_S * PER_S):.0f} B)"


def written_bytes() -> int:
    """What this process has given the disk to write."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no write_bytes")


def _store_hour(path: Path, window_s: float, commit_s: float) -> int:
    """One hour, after a while that fills the log once."""
    store, _ = open_store(path, binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=0.0)
    cuts = [
        (step * window_s + model * window_s / MODELS, model)
        for step in range(int(HOUR_S / window_s))
        for model in range(MODELS)
    ]
    commits: list[list[int]] = []
    due_s = -1.0
    for at_s, model in sorted(cuts):
        # As the agent does it: the first window that waits says when.
        if at_s >= due_s:
            commits.append([])
            due_s = at_s + commit_s
        commits[-1].append(model)
    for models in commits[-200:]:
        _commit(store, models)
    before = written_bytes()
    for models in commits:
        _commit(store, models)
    store.checkpoint()
    took = written_bytes() - before
    store.close()
    return took


def _commit(store: Store, models: list[int]) -> None:
    seqs = store.append(
        [
            Entry(kind="window", body=os.urandom(BODY_BYTES), key=f"model-{model}/v/none", inferences=1)
            for model in models
        ],
        [RingAt(ring=f"/var/lib/skerry/run/rings/1-model-{model}-0.ring", upto=store.last_seq) for model in models],
    )
    store.mark_sent(store.epoch, seqs)
    store.acknowledge(wire.Ack(epoch=store.epoch, upto=seqs[-1]))


def _ring_hour(path: Path) -> int:
    """An hour of one model's requests, and as much of the others': each has a ring of its own, whose first page is written too."""
    plan = Plan(
        features=tuple(FeatureColumn(name=f"f{i}", input="x", column=i) for i in range(FEATURES)),
        outputs=(OutputColumn(name="p", classes=3),),
    )
    key = w.Key("gas", "0" * 64, "onnx-fp32", "none", "", 0)
    ring = r.Ring.create(str(path), r.Header(key=key, plan=plan, capacity=r.CAPACITY, boot_id="0" * 32))
    values = np.random.default_rng(1).random(plan.width, dtype=np.float32)
    ring.memory.flush()
    before = written_bytes()
    each = PER_S * WRITE_BACK_S / MODELS
    slots = 0
    for turn in range(1, int(HOUR_S / WRITE_BACK_S) + 1):
        while slots < turn * each:
            ring.values[slots % r.CAPACITY] = values
            ring.publish(1)
            slots += 1
        ring.memory.flush()
    took = written_bytes() - before
    ring.close(remove=True)
    return took * MODELS
