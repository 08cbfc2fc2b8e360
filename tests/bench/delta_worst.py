"""Bytes of a delta beside the smallest of five others' on the same pair: the worst pair, of released models and of fine-tunes.

256 bytes are taken off ours: a pair of equal files would compare what the headers hold.
"""

from __future__ import annotations

from tests.bench.delta_measuring import OURS, SLACK_BYTES, fine_tunes, measure, releases, smallest_peer
from tests.bench.result import Result


def run() -> Result:
    ratios = {}
    for pair in (*releases(), *fine_tunes()):
        costs = measure(pair)
        ours, theirs = costs[OURS].size_bytes, smallest_peer(costs)
        ratios[pair.name] = (max(ours - SLACK_BYTES, 0) / theirs, ours, theirs)
    worst = max(ratios, key=lambda name: ratios[name][0])
    return Result(
        bench="delta_worst",
        value=ratios[worst][0],
        unit="of the smallest peer",
        peer="zstd -19, zstd --patch-from, bsdiff4, detools, xdelta3: the smallest on each pair",
        peer_value=1.0,
        n=len(ratios),
        note=f"worst: {worst}; " + "; ".join(f"{name} {ours}/{theirs}" for name, (_, ours, theirs) in ratios.items()),
    )
