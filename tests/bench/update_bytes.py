"""Bytes of an update by delta over bytes of the same update by whole files, everything real on loopback.

A server that makes the deltas, an agent behind a relay that counts. Each of the fine-tunes of ``finetunes`` is an update: the device
has the old model and is given the new one, as a file beside the small classifier that answers. What the relay carries has TLS,
metadata and manifest in it; the same update by whole files would carry the files' size instead of the deltas'.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bench import finetunes
from tests.bench.result import Result, scratch
from tests.updating_site import Site

PAIRS = ("last-layer", "tenth-rate-adam", "trees-grown")


def run() -> Result:
    pairs = {name: (old, new) for name, old, new in finetunes.pairs(scratch() / "finetunes") if name in PAIRS}
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
        site = Site(Path(folder))
        try:
            site.start()
            return _measure(site, pairs)
        finally:
            site.close()


def _measure(site: Site, pairs: dict[str, tuple[Path, Path]]) -> Result:
    carried = whole = 0
    told = []
    for turn, name in enumerate(PAIRS):
        old, new = (path.read_bytes() for path in pairs[name])
        before = site.publish(2 * turn + 1, {"weights.onnx": old})
        if turn:
            site.update(before)
        else:
            site.assign(before)
        after = site.publish(2 * turn + 2, {"weights.onnx": new})
        row = site.delta_to(2 * turn + 2)
        came, took = site.update(after)
        by_whole = came - took["bytes"] + took["size_bytes"]
        carried, whole = carried + came, whole + by_whole
        told.append(
            f"{name} {took['bytes'] / 1000:.1f} of {took['size_bytes'] / 1000:.1f} kB ({came / 1000:.1f} of {by_whole / 1000:.1f} carried; "
            f"delta {row['state']} in {row['took_s'] or 0:.1f} s)"
        )
    return Result(
        bench="update_bytes", value=carried / 1000, unit="kB", n=len(PAIRS), peer="whole files", peer_value=whole / 1000,
        note="; ".join(told),
    )  # fmt: skip
