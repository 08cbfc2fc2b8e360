"""A file over HTTP, resumable at any byte: the last source, which has every file that a catalog promises, or says why not.

What a file must be is signed. So another length, another hash and a redirect to plain HTTP speak of who served them (an error page with
status 200, a proxy, a mirror that lies): they are asked again after a pause, a few times, and end in ``mirror_wrong``.

Bounds, so that it always ends in something that is reported: connections in a row that bring nothing, connections in all,
and bytes that were fetched and thrown away again (a server that does not resume and breaks off, a file that is another one
each time). The last bound holds over restarts of the agent.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

from skerry_agent.courier import parts, requests, transport
from skerry_agent.courier.acquiring import Wanted
from skerry_agent.courier.meter import Meter
from skerry_agent.errors import Transient

_MAX_PAUSE_S = 30.0
_MOST_ASKED_S = 60.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
WASTE, METERED_WASTE = 3, 1
"""So many times its size a file may be fetched in vain before it is given up; less where bytes are paid for."""
_LEAST_WASTE = 256 * 1024
_MISSING = (404, 410)
_MISSING_ATTEMPTS = 2
_WRONG_BODIES = 2
"""So many whole files that are another one are read in a run; what is told by its length alone costs nothing, and is asked for oftener."""


class Missing(Transient):
    """The repository does not have it, though it was promised."""


class _WrongBody(transport.MirrorWrong):
    """A whole file came, and it is another one."""


class Resuming:
    """As ``acquiring.Source``.

    Args:
        url_of: where a file lies.
        folder: of parts, on the file system that the files go to.
        metered: the link is paid by volume.
    """

    def __init__(
        self,
        web: transport.Connections,
        url_of: Callable[[Wanted], str],
        folder: Path,
        meter: Meter,
        limits: requests.Limits,
        *,
        metered: bool = False,
    ) -> None:
        self._web = web
        self._url_of = url_of
        self._folder = folder
        self._meter = meter
        self._limits = limits
        self._waste = METERED_WASTE if metered else WASTE
        self._wrong_bodies = 1 if metered else _WRONG_BODIES

    def bring(self, wanted: Wanted, path: Path) -> bool:
        """Until the file is here, whole and synced, or it is clear that it will not come.

        Returns:
            False when another courier was fetching it, and is done.

        Raises:
            Transient: ``unreachable``, ``timeout``, ``busy``, with what came so far kept; ``blob_missing``; ``download_wasted``; ``mirror_wrong``.
        """
        with parts.held(self._folder, wanted) as part:
            if part.waited and part.size == 0:
                # Whoever had it has it whole by now, and it may be taken from there.
                return False
            idle = bodies = 0
            for attempt in range(self._limits.attempts):
                before = self._meter.received
                self._meter.wind()
                try:
                    resumed = self._one_connection(part, wanted)
                    if self._judge(part, wanted, path, resumed=resumed):
                        return True
                except Transient as error:
                    wrong = isinstance(error, transport.MirrorWrong)
                    # A connection that brought something of the file does not count as idle.
                    idle = 0 if self._meter.received > before and not wrong else idle + 1
                    bodies += isinstance(error, _WrongBody)
                    most = _MISSING_ATTEMPTS if isinstance(error, Missing) else self._limits.idle_attempts
                    last = idle >= most or bodies >= self._wrong_bodies or attempt + 1 == self._limits.attempts
                    if last or error.code == "download_wasted":
                        raise
                    self._meter.pause(pause_s(self._limits.pause_s, idle, error))
        raise Transient("unreachable", f"{wanted.name}: not here after {self._limits.attempts} connections")

    def _judge(self, part: parts.Part, wanted: Wanted, path: Path, *, resumed: bool) -> bool:
        """Gives the part its name when it is whole. False: what was here before was no beginning of it, and it begins anew."""
        with self._meter.own_work():
            fault = part.fault()
            if not fault:
                part.become(path)
                return True
        self._drop(part, wanted, wrong=not resumed)
        if not resumed:
            raise _WrongBody(f"{wanted.name}: {fault}")
        # Bytes of another day may be torn or of another file: once more from the start before anyone is blamed.
        return False

    def _one_connection(self, part: parts.Part, wanted: Wanted) -> bool:
        """Reads until the part is complete. Returns whether it began with bytes that were here before."""
        offset = part.size
        if offset == wanted.size:
            return True
        if offset > wanted.size:
            self._drop(part, wanted)
            offset = 0
        headers = {}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if part.tag:
                headers["If-Range"] = part.tag
        url = self._url_of(wanted)
        with self._web.open("GET", url, headers=headers) as response:
            if response.status == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if match is None or int(match[1]) != offset:
                    raise Transient("unreachable", f"{url}: another range than bytes {offset}- came back")
                if match[3] not in ("*", str(wanted.size)):
                    raise transport.MirrorWrong(f"{wanted.name}: wanted {wanted.size} bytes, {url} has {match[3]}")
            elif response.status == 200:
                if response.length is not None and response.length != wanted.size:
                    raise transport.MirrorWrong(
                        f"{wanted.name}: wanted {wanted.size} bytes, {url} offers {response.length}"
                    )
                if offset:
                    self._drop(part, wanted)
                    offset = 0
            elif response.status == 416:
                self._drop(part, wanted)
                raise Transient("unreachable", f"{url}: HTTP 416, beginning anew")
            elif response.status in _MISSING:
                raise Missing(
                    "blob_missing", f"{url}: HTTP {response.status}: the repository does not have {wanted.name}"
                )
            elif transport.is_overloaded(response.status):
                raise transport.Overloaded(url, response)
            else:
                raise Transient("unreachable", f"{url}: HTTP {response.status}")
            part.came_under(response.headers.get("ETag", ""))
            done = offset
            with part.growing() as descriptor:
                for piece in transport.pieces(response, url):
                    done += len(piece)
                    if done > wanted.size:
                        self._drop(part, wanted, wrong=True)
                        raise _WrongBody(f"{wanted.name}: more than {wanted.size} bytes came of {url}")
                    _write(descriptor, piece)
                    self._meter.came(wanted, done, len(piece))
            if done < wanted.size:
                raise Transient("unreachable", f"{url}: ended after {done} of {wanted.size} bytes")
        return offset > 0

    def _drop(self, part: parts.Part, wanted: Wanted, *, wrong: bool = False) -> None:
        """Throws away what is here. ``wrong``: all of it came in this run and is another file, which ``_WRONG_BODIES`` bounds."""
        lost = part.drop()
        if lost > max(_LEAST_WASTE, self._waste * wanted.size):
            # Whoever tries again, later, has the whole allowance again.
            part.count_lost(0)
            if wrong:
                return
            raise Transient(
                "download_wasted",
                f"{wanted.name}: {lost} bytes came in vain for a file of {wanted.size}: it cannot be resumed",
            )


def _write(descriptor: int, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        left = left[os.write(descriptor, left) :]


def pause_s(base_s: float, idle: int, error: Transient) -> float:
    """Full jitter (0 to the cap) over a doubling cap, in seconds; beyond what a peer that is overloaded asks for, within bounds."""
    return min(_MOST_ASKED_S, error.after_s) + random.uniform(0, min(_MAX_PAUSE_S, base_s * 2**idle))
