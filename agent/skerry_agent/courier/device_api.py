"""The server's device API, ``/device/v1``: enrol, self, renew, logs.

Owns the requests and reading the answers; what the answers are believed for is the caller's matter.
"""

from __future__ import annotations

import email.utils
import json
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from skerry_agent.courier import keys, requests, transport
from skerry_agent.errors import Degraded, Rejected, Transient

BASE = "/device/v1"
MAX_ANSWER_BYTES = 256 * 1024


class DeviceApi:
    """Requests to one server.

    Args:
        web: trusts the fleet's CA.
        server_url: ``https://host:port``.
        now_s: wall clock, seconds since 1970; replaced by the server's own time where a token needs it.
    """

    def __init__(self, web: transport.Web, server_url: str, now_s: float) -> None:
        self._web = web
        self._url = server_url.rstrip("/")
        self._now_s = now_s
        self.told_s = 0.0
        """What time it is by the server's last answer, seconds since 1970; 0 before one."""

    def enrol(self, token: str, csr_pem: str, asked_id: str, encryption_key: str = "") -> dict[str, Any]:
        """Trades the enrolment token and a certificate request for an identity. ``encryption_key``: PEM of the public part.

        Raises:
            Rejected: the server's own code, e.g. ``bad_enrolment_token``.
            Transient: unreachable, or the server cannot now.
        """
        wish = {"token": token, "csr": csr_pem, **({"device_id": asked_id} if asked_id else {})}
        wish |= {"encryption_key": encryption_key} if encryption_key else {}
        return self._ask("POST", f"{BASE}/enrol", json.dumps(wish).encode(), {})

    def membership(self, key: ec.EllipticCurvePrivateKey, device: str) -> dict[str, Any]:
        """``/self``: {group, tags, version, logs}. Raises as ``enrol``; a revoked device gets ``unknown_device``."""
        return self._signed(key, device, "GET", f"{BASE}/self", b"")

    def renew(self, key: ec.EllipticCurvePrivateKey, device: str, csr_pem: str) -> dict[str, Any]:
        """A new certificate for the same key. Raises as ``enrol``."""
        return self._signed(key, device, "POST", f"{BASE}/renew", json.dumps({"csr": csr_pem}).encode())

    def content_key(
        self, key: ec.EllipticCurvePrivateKey, device: str, digest: str, encryption_key: str
    ) -> dict[str, Any]:
        """A bundle's content key, wrapped for the encryption key (PEM). Raises as ``enrol``."""
        body = json.dumps({"encryption_key": encryption_key}).encode()
        return self._signed(key, device, "POST", f"{BASE}/keys/{digest}", body)

    def send_logs(self, key: ec.EllipticCurvePrivateKey, device: str, number: int, packed: bytes) -> dict[str, Any]:
        """The answer to a request for the log: lines, gzip. Raises as ``enrol``."""
        return self._signed(key, device, "POST", f"{BASE}/logs/{number}", packed, kind="application/gzip")

    def _signed(
        self,
        key: ec.EllipticCurvePrivateKey,
        device: str,
        method: str,
        path: str,
        body: bytes,
        *,
        kind: str = "application/json",
    ) -> dict[str, Any]:
        nonce = self._ask("GET", f"{BASE}/nonce", b"", {})
        # A device whose clock is wrong dates its token by the server's, which TLS has just vouched for.
        token = keys.request_token(
            key,
            device=device,
            method=method,
            path=path,
            body=body,
            nonce=_text(nonce, "nonce"),
            now_s=self._now_s,
        )
        return self._ask(method, path, body, {"Authorization": f"Skerry-JWT {token}", "Content-Type": kind})

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        url = self._url + path
        headers = {**({"Content-Type": "application/json"} if body else {}), **headers}
        with self._web.open(method, url, headers=headers, body=body or None, redirects=0) as response:
            data = transport.read(response, MAX_ANSWER_BYTES, url)
            date = email.utils.parsedate_tz(response.headers.get("Date", ""))
        if date is not None:
            self._now_s = self.told_s = float(email.utils.mktime_tz(date))
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if response.status in (200, 201) and isinstance(value, dict):
            return value
        fault = value.get("error") if isinstance(value, dict) else None
        code, message = (fault.get("code"), fault.get("message")) if isinstance(fault, dict) else (None, None)
        told = f"{url}: HTTP {response.status}: {str(message)[:500]}"
        if response.status >= 500 or response.status in (408, 425, 429) or not isinstance(code, str):
            raise Transient("unreachable", told)
        raise Rejected(code[:60], told)


class Enrolled(NamedTuple):
    """A device that the fleet knows, and the way to its server."""

    api: DeviceApi
    key: ec.EllipticCurvePrivateKey
    device: str
    ca_pem: str


def enrolled(request: requests.Common) -> Enrolled:
    """Who this device is, of its state folder. Raises ``Degraded`` (``not_enrolled``)."""
    identity = request.identity
    key = keys.load_key(identity)
    device = device_id(request)
    try:
        ca_pem = (identity / "fleet-ca.pem").read_text()
    except (OSError, ValueError) as error:
        raise Degraded("not_enrolled", f"{identity}: {error}", advice="enrol the device") from None
    web = transport.Web(server_url=request.server_url, ca_pem=ca_pem, now_s=request.now_s, gap_s=request.limits.gap_s)
    return Enrolled(DeviceApi(web, request.server_url, request.now_s), key, device, ca_pem)


def device_id(request: requests.Common) -> str:
    """The id alone, for what needs no server. Raises as ``enrolled``."""
    try:
        return str(json.loads((request.identity / "enrolled.json").read_bytes())["device_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Degraded("not_enrolled", f"{request.identity}: {error}", advice="enrol the device") from None


def _text(answer: dict[str, Any], field: str) -> str:
    value = answer.get(field)
    if not isinstance(value, str) or not value:
        raise Transient("unreachable", f"the server's answer lacks {field}")
    return value
