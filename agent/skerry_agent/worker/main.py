"""A worker process from its descriptors to its exit status."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable

from skerry_agent.worker.process import Worker


def main() -> int:
    """Runs a worker on the inherited descriptors; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m skerry_agent.worker", description="started by the supervisor")
    parser.add_argument("--control-fd", type=int, required=True, help="AF_UNIX SOCK_SEQPACKET socket to the supervisor")
    parser.add_argument("--listen-fd", type=int, action="append", required=True, help="listening socket")
    options = parser.parse_args()
    logging.basicConfig(
        level=os.environ.get("SKERRY_LOG_LEVEL", "INFO"),
        stream=sys.stderr,
        format="%(asctime)s level=%(levelname)s at=%(name)s %(message)s",
    )

    async def serve() -> int:
        control = socket.socket(fileno=options.control_fd)
        listeners = [socket.socket(fileno=number) for number in options.listen_fd]
        return await Worker(control, listeners).run()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if os.environ.get("SKERRY_NO_UVLOOP"):
        return None
    try:
        import uvloop
    except ImportError:
        # Slower by a fifth, otherwise the same; there are no wheels for some of the smallest boards.
        return None
    return uvloop.new_event_loop
