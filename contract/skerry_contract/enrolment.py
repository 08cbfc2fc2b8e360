"""The enrolment token: what a new device needs to trust its fleet, in one line.

The server issues an opaque secret bound to one device id or a serial prefix. The operator's tool completes it with what
the server must not decide: the sha256 of the operator's ``root.json`` and the fingerprint of the fleet's CA. Both sides
build and parse here. The line is a secret for as long as the server's part is valid; ``Enrolment`` hides it from ``repr``.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from skerry_contract import canonical, ids
from skerry_contract.errors import Malformed, UnsupportedVersion

PREFIX = "skerry1."
MAX_CHARACTERS = 4096
_KEYS = {"u", "t", "ca", "root"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrolment:
    """A completed token, taken apart.

    Attributes:
        server_url: ``https://host[:port]`` of the device API, without a trailing slash.
        token: the server's secret.
        ca_sha256: hex sha256 of the DER of the fleet's CA certificate.
        root_sha256: hex sha256 of the bytes of the operator's ``root.json``.
    """

    server_url: str
    token: str = field(repr=False)
    ca_sha256: str
    root_sha256: str


def build(enrolment: Enrolment) -> str:
    """The token's one line. Raises ``Malformed`` for what ``parse`` would refuse."""
    value = {
        "u": enrolment.server_url,
        "t": enrolment.token,
        "ca": enrolment.ca_sha256,
        "root": enrolment.root_sha256,
    }
    text = PREFIX + base64.urlsafe_b64encode(canonical.encode(value)).rstrip(b"=").decode()
    parse(text)
    return text


def parse(text: str) -> Enrolment:
    """Reads a token; white space around it is ignored.

    Raises:
        Malformed: not a completed token; the message says which part, and holds nothing secret.
        UnsupportedVersion: a token of a newer form.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        raise Malformed("enrolment token", f"at most {MAX_CHARACTERS} characters, got {len(text)}")
    if not text.startswith(PREFIX):
        version, dot, _ = text.removeprefix("skerry").partition(".")
        if text.startswith("skerry") and dot and version.isascii() and version.isdigit() and int(version[:6]) > 1:
            raise UnsupportedVersion("enrolment token", int(version[:6]), 1)
        raise Malformed("enrolment token", f"wanted a completed token that starts with {PREFIX!r}")
    payload = text.removeprefix(PREFIX)
    if not payload or any(not (c.isascii() and (c.isalnum() or c in "-_")) for c in payload):
        raise Malformed("enrolment token", "wanted base64url without padding after the prefix")
    try:
        data = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    except (binascii.Error, ValueError):
        raise Malformed("enrolment token", "wanted base64url without padding after the prefix") from None
    value = canonical.decode(data, what="enrolment token", max_bytes=MAX_CHARACTERS)
    if set(value) != _KEYS or not all(isinstance(part, str) for part in value.values()):
        raise Malformed("enrolment token", f"wanted the texts {sorted(_KEYS)}, got {sorted(value)}")
    secret = value["t"]
    if not secret or any(not (c.isascii() and c.isprintable() and c != " ") for c in secret):
        raise Malformed("enrolment token", "wanted printable ASCII without spaces", where="$.t")
    return Enrolment(
        server_url=origin(value["u"]),
        token=secret,
        ca_sha256=ids.sha256_hex(value["ca"], what="enrolment token, ca"),
        root_sha256=ids.sha256_hex(value["root"], what="enrolment token, root"),
    )


def origin(url: str) -> str:
    """Checks that ``url`` is ``https://host[:port]`` and nothing more, and returns it without a trailing slash.

    Raises:
        Malformed: another scheme, credentials, a path, a query, or no host.
    """
    expected = f"wanted https://host[:port] and nothing more, got {url[:100]!r}"
    if any(not c.isascii() or not c.isprintable() or c.isspace() for c in url):
        raise Malformed("server url", expected)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise Malformed("server url", expected) from None
    extra = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc or "\\" in url
    if parts.scheme != "https" or not parts.hostname or extra:
        raise Malformed("server url", expected)
    return f"https://{parts.netloc}"
