"""A supervisor's part of 200 swaps, in a process of its own that loads what a supervisor loads: run by ``swap_memory``.

Prints one JSON object: RSS of this process and of each new worker, bytes, after every swap.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path

import psutil
from skerry_agent import config
from skerry_agent.clock import Clock
from skerry_agent.leftovers import Roll
from skerry_agent.serving import Serving
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import open_store
from skerry_contract import ids


async def main(folder: Path, digest: str, swaps: int) -> None:
    (folder / "run").mkdir()
    found = config.build({"state_dir": str(folder), "timing": {"fold_interval_s": 0.2, "health_interval_s": 0.2}}, {})
    clock, slots = Clock(), Slots(folder / "slots")
    store, _ = open_store(
        folder / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    listeners = [socket.socket(), socket.socket(socket.AF_UNIX)]
    listeners[0].bind(("127.0.0.1", 0))
    listeners[1].bind(str(folder / "s"))
    serving = Serving(
        found, store, slots, clock, listeners, Roll(folder / "run" / "workers.json", clock.boot_id),
        on_health=lambda _: None, on_crash=lambda *_: True, on_unruly=lambda *_: False, on_start=lambda *_: None,
        on_records=lambda: None, on_fault=lambda error: print(error, file=sys.stderr), draw=lambda: 0.5,
    )  # fmt: skip
    slot = Slot(digest=digest, version="1.0.0", variant="onnx-fp32", standing="confirmed")

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.5)
            serving.tick()

    ticking = asyncio.create_task(tick())
    own, workers = [], []
    for _ in range(swaps):
        await serving.switch(await serving.start({"gas": slot}, timeout_s=120, anew=True))
        if not own:
            print(listeners[0].getsockname()[1], flush=True)
        await asyncio.sleep(0.3)
        own.append(psutil.Process().memory_info().rss)
        workers.append(psutil.Process(serving.generations()[0].worker.pid).memory_info().rss)
    print("done", flush=True)
    # The clients end first.
    await asyncio.to_thread(sys.stdin.read)
    ticking.cancel()
    await serving.stop()
    print(json.dumps({"supervisor": own, "workers": workers, "cut": store.lost()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
