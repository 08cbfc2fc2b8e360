"""Connections on real sockets, answered by a handler that the test holds in its hand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from skerry_agent.worker import http1
from skerry_agent.worker.server import Server


class Held:
    """Answers at once with the request's path, or, for /wait, when told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[bytes, Callable[[bytes], None]]] = []

    def handle(self, request: http1.Request, done: Callable[[bytes], None], asker: object) -> bytes | None:
        if request.head.path.startswith(b"/wait"):
            self.waiting.append((request.head.path, done))
            return None
        return http1.reply(200, request.head.path, close=not request.head.keep_alive)


def serve(act: Callable[[Server, Held, int], Awaitable[None]], *, partial_s: float = 20.0) -> None:
    async def run() -> None:
        held = Held()
        server = Server(held, partial_s=partial_s)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server.listen(listener)
        try:
            await asyncio.wait_for(act(server, held, port), 60)
        finally:
            server.close()
            async with asyncio.timeout(30):
                while not server.empty:
                    await asyncio.sleep(0.001)

    asyncio.run(run())


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    return int(head.split(b" ")[1]), await reader.readexactly(length)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


def test_a_half_sent_request_gets_408_at_its_deadline_and_an_idle_connection_stays() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        idle_in, idle_out = await asyncio.open_connection("127.0.0.1", port)
        idle_out.write(get("/before"))
        assert await read_reply(idle_in) == (200, b"/before")
        for part in (b"G", b"GET / HTTP/1.1\r\nHost", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n12"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for i in range(len(part)):
                # A client that trickles gains nothing: the clock runs from the first byte.
                writer.write(part[i : i + 1])
                await asyncio.sleep(0.002)
            status, body = await read_reply(reader)
            assert (status, body[:10]) == (408, b'{"error":"')
            assert await reader.read() == b""
            writer.close()
        idle_out.write(get("/after"))
        assert await read_reply(idle_in) == (200, b"/after")
        idle_out.close()

    serve(act, partial_s=0.3)


def test_a_request_in_work_holds_back_the_ones_behind_it() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/wait-1") + get("/a") + get("/wait-2") + get("/b"))
        while not held.waiting:
            await asyncio.sleep(0.001)
        other_in, other_out = await asyncio.open_connection("127.0.0.1", port)
        other_out.write(get("/other"))
        assert await read_reply(other_in) == (200, b"/other")
        assert [path for path, _ in held.waiting] == [b"/wait-1"]
        held.waiting.pop()[1](http1.reply(200, b"one"))
        assert [await read_reply(reader) for _ in range(2)] == [(200, b"one"), (200, b"/a")]
        while not held.waiting:
            await asyncio.sleep(0.001)
        held.waiting.pop()[1](http1.reply(200, b"two"))
        assert [await read_reply(reader) for _ in range(2)] == [(200, b"two"), (200, b"/b")]
        writer.close()
        other_out.close()

    serve(act)


def test_a_client_that_leaves_while_its_request_is_in_work_harms_nobody() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/wait"))
        while not held.waiting:
            await asyncio.sleep(0.001)
        writer.transport.abort()
        await asyncio.sleep(0.05)
        held.waiting.pop()[1](http1.reply(200, b"late"))
        while server.connections:
            await asyncio.sleep(0.001)

    serve(act)


def test_read_ahead_behind_a_request_in_work_is_bounded() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, get("/wait"))
        while not held.waiting:
            await asyncio.sleep(0.001)
        sent = 0
        try:
            while sent < 64 << 20:
                sent += await asyncio.wait_for(loop.sock_sendall(sock, get("/x") * 5000), 1.0) or 5000 * len(get("/x"))
        except TimeoutError:
            pass
        (connection,) = server.connections
        assert sent < 64 << 20
        assert len(connection.unanswered()) < 4 << 20
        sock.close()

    serve(act)


def test_a_client_of_http_1_0_is_answered_and_its_connection_ends() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /old HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n")
        assert await read_reply(reader) == (200, b"/old")
        assert await reader.read() == b""
        writer.close()

    serve(act)
