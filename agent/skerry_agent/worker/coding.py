"""Content codings of replies: which one a request accepts (RFC 9110, 12.5.3), and a reply packed by it.

Small replies are never packed: on the device itself packing costs more than sending. What is large enough is packed at the
fastest level, beyond ``AT_ONCE_BYTES`` in a thread of its own (zlib lets go of the interpreter), so that the loop answers
others meanwhile; a reply that would not get smaller goes as it is. ``Inference-Header-Content-Length`` is of the body before
packing, as the binary tensor extension has it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

LEAST_BYTES = 32 * 1024
AT_ONCE_BYTES = 128 * 1024
"""About 2 ms at the level taken."""
_LEVEL = 1
_WBITS = {b"gzip": 31, b"deflate": 15}
_LENGTH = b"Content-Length: "

Done = Callable[[bytes], None]


def accepted(value: bytes) -> bytes:
    """Of gzip and deflate the one that an ``Accept-Encoding`` prefers, gzip when it does not care; empty for neither.

    >>> accepted(b"deflate, gzip"), accepted(b"gzip;q=0.2, deflate"), accepted(b"*"), accepted(b"gzip;q=0, br")
    (b'gzip', b'deflate', b'gzip', b'')
    """
    weights: dict[bytes, float] = {}
    for part in value.lower().split(b","):
        name, _, parameter = part.partition(b";")
        weights[name.strip()] = _weight(parameter)
    rest = weights.get(b"*", 0.0)
    # Equal weights: the first, for max keeps it.
    best = max(_WBITS, key=lambda name: weights.get(name, rest))
    weight = weights.get(best, rest)
    return best if weight > 0 and weight >= weights.get(b"identity", 0.0) else b""


def _weight(parameter: bytes) -> float:
    name, _, text = parameter.strip().partition(b"=")
    if name.strip() != b"q":
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    # What is no weight, NaN among it, is as if it were not wanted.
    return weight if 0.0 <= weight <= 1.0 else 0.0


def packed(reply: bytes, coding: bytes) -> bytes:
    """The reply with its body packed, or as it was when that makes it no smaller.

    Args:
        reply: of ``http1.reply``, with at least ``LEAST_BYTES``.
        coding: gzip or deflate.
    """
    end = reply.index(b"\r\n\r\n") + 4
    try:
        packer = zlib.compressobj(_LEVEL, wbits=_WBITS[coding])
        body = packer.compress(memoryview(reply)[end:]) + packer.flush()
    except MemoryError:
        return reply
    if len(body) >= len(reply) - end:
        return reply
    at = reply.index(_LENGTH) + len(_LENGTH)
    line_end = reply.index(b"\r\n", at)
    return b"%b%d\r\nContent-Encoding: %b%b%b" % (reply[:at], len(body), coding, reply[line_end:end], body)


class Packing:
    """Packs replies of one worker."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread: ThreadPoolExecutor | None = None

    def later(self, coding: bytes, done: Done) -> Done:
        """A ``done`` that packs what it is given before it hands it on."""

        def pack(reply: bytes) -> None:
            now = self.now(reply, coding, done)
            if now is not None:
                done(now)

        return pack

    def now(self, reply: bytes, coding: bytes, done: Done) -> bytes | None:
        """The reply, packed where that is worth it; or None, and ``done`` gets it later, in the loop."""
        if len(reply) < LEAST_BYTES:
            return reply
        if len(reply) < AT_ONCE_BYTES:
            return packed(reply, coding)
        if self._thread is None:
            # Most workers never need it.
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")
        found = self._thread.submit(packed, reply, coding)
        found.add_done_callback(lambda future: self._loop.call_soon_threadsafe(done, future.result()))
        return None
