"""Bytes of a delta beside the smallest of five others', where a model was trained further at a low rate: the worst such pair."""

from __future__ import annotations

from tests.bench.delta_measuring import OURS, fine_tunes, measure, smallest_peer
from tests.bench.finetunes import LOW_RATE
from tests.bench.result import Result


def run() -> Result:
    ratios = {}
    for pair in fine_tunes():
        costs = measure(pair)
        ratios[pair.name] = costs[OURS].size_bytes / smallest_peer(costs)
    return Result(
        bench="delta_finetune",
        value=max(ratios[name] for name in LOW_RATE),
        unit="of the smallest peer",
        peer="zstd -19, zstd --patch-from, bsdiff4, detools, xdelta3: the smallest on each pair",
        peer_value=1.0,
        n=len(LOW_RATE),
        note="; ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()),
    )
