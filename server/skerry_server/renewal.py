"""The server's own certificates while it runs: looked at now and then, renewed long before their end, and taken into use.

Owns the thread that looks. Leaves making certificates to ``ca``, and reading them anew to whoever serves with them. A renewal
that fails is logged and tried again at the next look; ``healthy`` tells when it has become urgent.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
from collections.abc import Callable, Sequence

from skerry_server.ca import FleetCA

log = logging.getLogger(__name__)

_NAMES = ("ca", "server", "client")
URGENT = dt.timedelta(days=14)


class Renewal:
    """Start it once; safe to ask from any thread."""

    def __init__(
        self,
        authority: FleetCA,
        names: Sequence[str],
        now: Callable[[], dt.datetime],
        *,
        every_s: float,
        renewed: Callable[[], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            names: as for ``FleetCA.ensure_own``.
            renewed: called after new certificates lie on disk.
        """
        self._authority = authority
        self._names = tuple(names)
        self._now = now
        self._every_s = every_s
        self._renewed = renewed
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to look."""
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def left_s(self) -> dict[str, float]:
        """Seconds to the end of each certificate that can be read, by ``ca``, ``server`` and ``client``."""
        now = self._now()
        return {name: (end - now).total_seconds() for name, end in self._authority.ends().items()}

    @property
    def healthy(self) -> bool:
        """Whether all can be read and none is near its end; one that is should have been renewed weeks ago."""
        left = self.left_s()
        return len(left) == len(_NAMES) and min(left.values()) > URGENT.total_seconds()

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            try:
                if self._authority.ensure_own(self._names, self._now()):
                    self._renewed()
                    days = {name: round(left / 86_400) for name, left in self.left_s().items()}
                    log.info("certificates renewed days_left=%s", days)
            except Exception:
                log.exception("certificates could not be renewed")
