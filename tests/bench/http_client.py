"""The least client there is: prepared request bytes down a keep-alive socket, and the reply read to its length."""

from __future__ import annotations

import socket
import time
from typing import Self


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int, path: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {"Content-Type": "application/json"}).items()]
        self._request = "\r\n".join([*lines, "", ""]).encode() + body
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self) -> bytes:
        """One request; the reply's body. Raises ``RuntimeError`` for any status but 200."""
        self._sock.sendall(self._request)
        found = self._sock.recv(1 << 18)
        while (end := found.find(b"\r\n\r\n")) < 0:
            found += self._sock.recv(1 << 18)
        head = found[:end].lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(found[:300].decode("utf-8", "replace"))
        at = head.index(b"content-length:") + 15
        length = int(head[at:].split(b"\r\n", 1)[0])
        body = found[end + 4 :]
        if len(body) < length:
            parts = [body]
            left = length - len(body)
            while left:
                data = self._sock.recv(1 << 18)
                if not data:
                    raise RuntimeError("closed in the middle of a reply")
                parts.append(data)
                left -= len(data)
            body = b"".join(parts)
        return body

    def block(self, n: int) -> list[float]:
        """Milliseconds of each of ``n`` requests."""
        found = []
        clock = time.perf_counter_ns
        for _ in range(n):
            begin = clock()
            self.ask()
            found.append((clock() - begin) / 1e6)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
