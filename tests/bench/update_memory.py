"""Memory of a device's processes at their peaks, over an update by whole file, one by delta, and a way back; and of applying a delta beside others.

A real server makes the delta, a real agent takes it. The file that changes has one tensor of 8 MB and lies beside the small classifier that
answers. Peaks are the kernel's (``VmHWM``), read every few milliseconds while a process lives; those of supervisor and workers begin anew
with each part. Applying alone, ours and five others': the whole process at its peak, and ours over the same interpreter with the same
imports that applies nothing, which is what the bound of 8 MB over the largest tensor speaks of.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from skerry_cli.demo.control import ask_agent

from tests.bench.delta_measuring import OURS, Pair, imported_mb, measure
from tests.bench.result import Result
from tests.updating_site import DEVICE, Site

SHAPE = (2048, 1024)
TENSOR_MB = 4 * SHAPE[0] * SHAPE[1] / 1e6
BOUND_MB = 8.0
EVERY_S = 0.004
MAKING_S = 600.0
KINDS = {
    "skerry_agent.courier": "courier",
    "skerry_agent.worker": "worker",
    "skerry_runtime.engines": "probe",
    "skerry_agent": "supervisor",
}
"""What is told apart, by module; of the courier's runs, workers and probes the largest."""


class Peaks:
    """The largest processes of an agent while this looks, by kind, MB."""

    def __init__(self, supervisor: int) -> None:
        self.mb: dict[str, float] = {}
        self._root = supervisor
        self._over = threading.Event()
        for pid in self._pids():
            # A peak of before is not of this part.
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            for pid in self._pids():
                try:
                    kind = kind_of(pid)
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                peak = next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)
                if kind:
                    self.mb[kind] = max(self.mb.get(kind, 0.0), peak)
            self._over.wait(EVERY_S)

    def _pids(self) -> Iterator[int]:
        found = [self._root]
        while found:
            pid = found.pop()
            yield pid
            # A process may end at any moment, and a thread of it.
            with contextlib.suppress(OSError):
                for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
                    with contextlib.suppress(OSError):
                        found += map(int, tasks.read_text().split())


def kind_of(pid: int) -> str:
    """What a process of an agent is; empty between its fork and its exec, and for the leash."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    if "-m" not in words:
        return ""
    return KINDS.get(words[words.index("-m") + 1], "")


def model(weights: np.ndarray) -> bytes:
    """An ONNX file with one matrix."""
    from onnx import TensorProto, helper, numpy_helper

    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in zip("xy", SHAPE, strict=True)
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "one", [x], [y], [numpy_helper.from_array(weights, "w")]
    )
    made: bytes = helper.make_model(graph).SerializeToString(deterministic=True)
    return made


def run() -> Result:
    rng = np.random.default_rng(1)
    before = rng.normal(0, 0.05, SHAPE).astype(np.float32)
    files = [model(before), model(before + rng.normal(0, 1e-4, SHAPE).astype(np.float32))]
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        site = Site(folder)
        try:
            site.start()
            parts = _measure(site, files)
        finally:
            site.close()
        (folder / "base.onnx").write_bytes(files[0])
        (folder / "target.onnx").write_bytes(files[1])
        costs = measure(Pair(name="one tensor", base=folder / "base.onnx", target=folder / "target.onnx"))
    over = costs[OURS].apply_mb - imported_mb()
    others = {tool: cost.apply_mb for tool, cost in costs.items() if tool != OURS}
    told = "; ".join(
        f"{part}: " + ", ".join(f"{kind} {peak:.0f}" for kind, peak in sorted(mb.items())) for part, mb in parts.items()
    )
    return Result(
        bench="update_memory",
        value=max(peak for mb in parts.values() for kind, peak in mb.items() if kind == "courier"),
        unit="MB",
        n=len(parts),
        note=(
            f"the courier at its peak; {told}; applying a delta of a tensor of {TENSOR_MB:.1f} MB takes {over:.1f} MB over what is imported "
            f"(bound: {BOUND_MB:g} over the tensor, so {BOUND_MB + TENSOR_MB:.1f}); whole process {costs[OURS].apply_mb:.0f} MB, "
            + ", ".join(f"{tool} {mb:.0f}" for tool, mb in others.items())
        ),
    )


def _measure(site: Site, files: list[bytes]) -> dict[str, dict[str, float]]:
    """Peaks by part and kind of process."""
    supervisor = _supervisor()
    one = site.publish(1, {"weights.onnx": files[0]})
    with _part(supervisor) as by_whole:
        site.assign(one)
    two = site.publish(2, {"weights.onnx": files[1]})
    site.delta_to(2, MAKING_S)
    with _part(supervisor) as by_delta:
        _, took = site.update(two)
    if not took.get("patched_bytes"):
        raise RuntimeError(f"no delta was used: {took}")
    with _part(supervisor) as back:
        ask_agent(site.fleet.device_folder(DEVICE) / "state" / "run" / "control.sock", "POST", "/skerry/v1/revert")
        site.fleet.wait("the way back", lambda: site.fleet.status(DEVICE)["running"]["gas"]["digest"] == one, 60.0)
    return {"whole file": by_whole, "delta": by_delta, "revert": back}


@contextmanager
def _part(supervisor: int) -> Iterator[dict[str, float]]:
    peaks = Peaks(supervisor)
    try:
        yield peaks.mb
    finally:
        peaks.stop()


def _supervisor() -> int:
    """The agent below this process."""
    found = [child.pid for child in psutil.Process().children(recursive=True) if kind_of(child.pid) == "supervisor"]
    if len(found) != 1:
        raise RuntimeError(f"wanted one agent below this process, found {len(found)}")
    return found[0]
