"""HTTPS on the standard library: connections, whom they trust, and bounded reading.

Trust: our server is known by the fleet's CA and by nothing else. Any other host that serves the repository (a bucket, a CDN)
is known by the system's CAs; what it serves is verified by TUF all the same. Plain HTTP is refused.

A device may not know the time. So of the fleet CA's certificates only the end of validity is judged, by the wall clock: "not
yet valid" would be said of everything by a clock at 1970. The signed lower bound of now is left out on purpose: a stolen
online key could set it far ahead, and the device must still be able to fetch the root that takes that key away.
"""

from __future__ import annotations

import abc
import contextlib
import http.client
import ssl
import time
from collections.abc import Iterator, Mapping
from urllib.parse import urljoin, urlsplit

from skerry_agent.errors import Rejected, Transient

PIECE_BYTES = 1 << 16
MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL; Python's ssl does not name it. The end of validity is checked below.
_NO_CHECK_TIME = 0x200000
USER_AGENT = "skerry-agent"


class MirrorWrong(Transient):
    """What came is not what was signed, or leads astray: a word about whoever served it, and none about the bundle."""

    def __init__(self, detail: str) -> None:
        super().__init__("mirror_wrong", detail)


MOST_ASKED_S = 600.0
"""A peer that asks for a longer pause than this is asked again after it all the same."""


class Overloaded(Transient):
    """It is there, and cannot answer now (429, 5xx)."""

    def __init__(self, url: str, response: http.client.HTTPResponse) -> None:
        super().__init__("unreachable", f"{url}: HTTP {response.status}")
        self.after_s = _asked_s(response.headers.get("Retry-After", ""))


class Connections(abc.ABC):
    """Requests over kept connections, one per host. Whom they go to and whom they trust is a subclass's.

    Args:
        gap_s: longest silence on a connection.
    """

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._connections: dict[tuple[str, int], http.client.HTTPConnection] = {}

    @abc.abstractmethod
    def _origin(self, url: str) -> tuple[str, int]:
        """Host and port. Raises ``Rejected`` (``bad_url``) for an address that is not asked."""

    @abc.abstractmethod
    def _connection(self, host: str, port: int) -> http.client.HTTPConnection:
        """One that is not connected yet."""

    def _judge(self, connection: http.client.HTTPConnection, host: str, port: int) -> None:  # noqa: B027 - not every subclass judges
        """Looks at whom it is connected to, before anything is asked. Raises ``Transient``, and closes, for a stranger."""

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        redirects: int = MAX_REDIRECTS,
    ) -> Iterator[http.client.HTTPResponse]:
        """One request; the response's body is still to be read, with ``pieces`` or ``read``.

        Raises:
            Transient: ``unreachable`` or ``timeout``; ``mirror_wrong`` for a redirect to anything but https.
            Rejected: ``bad_url`` for anything but https.
        """
        for _ in range(redirects + 1):
            response, connection = self._ask(method, url, dict(headers or {}), body)
            if response.status in _REDIRECTS and method == "GET" and redirects:
                location = response.headers.get("Location", "")
                connection.close()
                url = self._redirected(url, location)
                continue
            break
        else:
            raise Transient("unreachable", f"{url}: more than {redirects} redirects")
        try:
            yield response
        finally:
            if response.length == 0 and not response.isclosed():
                # Read to its end, which ``read1`` of older Pythons does not notice: the connection is good for the next request.
                response.close()
            if not response.isclosed():
                # Something is left unread: the next request needs a clean connection.
                connection.close()

    def _redirected(self, url: str, location: str) -> str:
        try:
            found = urljoin(url, location)
            host, _ = self._origin(found)
            # A name that no resolver takes is told here, of whoever redirects to it.
            host.encode("idna")
        except (ValueError, Rejected):
            raise MirrorWrong(f"{url}: redirects to {location[:200]!r}, wanted https://host[:port]/...") from None
        return found

    def get(self, url: str, *, max_bytes: int) -> tuple[int, bytes]:
        """Status and body of a small document.

        Raises:
            Transient: as ``open``.
            Rejected: ``size_mismatch`` when it is longer than ``max_bytes``.
        """
        with self.open("GET", url) as response:
            return response.status, read(response, max_bytes, url)

    def close(self) -> None:
        """Closes every connection."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _ask(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        host, port = self._origin(url)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
        with _named(url):
            for fresh in (False, True):
                connection = self._connections.get((host, port))
                reused = connection is not None and connection.sock is not None
                if connection is None:
                    connection = self._connections[host, port] = self._connection(host, port)
                try:
                    if connection.sock is None:
                        connection.connect()
                        self._judge(connection, host, port)
                    connection.request(method, target, body=body, headers=headers)
                    return connection.getresponse(), connection
                except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                    # A kept connection that the peer had closed meanwhile: once more on a new one.
                    connection.close()
                    if fresh or not reused:
                        raise
                except BaseException:
                    connection.close()
                    raise
        raise AssertionError("the second round returns or raises")


class Web(Connections):
    """Requests to our server and to whoever serves the repository.

    Args:
        server_url: whoever answers there must show a certificate of ``ca_pem``.
        ca_pem: the fleet's CA.
        now_s: wall clock, seconds since 1970.
        gap_s: longest silence on a connection.
    """

    def __init__(self, *, server_url: str, ca_pem: str, now_s: float, gap_s: float) -> None:
        super().__init__(gap_s)
        self._server = _origin(server_url)
        self._now_s = now_s
        self._fleet = fleet_context(ca_pem)
        self._public: ssl.SSLContext | None = None

    def _origin(self, url: str) -> tuple[str, int]:
        return _origin(url)

    def _connection(self, host: str, port: int) -> http.client.HTTPSConnection:
        if (host, port) == self._server:
            return http.client.HTTPSConnection(host, port, timeout=self._gap_s, context=self._fleet)
        if self._public is None:
            self._public = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=self._gap_s, context=self._public)

    def _judge(self, connection: http.client.HTTPConnection, host: str, port: int) -> None:
        """The part of the certificate check that ``_NO_CHECK_TIME`` left out."""
        if (host, port) != self._server:
            return
        shown = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
        certificate = shown or {}
        ends = str(certificate.get("notAfter", ""))
        if not ends or ssl.cert_time_to_seconds(ends) < self._now_s:
            connection.close()
            # Whoever reads this may have a clock that is years ahead.
            here = time.strftime("%Y-%m-%d %H:%M", time.gmtime(min(self._now_s, 253402300799.0)))
            raise Transient(
                "unreachable", f"{host}:{port}: its certificate expired {ends}; it is {here} UTC by this device's clock"
            )


def pieces(response: http.client.HTTPResponse, what: str) -> Iterator[bytes]:
    """The body as it arrives, at most ``PIECE_BYTES`` at a time.

    Raises:
        Transient: ``unreachable`` when it ends early, ``timeout``. What the caller does with a piece raises as it is.
    """
    while True:
        with _named(what):
            piece = response.read1(PIECE_BYTES)
            if not piece and response.length:
                raise http.client.IncompleteRead(b"", response.length)
        if not piece:
            return
        yield piece


def read(response: http.client.HTTPResponse, max_bytes: int, what: str) -> bytes:
    """The whole body. Raises ``Rejected`` (``size_mismatch``) when it is longer than ``max_bytes``."""
    data = bytearray()
    for piece in pieces(response, what):
        data += piece
        if len(data) > max_bytes:
            raise Rejected("size_mismatch", f"{what}: more than {max_bytes} bytes")
    return bytes(data)


def fleet_context(ca_pem: str) -> ssl.SSLContext:
    """TLS that trusts the fleet's CA only, names checked. Raises ``Rejected`` (``bad_ca``) when it is no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise Rejected("bad_ca", f"the fleet's CA is no certificate in PEM: {error}") from None
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    return context


def is_overloaded(status: int) -> bool:
    """Whether the status says that the peer cannot answer now: nothing about what was asked for."""
    return status == 429 or 500 <= status < 600


def _asked_s(value: str) -> float:
    """Seconds of a ``Retry-After``, at most ``MOST_ASKED_S``. Of the form with a date: this device's clock may be anywhere."""
    return min(MOST_ASKED_S, float(value)) if value.isascii() and value.isdigit() and len(value) <= 9 else 0.0


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Says of a failing connection what it was for. ``Transient`` and ``Rejected`` pass as they are."""
    where = url.partition("?")[0]
    try:
        yield
    except TimeoutError as error:
        raise Transient("timeout", f"{where}: {error}") from error
    except ssl.SSLCertVerificationError as error:
        raise Transient("unreachable", f"{where}: its certificate is not trusted: {error.verify_message}") from error
    except (http.client.HTTPException, OSError, UnicodeError) as error:
        # UnicodeError: a name or a path that cannot be asked for.
        raise Transient("unreachable", f"{where}: {type(error).__name__}: {error}") from error


def _origin(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        if parts.scheme == "https" and parts.hostname and parts.username is None:
            return parts.hostname, parts.port or 443
    except ValueError:
        pass
    raise Rejected("bad_url", f"wanted https://host[:port]/..., got {url[:200]!r}")
