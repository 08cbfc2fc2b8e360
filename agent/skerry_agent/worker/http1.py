"""HTTP/1.1 messages as values: where a request ends in the bytes read so far, and the bytes of a reply.

``Cutter`` takes bytes and decides; sockets are ``server``'s. It is a framing layer over httptools (llhttp), which judges
the header block; bodies are framed here, so that bytes after a request are never touched: they may belong to another
process after a hand-over. Whatever is ambiguous between two readers (both lengths given, folded headers, bare line feeds)
is refused by llhttp, so a request has one end.

Nothing here knows models. Not done: trailers are read and dropped, requests with ``Upgrade`` are served as if without.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

import httptools

from skerry_agent.worker import coding

MAX_HEAD_BYTES = 16 * 1024
_CACHE_BYTES = 2048
_CACHE_ENTRIES = 256
_MOST_EXTENSIONS = 4096
"""Bytes of one request's chunk extensions together."""

REASONS = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    411: b"Length Required",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    417: b"Expectation Failed",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?")
_DIGITS = re.compile(rb"[0-9]{1,18}")


class Refused(Exception):
    """The bytes are no request that is served here. The connection cannot go on after it."""

    def __init__(self, status: int, message: str, extra: bytes = b"") -> None:
        """Args: ``extra``: header lines of the reply."""
        self.status = status
        self.message = message
        self.extra = extra
        super().__init__(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A header block.

    Attributes:
        path: percent-encoding kept, query dropped.
        length: of the body, bytes; -1 when chunked.
        json_length: ``Inference-Header-Content-Length``, or -1.
        encoding: ``Content-Encoding``, lower case, empty for none.
        kinds: what happened to the request before it was read, bits of ``window.GUARD_KINDS``; never of a head that is kept.
        attempt: ``Skerry-Attempt``: 1 unless the client says that it repeats a request.
        accepts: the content coding that the reply may have, by ``Accept-Encoding``; empty for none.
        authorization: as it came; a secret, which no log may show.
        traceparent: of W3C Trace Context, as it came; empty without.
        client: who asks, where that is counted or has streams; never of a head that is kept.
    """

    method: str
    path: bytes
    keep_alive: bool
    length: int = 0
    has_length: bool = False
    expects: bool = False
    json_length: int = -1
    encoding: bytes = b""
    attempt: int = 1
    kinds: int = 0
    accepts: bytes = b""
    authorization: bytes = field(default=b"", repr=False)
    traceparent: bytes = b""
    client: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request. ``body``: chunks joined, its content encoding (``head.encoding``) not undone; ``size`` counts its bytes as sent."""

    head: Head
    body: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Incomplete:
    """More bytes are needed. ``head`` once the header block is whole; ``wanted``: total size if known, else 0."""

    head: Head | None
    wanted: int = 0


_heads: dict[bytes, Head] = {}


class Cutter:
    """Takes requests off the front of one connection's buffer, remembering how far it had looked.

    The buffer belongs to the caller, who drops ``Request.size`` bytes after each request; until then every byte of an
    unfinished request stays in it, ready to be handed to another process.

    Attributes:
        most: bytes that the body of the request under way may have; as long as nobody says less, ``max_body_bytes``.
    """

    __slots__ = ("_at", "_extensions", "_head", "_parts", "_start", "max_body_bytes", "most")

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._forget()

    def _forget(self) -> None:
        self._head: Head | None = None
        self._start = self._at = self._extensions = 0
        self._parts = bytearray()
        self.most = self.max_body_bytes

    @property
    def joined(self) -> int:
        """Bytes of chunks that are kept joined, beside the buffer."""
        return len(self._parts)

    def cut(self, buffer: bytes | bytearray) -> Request | Incomplete:
        """The first request, or what is known of it.

        Raises:
            Refused: with the status to answer; the connection must then be closed.
        """
        head = self._head
        if head is None:
            head = self._head = self._cut_head(buffer)
            if head is None:
                return Incomplete(None)
        if head.length < 0:
            end = self._join_chunks(buffer)
            if end is None:
                return Incomplete(head)
            body, size = bytes(self._parts), end
        else:
            size = self._start + head.length
            if len(buffer) < size:
                return Incomplete(head, size)
            body = bytes(memoryview(buffer)[self._start : size])
        self._forget()
        return Request(head, body, size)

    def _cut_head(self, buffer: bytes | bytearray) -> Head | None:
        end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES + 4)
        if end < 0:
            if len(buffer) > MAX_HEAD_BYTES:
                raise Refused(431, f"header block: at most {MAX_HEAD_BYTES} bytes")
            if buffer and not _may_begin_request(buffer):
                raise Refused(400, "not an HTTP request")
            return None
        self._start = self._at = end + 4
        block = bytes(buffer[: self._start])
        head = _heads.get(block)
        if head is None:
            head = parse_head(block)
            if len(block) <= _CACHE_BYTES and not head.traceparent:
                # A keep-alive client repeats its header block to the byte; the block alone decides what it means.
                if len(_heads) >= _CACHE_ENTRIES:
                    _heads.clear()
                _heads[block] = head
        if head.length > self.max_body_bytes:
            raise Refused(413, f"body: at most {self.max_body_bytes} bytes, got {head.length}")
        return head

    def _join_chunks(self, buffer: bytes | bytearray) -> int | None:
        """Joins the chunks that are whole; the offset behind the last one and its trailers, or None (RFC 9112, 7.1)."""
        while True:
            line_end = buffer.find(b"\r\n", self._at, self._at + 1024)
            if line_end < 0:
                if len(buffer) - self._at >= 1024:
                    raise Refused(400, "malformed request: chunk size")
                return None
            found = _CHUNK_SIZE.fullmatch(bytes(buffer[self._at : line_end]))
            if found is None:
                raise Refused(400, "malformed request: chunk size")
            size, start = int(found.group(1), 16), line_end + 2
            extensions = self._extensions + line_end - self._at - len(found.group(1))
            if extensions > _MOST_EXTENSIONS:
                # They are read over, but the request is kept until it is whole.
                raise Refused(413, f"chunk extensions: at most {_MOST_EXTENSIONS} bytes")
            if size == 0:
                return _skip_trailers(buffer, start)
            if len(self._parts) + size > self.most:
                raise Refused(413, f"body: at most {self.most} bytes")
            if len(buffer) < start + size + 2:
                return None
            if buffer[start + size : start + size + 2] != b"\r\n":
                raise Refused(400, "malformed request: chunk end")
            self._parts += memoryview(buffer)[start : start + size]
            self._at, self._extensions = start + size + 2, extensions


def parse_head(block: bytes) -> Head:
    """Reads a header block, blank line included.

    Raises:
        Refused: malformed or ambiguous.
    """
    collector = _Collector()
    parser = collector.parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise Refused(400, f"malformed request: {error}") from None
    if not collector.complete:
        raise Refused(400, "malformed request: header block")
    if parser.get_http_version() not in ("1.1", "1.0"):
        raise Refused(505, "wanted HTTP/1.1")
    found = collector.headers
    if parser.get_http_version() == "1.1" and b"host" not in found:
        raise Refused(400, "malformed request: no Host header")
    transfer = found.get(b"transfer-encoding", b"").lower()
    if transfer not in (b"", b"chunked"):
        raise Refused(400, "Transfer-Encoding: wanted chunked")
    if transfer and b"content-length" in found:
        raise Refused(400, "both Content-Length and Transfer-Encoding")
    expect = found.get(b"expect", b"").lower()
    if expect not in (b"", b"100-continue"):
        raise Refused(417, "Expect: wanted 100-continue")
    encoding = found.get(b"content-encoding", b"").lower().replace(b"identity", b"")
    if encoding not in (b"", b"gzip", b"deflate"):
        raise Refused(415, "Content-Encoding: wanted gzip or deflate")
    return Head(
        method=parser.get_method().decode("ascii"),
        path=collector.url.partition(b"?")[0],
        keep_alive=collector.keep_alive,
        length=-1 if transfer else _number(found, b"content-length", 0),
        has_length=bool(transfer) or b"content-length" in found,
        expects=bool(expect) and parser.get_http_version() == "1.1",
        json_length=_number(found, b"inference-header-content-length", -1),
        encoding=encoding,
        attempt=_number(found, b"skerry-attempt", 1),
        accepts=coding.accepted(found[b"accept-encoding"]) if b"accept-encoding" in found else b"",
        authorization=found.get(b"authorization", b""),
        traceparent=found.get(b"traceparent", b""),
    )


def plainly(request: Request, body: bytes) -> Request:
    """The request with its content encoding undone, which made it ``body``."""
    return Request(replace(request.head, encoding=b""), body, request.size)


def reply(
    status: int,
    body: bytes,
    *,
    close: bool = False,
    content_type: bytes = b"application/json",
    extra: bytes = b"",
) -> bytes:
    """The bytes of a reply. ``extra``: whole header lines, each with its line end."""
    return b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b%b\r\n%b" % (
        status,
        REASONS[status],
        content_type,
        len(body),
        extra,
        b"Connection: close\r\n" if close else b"",
        body,
    )


def closing(said: bytes) -> bytes:
    """A reply that says that its connection is closed after it."""
    head, blank, body = said.partition(b"\r\n\r\n")
    return said if b"\r\nConnection: close" in head else b"%b\r\nConnection: close%b%b" % (head, blank, body)


def retry_after(wait_s: float) -> bytes:
    """Header lines that say when to come again: whole seconds, as HTTP has it, and to the millisecond."""
    return b"Retry-After: %d\r\nSkerry-Retry-After-Ms: %d\r\n" % (
        max(1, math.ceil(wait_s)),
        max(1, math.ceil(wait_s * 1e3)),
    )


class _Collector:
    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.complete = False
        self.keep_alive = False
        self.parser: httptools.HttpRequestParser

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        # Two different lengths are llhttp's to refuse; of the others, the list form is the same as repeating.
        self.headers[name] = self.headers[name] + b", " + value if name in self.headers else value

    def on_headers_complete(self) -> None:
        self.complete = True
        # Asked here: once a message is whole, llhttp has forgotten.
        # A client of HTTP/1.0 would have to be told that its connection is kept, in a header of every reply.
        self.keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"


def _number(headers: dict[bytes, bytes], name: bytes, default: int) -> int:
    text = headers.get(name)
    if text is None:
        return default
    if _DIGITS.fullmatch(text.strip()) is None:
        raise Refused(400, f"{name.decode('ascii', 'replace')}: wanted a number")
    return int(text)


def _may_begin_request(buffer: bytes | bytearray) -> bool:
    # A method is upper-case letters; anything else (TLS, binary) is refused before 16 KB of it pile up. Leading empty
    # lines are allowed (RFC 9112, 2.2).
    first = bytes(buffer[:8]).lstrip(b"\r\n").split(b" ")[0]
    return not first or (first.replace(b"-", b"").isalpha() and first.isupper())


def _skip_trailers(buffer: bytes | bytearray, at: int) -> int | None:
    start = at
    while True:
        line_end = buffer.find(b"\r\n", at, start + MAX_HEAD_BYTES)
        if line_end < 0:
            if len(buffer) - start > MAX_HEAD_BYTES:
                raise Refused(431, "trailers too long")
            return None
        if line_end == at:
            return at + 2
        at = line_end + 2
