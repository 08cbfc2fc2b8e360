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

    def begin(self, head: http1.Head, asker: object) -> bytes | int:
        if head.path.startswith(b"/refused"):
            return http1.reply(401, head.path, close=not head.keep_alive)
        return 64 << 20

    def space(self, refusal: bytes, done: Callable[[bytes], None], asker: object) -> bytes | None:
        return refusal


def serve(act: Callable[[Server, Held, int], Awaitable[None]], *, partial_s: float = 20.0, **bounds: int) -> None:
    async def run() -> None:
        held = Held()
        server = Server(held, partial_s=partial_s, **bounds)
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


def post(path: str, size: int, sent: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), size, sent)


def test_the_body_of_a_refused_request_is_dropped_as_it_comes_and_its_connection_goes_on() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(post("/refused", 500_000, b"x" * 200_000))
            await asyncio.sleep(0.05)
            (connection,) = server.connections
            assert (server.held, connection.at_boundary) == (0, False)
            # What is behind the body is the next request.
            writer.write(b"GET / HTTP/1.1\r\n" + b"x" * 299_984 + get("/next"))
            assert await read_reply(reader) == (401, b"/refused")
            assert await read_reply(reader) == (200, b"/next")
        writer.close()

    serve(act)


def test_a_refused_request_with_a_long_body_is_answered_before_it_and_closed() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        for head in (
            post("/refused", 60_000_000),
            b"POST /refused HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + b"5\r\nabcde\r\n")
            said = await reader.readuntil(b"\r\n\r\n")
            assert said.startswith(b"HTTP/1.1 401 ")
            assert b"\r\nConnection: close\r\n" in said
            assert await reader.read() == b"/refused"
            assert server.held == 0
            writer.close()

    serve(act)


def test_of_unfinished_requests_that_are_too_much_together_the_heaviest_is_turned_away() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        whole, sent = (100_000, 600_000, 400_000), (50_000, 500_000, 350_000)
        for i in range(3):
            before = server.held
            streams[i][1].write(post("/body", whole[i], b"x" * sent[i]))
            while before == server.held:
                await asyncio.sleep(0.001)
            assert server.held <= 800_000
        said = await streams[1][0].readuntil(b"\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in said
        for i in (0, 2):
            reader, writer = streams[i]
            writer.write(b"x" * (whole[i] - sent[i]))
            assert await read_reply(reader) == (200, b"/body")
        assert server.held == 0
        for _, writer in streams:
            writer.close()

    serve(act, max_held_bytes=800_000)


def test_whatever_a_client_does_is_work_of_its_own() -> None:
    async def act(server: Server, held: Held, port: int) -> None:
        for said in (
            b"",
            b"GET /v2 HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01",
            b"\r\n\r\n",
            b"PO",
            post("/refused", 9_000_000),
        ):
            before = server.work
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            while server.work - before < 1 + bool(said):
                await asyncio.sleep(0.001)
            writer.close()

    serve(act)
