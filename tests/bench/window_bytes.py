"""Bytes of a window on the wire: counts, moments, latency and answers of 500 real rows, 32 features with 64 bins each, as one
message of a device, beside whylogs' profile of the same rows. The note says what it grows to with all that a device may add."""

from __future__ import annotations

import tempfile
from pathlib import Path

from skerry_contract import ids, wire

from tests.bench import gas_windows, whylogs_peer
from tests.bench.result import Result, median


def run() -> Result:
    x = gas_windows.readings()
    blocks = [x[i : i + gas_windows.ROWS] for i in range(0, len(x), gas_windows.ROWS)]
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
        device = gas_windows.counted(Path(folder), x)
        windows = [device.window(block) for block in blocks]
        added = [
            (what, _message(wire.encode(whole))) for what, whole in gas_windows.of_a_device(windows[0], Path(folder))
        ]
    messages, bodies = [], []
    for window in windows:
        assert window.features["f0"].moments.n == gas_windows.ROWS
        body = wire.encode(window)
        messages.append(_message(body))
        bodies.append(len(body))
    peer = whylogs_peer.measure(x, gas_windows.latencies())
    return Result(
        bench="window_bytes",
        value=median(messages),
        unit="bytes",
        peer="whylogs 1.6.4 profile, default configuration, as it serializes it",
        peer_value=peer["bytes"],
        n=len(blocks),
        note=(
            f"median message; largest {max(messages)}; before zlib {median(bodies):.0f}; whylogs under zlib -9 {peer['packed']:.0f}; "
            f"{gas_windows.ROWS} rows of {gas_windows.FEATURES} features, {gas_windows.BINS} bins, queue and transforms "
            f"empty; as a device adds to it: {', '.join(f'{what} {n}' for what, n in added)}; budget 2048 and 1/20"
        ),
    )


def _message(body: bytes) -> int:
    batch = wire.Batch(epoch=ids.epoch("1" * 32), records=(wire.Record(seq=1, kind="window", body=body),))
    return len(wire.encode_batch(batch))
