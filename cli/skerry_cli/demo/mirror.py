"""A hostile mirror of the update repository for one device, in a process of its own.

It stands between the device and the server, answers with the server's own certificate as a thief of the server would, and passes
everything through but what lies in its overlay folder: a file there is served instead of the repository's file of the same path. Every such answer is one line in its
log. What a device makes of it is the point of the demo's last step.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

PREFIX = "/repository/"
_TIMEOUT_S = 30.0
_MAX_BODY = 1 << 20
_NOT_PASSED = frozenset({"host", "connection", "transfer-encoding", "content-length", "keep-alive"})


class Mirror(ThreadingHTTPServer):
    """See the module.

    Args:
        upstream: ``https://host:port`` of the real server; overlay: folder of the files to serve instead.
    """

    daemon_threads = True

    def __init__(self, *, upstream: str, ca: Path, certificate: Path, key: Path, overlay: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        parts = urlsplit(upstream)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 443
        self.client_context = ssl.create_default_context(cafile=str(ca))
        self.overlay = overlay
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S
    server: Mirror

    def do_POST(self) -> None:
        self._pass_through("POST")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        forged = self._overlay(path)
        if forged is None:
            self._pass_through("GET")
            return
        print(json.dumps({"forged": path}), file=sys.stderr, flush=True)  # noqa: T201 - the log
        start = self._range_start(len(forged))
        if start:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(forged) - 1}/{len(forged)}")
        else:
            self.send_response(200)
        self._finish(forged[start:])

    def _overlay(self, path: str) -> bytes | None:
        if not path.startswith(PREFIX):
            return None
        inner = PurePosixPath(path.removeprefix(PREFIX))
        if inner.is_absolute() or ".." in inner.parts:
            return None
        with contextlib.suppress(OSError):
            return (self.server.overlay / inner).read_bytes()
        return None

    def _range_start(self, length: int) -> int:
        unit, _, span = self.headers.get("Range", "").partition("=")
        start = span.partition("-")[0]
        return int(start) if unit == "bytes" and start.isdigit() and int(start) < length else 0

    def _pass_through(self, method: str) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > _MAX_BODY:
            self.send_response(413)
            self._finish(b"")
            return
        sent = self.rfile.read(int(length)) if int(length) else None
        connection = http.client.HTTPSConnection(
            self.server.host, self.server.port, timeout=_TIMEOUT_S, context=self.server.client_context
        )
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_PASSED}
            connection.request(method, self.path, body=sent, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.send_response(502)
            self._finish(str(error).encode())
            return
        finally:
            connection.close()
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in _NOT_PASSED:
                self.send_header(name, value)
        self._finish(body)

    def _finish(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing: only forged answers are logged."""


def main() -> None:
    """The process's entry; prints its port as one JSON line."""
    parser = argparse.ArgumentParser(prog="skerry-demo-mirror")
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--overlay", type=Path, required=True)
    mirror = Mirror(**vars(parser.parse_args()))
    print(json.dumps({"port": mirror.server_address[1]}), flush=True)  # noqa: T201 - the answer
    with contextlib.suppress(KeyboardInterrupt):
        mirror.serve_forever(poll_interval=0.5)


if __name__ == "__main__":
    main()
