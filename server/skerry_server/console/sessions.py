"""Who is signed in to the page: a browser's cookie -> the API token it was opened with.

Sessions are kept by the sha256 of a random cookie, in a file, so that a page goes on when the server starts again: a stolen
folder or log opens none. A session ends after ``LIFE_S``, on signing out, and as soon as its API token is revoked or expires,
which is asked again with every request. At most ``MOST`` are kept, and ``MOST_OF_ONE`` of one token, so that nobody who signs in again and
again signs others out; the oldest goes first.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from skerry_server import access, durable

log = logging.getLogger(__name__)

LIFE_S = 12 * 3600
MOST = 1000
MOST_OF_ONE = 20


class Sessions:
    """Thread-safe: routes run in a pool of threads. ``path``: the file; one that cannot be read holds no session."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        # sha256 of the cookie -> (name of the API token, when it ends in milliseconds since 1970)
        self._held = _read(path)

    def begin(self, token_name: str, now_ms: int) -> str:
        """Opens a session and returns the cookie's value."""
        cookie = secrets.token_urlsafe(32)
        with self._lock:
            self._held[access.hash_secret(cookie)] = (token_name, now_ms + LIFE_S * 1000)
            for over in [key for key, (_, ends_ms) in self._held.items() if ends_ms <= now_ms]:
                del self._held[over]
            same = [key for key, (name, _) in self._held.items() if name == token_name]
            for over in same[:-MOST_OF_ONE]:
                del self._held[over]
            while len(self._held) > MOST:
                self._held.popitem(last=False)
            self._write()
        return cookie

    def holder(self, cookie: str, now_ms: int) -> str | None:
        """Name of the API token that the session was opened with; None when there is no such session or it is over."""
        key = access.hash_secret(cookie)
        with self._lock:
            found = self._held.get(key)
            if found is None:
                return None
            name, ends_ms = found
            if ends_ms <= now_ms:
                del self._held[key]
                return None
            return name

    def end(self, cookie: str) -> None:
        """Forgets the session."""
        with self._lock:
            if self._held.pop(access.hash_secret(cookie), None) is not None:
                self._write()

    def _write(self) -> None:
        durable.write(self._path, json.dumps(self._held).encode() + b"\n")


def _read(path: Path) -> OrderedDict[str, tuple[str, int]]:
    try:
        found = json.loads(path.read_bytes())
        return OrderedDict((str(key), (str(name), int(ends_ms))) for key, (name, ends_ms) in found.items())
    except FileNotFoundError:
        return OrderedDict()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("sessions are not read, everybody signs in again path=%s error=%s", path, error)
        return OrderedDict()
