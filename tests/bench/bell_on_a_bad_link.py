"""``bell_to_confirmed`` where a device's link loses 2 % of all packets and delays each by 300 ms, each way; beside it the same on loopback.

Server, agent and application are those of ``bell_to_confirmed``; between agent and server, for HTTPS and MQTT, lies a link of
``bad_link``, over which the kernel's TCP goes. The application asks its agent on the device, so not over the link. Told beside it is
the milder reading, in which a packet and its answer take 300 ms together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.bench import bell_to_confirmed
from tests.bench.bad_link import BadLink
from tests.bench.result import Result, median

ROUNDS = 5
DELAY_S, LOSS = 0.3, 0.02
MOST_S = 600.0


def run() -> Result:
    near, near_failed = bell_to_confirmed.measure(ROUNDS)
    mild, mild_failed, _ = measure(DELAY_S / 2)
    bad, bad_failed, how = measure(DELAY_S)
    return Result(
        bench="bell_on_a_bad_link",
        value=median(bad),
        unit="s",
        n=len(bad),
        peer="loopback, in the same run",
        peer_value=median(near),
        note=(
            f"min {min(bad):.1f}, max {max(bad):.1f}; loopback max {max(near):.1f}; {DELAY_S * 1000:g} ms and {LOSS * 100:g} % each way; {how}; "
            f"{DELAY_S * 500:g} ms each way: median {median(mild):.1f}, max {max(mild):.1f}; {bell_to_confirmed.MODEL_BYTES / 1e6:g} MB, "
            f"{near_failed + mild_failed + bad_failed} failed requests"
        ),
    )


def measure(delay_s: float) -> tuple[list[float], int, str]:
    """Seconds of each round, failed requests, and what made the link and how bad it was."""
    told = ""

    @contextmanager
    def between(ports: Sequence[int]) -> Iterator[Sequence[int]]:
        nonlocal told
        link = BadLink(ports, delay_s=delay_s, loss=LOSS)
        try:
            yield link.ports
        finally:
            seen, dropped = link.close()
            told = f"by {link.by}" + (f"; {dropped} of {seen} packets dropped" if seen else "")

    took, failed = bell_to_confirmed.measure(ROUNDS, between, MOST_S)
    return took, failed, told
