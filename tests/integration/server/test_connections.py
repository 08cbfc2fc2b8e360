"""Connections that do nothing, or do it slowly, keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from skerry_server.listener import Listener, Patience

from tests.rig_server import ServerRig

PLACES, FIRST_S = 20, 2.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    """A server with few places and little patience, started with a low soft limit of open files."""
    settings = {"LIMITS_CONNECTIONS": str(PLACES), "LIMITS_FIRST_REQUEST_S": str(FIRST_S), "LIMITS_STALL_S": "1"}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        found = ServerRig(tmp_path_factory.mktemp("server") / "data", settings).start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield found
    found.close()


def address(rig: ServerRig) -> tuple[str, int]:
    host, _, port = rig.url.removeprefix("https://").rpartition(":")
    return host, int(port)


def ended(link: socket.socket, timeout_s: float) -> bool:
    """Whether the other side ends the connection in time."""
    link.settimeout(timeout_s)
    try:
        return link.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one(rig: ServerRig) -> None:
    assert rig.process is not None
    soft, hard = resource.prlimit(rig.process.pid, resource.RLIMIT_NOFILE)
    assert 300 < soft == min(hard, 1 << 20)


def test_silent_connections_beyond_every_place_keep_nobody_out(rig: ServerRig) -> None:
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(socket.create_connection(address(rig))) for _ in range(5 * PLACES)]
        for _ in range(5):
            assert rig.ask("GET", "/healthz", token="").status == 200
        assert rig.ask("GET", "/readyz", token="").json()["ready"]
        assert ended(silent[0], 5), "the one that was silent longest lost its place"
        assert all(ended(link, FIRST_S + 5) for link in silent), "and none of them keeps it"


def test_a_tls_connection_without_a_request_is_ended(rig: ServerRig) -> None:
    context = ssl.create_default_context(cafile=str(rig.ca_file))
    with socket.create_connection(address(rig)) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as link:
        begun = time.monotonic()
        link.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")  # and never the end of the head
        assert ended(link, FIRST_S + 10)
        assert time.monotonic() - begun > FIRST_S / 2


def test_a_body_that_does_not_come_is_given_up(rig: ServerRig) -> None:
    context = ssl.create_default_context(cafile=str(rig.ca_file))
    with socket.create_connection(address(rig)) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as link:
        link.sendall(b"POST /device/v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        link.settimeout(15)
        answer = b""
        while b"}}" not in answer:
            piece = link.recv(4096)
            assert piece, answer
            answer += piece
    assert answer.split(b" ")[1] == b"408", answer
    assert b'"too_slow"' in answer


def test_a_body_that_drips_has_an_end_too(rig: ServerRig) -> None:
    context = ssl.create_default_context(cafile=str(rig.ca_file))
    with socket.create_connection(address(rig)) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as link:
        link.sendall(b"POST /device/v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        link.settimeout(0.3)
        deadline = time.monotonic() + 20
        answer = b""
        while not answer and time.monotonic() < deadline:
            link.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = link.recv(4096)
    assert answer.split(b" ")[1] == b"408", answer


def test_a_connection_that_stays_in_use_is_kept(rig: ServerRig) -> None:
    """More than ``first_request_s`` passes between its requests: they are what an honest device does."""
    context = ssl.create_default_context(cafile=str(rig.ca_file))
    with contextlib.closing(http.client.HTTPSConnection(*address(rig), context=context, timeout=20)) as link:
        link.connect()
        own = link.sock.getsockname()
        for _ in range(3):
            link.request("GET", "/healthz")
            assert link.getresponse().read() == b'{"status":"ok"}'
            time.sleep(FIRST_S * 0.8)
        assert link.sock is not None and link.sock.getsockname() == own


@contextlib.contextmanager
def listening(app: Any, loop: str, patience: Patience) -> Iterator[tuple[Listener, tuple[str, int]]]:
    """A listener without TLS over an application, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        made = Listener(
            uvicorn.Config(app, log_config=None, proxy_headers=False, ws="none", lifespan="off", loop=loop), patience
        )  # type: ignore[arg-type]
        thread = threading.Thread(target=made.run, args=([sock],), daemon=True)
        where = sock.getsockname()
        thread.start()
        try:
            yield made, where
        finally:
            made.should_exit = True
            thread.join(10)


def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_requests_under_way_are_never_dropped_for_a_newcomer_that_then_gets_its_turn(loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop", reason="the extra uvloop is not installed")
    go_on = threading.Event()
    begun: list[str] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        begun.append(scope["path"])
        while scope["path"] == "/slow" and not go_on.is_set():
            await asyncio.sleep(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with listening(app, loop, Patience(most=2, first_s=30)) as (made, where), contextlib.ExitStack() as held:
        slow = [held.enter_context(socket.create_connection(where)) for _ in range(2)]
        for link in slow:
            link.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: begun == ["/slow"] * 2)
        late = held.enter_context(socket.create_connection(where))
        late.sendall(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.6)
        assert begun == ["/slow"] * 2, "it waits"
        go_on.set()
        for link in (*slow, late):
            link.settimeout(10)
            assert b"200" in link.recv(4096)
        assert made.dropped == 1, "one idle by then made room"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_answer_that_nobody_reads_is_given_up(loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop", reason="the extra uvloop is not installed")
    over = threading.Event()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        finally:
            over.set()

    with listening(app, loop, Patience(most=5, stall_s=0.5)) as (made, where), socket.create_connection(where) as link:
        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert over.wait(15)
        until(lambda: made.dropped == 1)
