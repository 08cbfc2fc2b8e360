"""What a burst does to those who are answered: a 5 ms model and one of some 100 us, asked by 8 to 64 clients that never pause.

Each client keeps one connection and asks again the moment it has its reply, refused or not: the worst there is. ``most`` is
``limits.max_inflight``, 8: what the device is expected to bear. Beside it stands the same worker under just that load.
"""

from __future__ import annotations

import json
import select
import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import models
from tests.bench.result import Result, percentile
from tests.integration.worker.rig import Rig

MOST = 8
CLIENTS = (8, 16, 32, 64)
SECONDS, WARM_S = 4.0, 0.5


class Burst(NamedTuple):
    """Milliseconds of the answered, how many were shed, and the waits, in ms, that those were told."""

    took: list[float]
    shed: int
    told: list[int]

    @property
    def p99(self) -> float:
        return percentile(self.took, 0.99)


def run() -> Result:
    found: dict[tuple[str, int, int], Burst] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.build_bundle(folder / "slow", model="slow", kind="slow")
        models.build_bundle(
            folder / "quick", model="quick", n_features=200, classes=100, n_golden=100, minimum_recall=0.0
        )
        x = {"slow": models.rows(1)[0], "quick": models.rows(1, 200, 100)[0]}
        for most in (MOST, 64):
            rings = folder / str(most)
            rings.mkdir()
            with Rig(rings) as rig:
                served = [rig.served(folder / model, name=model) for model in ("slow", "quick")]
                worker = rig.start(*served, max_inflight=most, health_interval_s=5.0)
                for model in ("slow", "quick"):
                    for clients in CLIENTS:
                        found[model, most, clients] = burst(rig.port, model, x[model].tolist(), clients)
                rig.flush(worker)
                answered = sum(len(b.took) for key, b in found.items() if key[1] == most)
                if rig.total().ok < answered:
                    raise RuntimeError(f"{answered} answered, {rig.total().ok} counted")
    value, alone = found["slow", MOST, 64].p99, found["slow", MOST, MOST].p99
    return Result(
        bench="overload",
        value=value,
        unit="ms",
        peer=f"the same with {MOST} clients",
        peer_value=alone,
        n=len(found["slow", MOST, 64].took),
        note=f"p99 of the answered, 5 ms model, 64 clients that never pause, max_inflight {MOST}; {_table(found)}",
    )


def _table(found: dict[tuple[str, int, int], Burst]) -> str:
    return "; ".join(
        f"{model}, max_inflight {most}, {clients} clients: {len(b.took) / SECONDS:.0f}/s answered p50 {percentile(b.took, 0.5):.1f} "
        f"p99 {b.p99:.1f} ms, {b.shed / SECONDS:.0f}/s shed"
        + (f", told {percentile(list(map(float, b.told)), 0.5):.0f} ms" if b.told else "")
        for (model, most, clients), b in found.items()
    )


def burst(port: int, model: str, x: list[list[float]], clients: int) -> Burst:
    """Asks for ``SECONDS``, after warming up."""
    tensor = {"name": "x", "shape": [1, len(x[0])], "datatype": "FP32", "data": x[0]}
    body = json.dumps({"inputs": [tensor]}).encode()
    request = (
        b"POST /v2/models/%b/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (model.encode(), len(body))
        + body
    )
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    sent: dict[int, float] = {}
    part: dict[int, bytes] = {}
    for _ in range(clients):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socks[sock.fileno()] = sock
        poll.register(sock.fileno(), select.EPOLLIN)
    took: list[float] = []
    told: list[int] = []
    shed = 0
    begin = time.perf_counter()
    for number, sock in socks.items():
        sent[number], part[number] = time.perf_counter(), b""
        sock.sendall(request)
    while (now := time.perf_counter()) < begin + WARM_S + SECONDS:
        for number, _ in poll.poll(1.0):
            part[number] += socks[number].recv(1 << 16)
            head, _, rest = part[number].partition(b"\r\n\r\n")
            length = (
                int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) if b"\r\n" in head else 1 << 30
            )
            if len(rest) < length:
                continue
            now = time.perf_counter()
            if now > begin + WARM_S:
                if head.startswith(b"HTTP/1.1 200"):
                    took.append((now - sent[number]) * 1e3)
                elif head.startswith(b"HTTP/1.1 503"):
                    shed += 1
                    told.append(int(head.partition(b"Skerry-Retry-After-Ms: ")[2].split(b"\r\n")[0]))
                else:
                    raise RuntimeError(head[:100].decode())
            part[number] = b""
            sent[number] = time.perf_counter()
            socks[number].sendall(request)
    for sock in socks.values():
        sock.close()
    poll.close()
    return Burst(took, shed, told)
