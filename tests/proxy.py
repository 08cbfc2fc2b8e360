"""A machine in the middle that holds the server's own certificate: it reads every request, and forwards, holds back or changes what it likes."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.rig_server import Answer, ServerRig

_NOT_FORWARDED = {"transfer-encoding", "connection", "content-length", "content-encoding", "date", "server"}


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    body: bytes


class Proxy:
    """Between devices and one server, on a port of its own.

    Attributes:
        seen: every request, in its order; held: says of a request whether it is not forwarded (503 is answered).
        date: put in place of the server's ``Date``.
    """

    def __init__(self, server: ServerRig) -> None:
        self._server = server
        self.seen: list[Recorded] = []
        self.held: Callable[[Recorded], bool] = lambda _request: False
        self.date = ""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                asked = Recorded(method=self.command, path=self.path, headers=dict(self.headers.items()), body=body)
                proxy.seen.append(asked)
                answer = Answer(503, {}, b"{}") if proxy.held(asked) else proxy.send(asked)
                # It calls itself the server, so that everything else comes through it too.
                is_device = asked.path.startswith("/device/")
                data = answer.data.replace(server.url.encode(), proxy.url.encode()) if is_device else answer.data
                self.send_response_only(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in _NOT_FORWARDED:
                        self.send_header(name, value)
                self.send_header("Date", proxy.date or answer.headers.get("Date", self.date_time_string()))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._forward()

            def do_POST(self) -> None:
                self._forward()

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # a client that hangs up

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        folder = server.data / "ca"
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._http = Quiet(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def send(self, request: Recorded, **changed: Any) -> Answer:
        """Sends a request to the server, now, with changes: ``method``, ``path``, ``body`` or further headers."""
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in ("host", "content-length")
        }
        return self._server.ask(
            changed.pop("method", request.method),
            changed.pop("path", request.path),
            data=changed.pop("body", request.body) or None,
            headers={**headers, **changed},
            token="",
        )

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
