"""The operator's HTTPS client: one pinned CA, a bearer token, errors in words.

Trusts exactly the fleet's CA, given as a file or by the fingerprint of its certificate, and never the system's store. What is
trusted is the one certificate that was read, written anew: never other text that stood beside it. It moves bytes; what they mean is checked by those who asked for them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from skerry_cli.errors import Failed, RefusedForSafety, Usage
from skerry_cli.profile import Profile

_TIMEOUT = urllib3.Timeout(connect=10.0, read=120.0)
_ONE_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")
_MAX_ANSWER = 64 << 20
_PIECE_BYTES = 1 << 18
_SAFETY_CODES = frozenset(
    {"below_floor", "not_approved", "not_in_catalog", "bad_signature", "hash_mismatch", "rollback"}
)


class Api:
    """Calls of one server. Not for use by several threads at once."""

    def __init__(self, profile: Profile) -> None:
        """Raises ``Usage`` when server, token or CA is missing or unreadable."""
        missing = [
            what
            for what, value in (
                ("the server (--server or SKERRY_SERVER)", profile.server),
                ("a token (--token FILE or SKERRY_TOKEN)", profile.token),
                ("the fleet's CA (--ca FILE or fingerprint, or SKERRY_CA)", profile.ca or profile.ca_sha256),
            )
            if not value
        ]
        if missing:
            raise Usage(f"wanted {', '.join(missing)}; or a profile in ~/.config/skerry/config.toml")
        assert profile.server
        assert profile.token
        self.server = profile.server
        pem = _read_ca(profile.ca) if profile.ca else _pinned_ca(profile.server, profile.ca_sha256 or "")
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=pem)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._pool = urllib3.PoolManager(ssl_context=context, retries=False, timeout=_TIMEOUT)
        self._headers = {"Authorization": f"Bearer {profile.token}"}
        self.ca_pem = pem
        self.ca_sha256 = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()

    def get(self, path: str, **query: str | int | None) -> Any:
        """GET of a JSON answer."""
        return self._json("GET", path, query=query)

    def post(self, path: str, body: Any = None) -> Any:
        """POST of JSON, JSON back."""
        return self._json("POST", path, body=json.dumps(body or {}).encode(), kind="application/json")

    def put(self, path: str, body: Any = None) -> Any:
        """PUT of JSON, JSON back."""
        return self._json("PUT", path, body=json.dumps(body or {}).encode(), kind="application/json")

    def delete(self, path: str) -> Any:
        """DELETE, JSON or nothing back."""
        return self._json("DELETE", path)

    def send(self, method: str, path: str, body: bytes | BinaryIO, headers: dict[str, str] | None = None) -> Any:
        """Raw bytes or a file up, JSON back."""
        return self._json(method, path, body=body, kind="application/octet-stream", headers=headers)

    def items(self, path: str, **query: str | int | None) -> Iterator[dict[str, Any]]:
        """Every item of a list, page by page."""
        cursor: str | int | None = None
        while True:
            page = self.get(path, **query, **({} if cursor is None else {"after": cursor}))
            yield from page["items"]
            cursor = page.get("next")
            if cursor is None:
                return

    def fetch(self, path: str, *, max_bytes: int = _MAX_ANSWER) -> bytes | None:
        """Bytes of a file (or of any GET), None when it is not there.

        Raises:
            Failed: unreachable, refused, or longer than ``max_bytes``.
        """
        status, data = self._call("GET", path, max_bytes=max_bytes)
        if status == 404:
            return None
        if status != 200:
            raise _error(status, data, f"GET {path}")
        return data

    def stream(self, path: str) -> Iterator[bytes]:
        """Bytes of a file of any length, in pieces.

        Raises:
            Failed: unreachable or broken off. Whatever the server refuses with.
        """
        try:
            answer = self._pool.request("GET", f"{self.server}{path}", redirect=False, preload_content=False)
            try:
                if answer.status != 200:
                    raise _error(answer.status, answer.read(4096), f"GET {path}")
                yield from answer.stream(_PIECE_BYTES)
            finally:
                answer.close()
                answer.release_conn()
        except (HTTPError, OSError) as error:
            raise _unreachable(self.server, error) from None

    def find(self, path: str) -> Any:
        """GET of a JSON answer, None when the thing is not there.

        Raises:
            Failed: unreachable, or no JSON.
        """
        data = self.fetch(path)
        return None if data is None else self._read(path, data)

    def _json(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, Any] | None = None,
        body: bytes | BinaryIO | None = None,
        kind: str = "",
        headers: dict[str, str] | None = None,
    ) -> Any:
        chosen = {name: str(value) for name, value in (query or {}).items() if value is not None}
        where = path + (f"?{urllib.parse.urlencode(chosen)}" if chosen else "")
        sent = {**(headers or {}), **({"Content-Type": kind} if kind else {})}
        status, data = self._call(method, where, body=body, headers=sent)
        if not 200 <= status < 300:
            raise _error(status, data, f"{method} {path}")
        return self._read(path, data) if data else {}

    def _read(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Failed(f"{self.server}{path}: wanted JSON back, got {data[:60]!r}") from None

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: bytes | BinaryIO | None = None,
        headers: dict[str, str] | None = None,
        max_bytes: int = _MAX_ANSWER,
    ) -> tuple[int, bytes]:
        url = f"{self.server}{path}"
        try:
            answer = self._pool.request(
                method,
                url,
                body=body,
                headers={**self._headers, **(headers or {})},
                redirect=False,
                preload_content=False,
            )
            try:
                data = answer.read(max_bytes + 1)
                if len(data) > max_bytes:
                    answer.close()
                    raise Failed(f"{url}: wanted at most {max_bytes} bytes")
                return answer.status, data
            finally:
                answer.release_conn()
        except (HTTPError, OSError) as error:
            raise _unreachable(self.server, error) from None


def quote(part: str) -> str:
    """One segment of a path: a name or an id. Raises ``Usage`` for what can be neither."""
    if not part or part in (".", "..") or "/" in part:
        raise Usage(f"wanted a name or an id, got {part!r}")
    return urllib.parse.quote(part, safe="")


def _error(status: int, data: bytes, what: str) -> Exception:
    code, message, details = "", data[:200].decode(errors="replace"), None
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        error = json.loads(data)["error"]
        code, message, details = str(error["code"]), str(error["message"]), error.get("details")
    shown = f"{code}: {message}" if code else f"{what}: HTTP {status}: {message}"
    if details and isinstance(details, dict):
        shown += f" ({', '.join(f'{name}={value}' for name, value in sorted(details.items()))})"
    shown = " ".join(shown.split())
    if status == 401:
        return Usage(f"the server does not know this token: {shown}")
    if status == 403:
        return RefusedForSafety(f"this token may not: {shown}")
    if code in _SAFETY_CODES:
        return RefusedForSafety(shown)
    if status in (400, 404, 413, 422):
        return Usage(shown)
    return Failed(shown)


def _unreachable(server: str, error: Exception) -> Exception:
    reason: Any = error.reason if isinstance(error, MaxRetryError) else error
    if isinstance(reason, SSLError | ssl.SSLError):
        return RefusedForSafety(f"{server}: its certificate is not of the pinned CA: {reason}")
    text = str(reason).split(": ", 1)[-1]
    return Failed(f"{server}: cannot be reached: {text}")


def _read_ca(path: Path) -> str:
    try:
        return ssl.DER_cert_to_PEM_cert(_one_certificate(path.read_text(encoding="ascii")))
    except OSError as error:
        raise Usage(
            f"{path}: {error.strerror or error}; wanted the fleet's CA: a file in PEM, or 64 hex digits, the sha256 of its certificate"
        ) from None
    except ValueError:
        raise Usage(f"{path}: wanted one certificate in PEM, and nothing else") from None


def _pinned_ca(server: str, fingerprint: str) -> str:
    # Fetched from whoever answers, without the token, and used only when its digest is the pinned one.
    pool = urllib3.PoolManager(cert_reqs="CERT_NONE", assert_hostname=False, retries=False, timeout=_TIMEOUT)
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    try:
        answer = pool.request("GET", f"{server}/device/v1/ca", redirect=False, preload_content=False)
        data = answer.read(1 << 16)
        answer.release_conn()
    except (HTTPError, OSError) as error:
        raise _unreachable(server, error) from None
    try:
        der = _one_certificate(data.decode("ascii"))
    except ValueError:
        raise RefusedForSafety(
            f"{server}: wanted one CA certificate in PEM and nothing else, got something else", advice="use --ca FILE"
        ) from None
    found = hashlib.sha256(der).hexdigest()
    if found != fingerprint:
        raise RefusedForSafety(f"{server}: its CA is {found[:16]}..., the pinned one is {fingerprint[:16]}...")
    return ssl.DER_cert_to_PEM_cert(der)


def _one_certificate(text: str) -> bytes:
    """The DER of a text's one certificate. Raises ``ValueError`` for more, for less, and for anything beside it.

    ``ssl.PEM_cert_to_DER_cert`` stops at the padding of a first certificate and ignores what follows; a TLS context trusts all of it.
    """
    found = _ONE_CERTIFICATE.fullmatch(text.strip())
    if found is None:
        raise ValueError("wanted one certificate")
    return base64.b64decode("".join(found[1].split()), validate=True)
