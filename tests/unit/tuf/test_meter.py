"""How fast a download may come: one bound for all that a run brings."""

from __future__ import annotations

import time

from skerry_agent.courier.acquiring import Wanted
from skerry_agent.courier.meter import Meter
from skerry_agent.courier.requests import Limits
from skerry_agent.courier.watch import Watch


def test_the_bound_holds_over_all_files_and_deltas_of_a_run_together() -> None:
    files = [Wanted(name=f"file-{n}", size=100_000, hashes={"sha256": "0" * 64}) for n in range(3)]
    began = time.monotonic()
    with Watch(60.0) as overdue:
        meter = Meter(lambda _: None, overdue, max_bytes_s=400_000, limits=Limits())
        meter.begin(files)
        for file in files:
            # As a delta comes first, in vain, and then the file.
            meter.came(file, 50_000, 50_000)
            for done in range(20_000, file.size + 1, 20_000):
                meter.came(file, done, 20_000)
            meter.finished(file)
    assert meter.received == 450_000
    # A quarter of a second's worth may come at once.
    assert time.monotonic() - began > 450_000 / 400_000 - 0.3
