"""Who is signed in to the page: a browser's cookie -> the API token it was opened with.

Sessions live in this process's memory, by the sha256 of a random cookie: a stolen database or log holds none, and a restart
ends them all. A session ends after ``LIFE_S``, on signing out, and as soon as its API token is revoked or expires, which is
asked again with every request. At most ``MOST`` are kept; the oldest goes first.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict

from skerry_server import access

LIFE_S = 12 * 3600
MOST = 1000


class Sessions:
    """Thread-safe: routes run in a pool of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # sha256 of the cookie -> (name of the API token, when it ends in milliseconds since 1970)
        self._held: OrderedDict[str, tuple[str, int]] = OrderedDict()

    def begin(self, token_name: str, now_ms: int) -> str:
        """Opens a session and returns the cookie's value."""
        cookie = secrets.token_urlsafe(32)
        with self._lock:
            self._held[access.hash_secret(cookie)] = (token_name, now_ms + LIFE_S * 1000)
            while len(self._held) > MOST:
                self._held.popitem(last=False)
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
            self._held.pop(access.hash_secret(cookie), None)
