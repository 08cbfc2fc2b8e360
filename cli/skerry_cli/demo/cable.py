"""The network cables of the devices: TCP relays in a process of their own that can be cut and mended, each by itself.

Each end of a cable is ``listen port -> host:port``. Cut means: every connection is closed at once and new ones are refused, as when
the router is gone. Commands come as lines on stdin (``cut <device>``, ``mend <device>``); each is answered by one line on stdout.
When stdin ends the relays go on as they are: a kept fleet keeps its cables.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys

_CHUNK = 1 << 16


class Cable:
    """Relays between its ends while it is not cut."""

    def __init__(self, ends: list[tuple[str, int]]) -> None:
        self._ends = ends
        self._ports: list[int] = [0] * len(ends)
        self._servers: list[asyncio.Server] = []
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def ports(self) -> list[int]:
        """Local ports, one per end; they stay the same over cuts."""
        return list(self._ports)

    async def mend(self) -> None:
        """Listens (again) on its ports."""
        if self._servers:
            return
        for i, (host, port) in enumerate(self._ends):
            server = await asyncio.start_server(
                lambda r, w, h=host, p=port: self._relay(r, w, h, p),  # type: ignore[misc]
                "127.0.0.1",
                self._ports[i],
            )
            self._ports[i] = server.sockets[0].getsockname()[1]
            self._servers.append(server)

    async def cut(self) -> None:
        """Closes every connection and refuses new ones."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(far_writer)
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        finally:
            for end in (writer, far_writer):
                end.transport.abort()
                self._writers.discard(end)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def run(devices: list[str], ends: list[tuple[str, int]]) -> None:
    """Obeys stdin until it ends, then relays for ever."""
    cables = {device: Cable(ends) for device in devices}
    for cable in cables.values():
        await cable.mend()
    ports = {device: cable.ports for device, cable in cables.items()}
    print(json.dumps({"ports": ports}), flush=True)  # noqa: T201 - the answer
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, _, device = line.strip().partition(" ")
        if command == "cut":
            await cables[device].cut()
        elif command == "mend":
            await cables[device].mend()
        print(json.dumps({"did": line.strip()}), flush=True)  # noqa: T201 - the answer
    await asyncio.Event().wait()


def main() -> None:
    """The process's entry: ``cable.py --device gas-01 --device gas-02 host:port ...``."""
    parser = argparse.ArgumentParser(prog="skerry-demo-cable")
    parser.add_argument("end", nargs="+", help="host:port behind the cable")
    parser.add_argument("--device", action="append", required=True, help="one cable for each")
    arguments = parser.parse_args()
    ends = []
    for text in arguments.end:
        host, _, port = text.rpartition(":")
        ends.append((host, int(port)))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(arguments.device, ends))


if __name__ == "__main__":
    main()
