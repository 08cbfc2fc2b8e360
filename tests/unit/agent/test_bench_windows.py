"""The windows that ``window_bytes`` weighs: each step is one that a server takes, and has what its name says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from skerry_contract import wire

from tests.bench import gas_windows


def test_what_a_device_adds_to_a_window_is_weighed_as_a_server_would_take_it(tmp_path: Path) -> None:
    x = np.random.default_rng(5).normal(size=(gas_windows.ROWS, gas_windows.FEATURES)).astype(np.float32)
    window = gas_windows.counted(tmp_path, x).window(x)
    steps = gas_windows.of_a_device(window, tmp_path)
    sizes = [len(wire.encode(whole)) for _, whole in steps]
    # What was timed here is as wide as the machine is busy, so the drawn times stand in for it on both sides.
    drawn = steps[0][1].latency
    own = msgspec.structs.replace(window.latency, total=drawn.total, infer=drawn.infer)
    assert len(wire.encode(msgspec.structs.replace(window, latency=own))) < sizes[0] < sizes[1] < sizes[2] < sizes[3]
    for _, whole in steps:
        assert wire.decode_window(wire.encode(whole)) == whole
    last = steps[-1][1]
    assert (last.features, last.counts, last.key) == (window.features, window.counts, window.key)
    for part in (last.latency.total, last.latency.queue, last.latency.transform, last.latency.infer):
        assert part.zero == 0, "none is empty"
        assert sum(part.counts) == gas_windows.ROWS
    assert set(last.resources) > set(window.resources)
    assert last.labels is not None
    assert len(last.labels.lags) == gas_windows.CLASSES
    assert set(last.attributions) == set(last.features)
