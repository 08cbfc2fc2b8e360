"""``python -m tests.bench.http_load PORT PATH BODY-FILE CLIENTS``: keep-alive clients of one server, a thread each.

Each line on stdin is a number of seconds to ask without a pause; the answer is a line of JSON: ``n``, ``rate`` per second, ``p99_ms``.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from tests.bench.http_client import Client
from tests.bench.result import percentile


def main(port: int, path: str, body: bytes, clients: int) -> None:
    """Serves stdin until it ends."""
    connections = [Client(port, path, body) for _ in range(clients)]
    for line in sys.stdin:
        seconds = float(line)
        took: list[list[float]] = [[] for _ in connections]
        threads = [
            threading.Thread(target=_ask, args=(client, seconds, times))
            for client, times in zip(connections, took, strict=True)
        ]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        times = [one for times in took for one in times]
        rate = len(times) / (time.monotonic() - begin)
        print(json.dumps({"n": len(times), "rate": rate, "p99_ms": percentile(times, 0.99)}), flush=True)


def _ask(client: Client, seconds: float, took: list[float]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        took += client.block(10)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_bytes(), int(sys.argv[4]))
