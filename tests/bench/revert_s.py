"""Seconds from a trial's verdict to the first answer of the version before it, with no server's word and under load.

A whole agent with its workers; four keep-alive clients that ask as fast as they can and never retry. The bundle on trial answers
right and too slowly for its own limit, so that no request fails by the bundle itself, and any that fails is the way back's. The
verdict is when the state ``revert`` was stored. Beside it the same with ``pool.standby`` off: the way back starts a worker.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
import time
from pathlib import Path

from tests import models
from tests.bench.result import Result, median, percentile
from tests.integration.agent.rig import Broker, Device, Server, wait_for

ROUNDS = 20
CLIENTS = 4
LIMIT_MS = 3.0


class Asking:
    """Clients on keep-alive connections; ``answers``: (nanoseconds since boot, version) in the order of each client."""

    def __init__(self, port: int) -> None:
        self.answers: list[tuple[int, str]] = []
        self.failed: list[str] = []
        self._port = port
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        x, _ = models.rows(1)
        body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x[0].tolist()}]})
        while not self._over.is_set():
            try:
                connection.request("POST", "/v2/models/gas/infer", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status == 200:
                    self.answers.append((time.clock_gettime_ns(time.CLOCK_BOOTTIME), answer["model_version"]))
                else:
                    self.failed.append(f"{response.status} {answer}")
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                connection.close()
            time.sleep(0.002)

    def first_after(self, boot_ns: int, version: str) -> int | None:
        """When the first answer of a version came after a moment."""
        return min((at for at, found in self.answers if found == version and at >= boot_ns), default=None)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)


def measure(folder: Path, *, standby: bool, rounds: int) -> tuple[list[float], int, int]:
    """Seconds of each way back, answers and failed requests of all."""
    broker = Broker(folder / "nats").start()
    server = Server(broker.port)
    (folder / "device").mkdir()
    device = Device(folder / "device", broker.port, trial_s=60, trial_inferences=60)
    device.config.write_text(device.config.read_text() + f"[pool]\nstandby = {str(standby).lower()}\n")
    took: list[float] = []
    try:
        good = device.bundle("1.0.0")
        slo = {"latency_p95_ms": LIMIT_MS, "success": 0.99}
        bad = device.bundle("1.1.0", "slow", seed=1, changes={"slo": slo})
        device.publish(good)
        device.start()
        device.wait_running("1.0.0", "trial")
        device.infer(60)
        device.wait_running("1.0.0", "confirmed")
        asking = Asking(device.port)
        for number in range(1, rounds + 1):
            device.publish(bad)
            device.sync(pardon=True)
            verdicts = wait_for(
                lambda number=number: (v := _verdicts(server)) and len(v) >= number and v, why=device.log
            )
            device.wait_update("idle", "trial_slow")
            at_ns = verdicts[number - 1]
            first = wait_for(lambda at_ns=at_ns: asking.first_after(at_ns, "1.0.0"), why="an answer")
            took.append((first - at_ns) / 1e9)
            device.publish(good)
            device.synced()
        asking.stop()
        return took, len(asking.answers), len(asking.failed)
    finally:
        device.close()
        server.close()
        broker.stop()


def _verdicts(server: Server) -> list[int]:
    found = [event.at.boot_ns for event in server.events() if event.data["state"] == "revert"]
    return sorted(found)


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        kept, answers, failed = measure(Path(name), standby=True, rounds=ROUNDS)
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        started, _, failed_too = measure(Path(name), standby=False, rounds=ROUNDS // 4)
    return Result(
        bench="revert_s",
        value=percentile(kept, 1.0),
        unit="s",
        n=len(kept),
        note=(
            f"the slowest; median {median(kept):.3f}; {failed + failed_too} failed requests beside {answers} answers of {CLIENTS} clients; "
            f"without what ran before kept loaded: median {median(started):.3f}, slowest {max(started):.3f} (n={len(started)}); budget 2"
        ),
    )
