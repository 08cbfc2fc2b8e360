"""The verb ``logs``: the last lines of the device's log for an operator who asked, packed until they fit."""

from __future__ import annotations

import gzip
from typing import Any, Final

from skerry_agent.courier import device_api, requests

MOST_BYTES: Final = 128 * 1024
"""What the server takes, as gzip."""
MOST_TEXT_BYTES: Final = 1 << 20
"""What it takes when it is unpacked."""


def send(request: requests.Logs) -> dict[str, Any]:
    """Sends the lines.

    Returns:
        ``bytes`` of the lines that were sent, and of those that were ``left_out``: the oldest, when all are too many.

    Raises:
        AgentError: as ``enrol``; ``answered``, ``request_ended`` or ``not_found`` when the server no longer waits for it.
    """
    text = request.lines.encode("utf-8", "replace")
    packed, sent = fitting(text)
    known = device_api.enrolled(request)
    known.api.send_logs(known.key, known.device, request.number, packed)
    return {"bytes": sent, "left_out": len(text) - sent}


def fitting(text: bytes, most_bytes: int = MOST_BYTES) -> tuple[bytes, int]:
    """(gzip of the newest whole lines that fit, their bytes).

    >>> packed, sent = fitting(b"a line")
    >>> gzip.decompress(packed), sent
    (b'a line', 6)
    """
    text = _newest(text, MOST_TEXT_BYTES)
    packed = gzip.compress(text, 9, mtime=0)
    while len(packed) > most_bytes:
        # What is left out may pack better than the rest: a little less than in proportion.
        text = _newest(text, len(text) * most_bytes // len(packed) * 15 // 16)
        packed = gzip.compress(text, 9, mtime=0)
    return packed, len(text)


def _newest(text: bytes, most: int) -> bytes:
    if len(text) <= most:
        return text
    kept = text[len(text) - most :]
    return kept[kept.find(b"\n") + 1 :] if b"\n" in kept else b""
