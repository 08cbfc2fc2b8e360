"""Tells systemd how the agent is: READY, RELOADING, WATCHDOG, STOPPING. Does nothing when nobody listens.

The protocol is sd_notify(3): datagrams to ``NOTIFY_SOCKET``. Pings come from the supervisor's loop itself, so that a loop
that hangs is noticed, and only while ``core.watchdog`` finds it well.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

_PATIENCE_S = 0.5


class Notify:
    """``environment`` is read once. ``interval_s`` is how often to ping, None without a watchdog."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        microseconds = environment.get("WATCHDOG_USEC", "")
        mine = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.interval_s = int(microseconds) / 2e6 if microseconds.isdigit() and int(microseconds) and mine else None

    def tell(self, *lines: str) -> None:
        """Sends assignments such as ``READY=1``. A listener that is gone is no error of ours.

        The kernel keeps ten datagrams for one that does not read, and lets the sender of the next wait: not for long, since
        the loop that does everything else stands still meanwhile. The next ping comes soon enough.
        """
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_PATIENCE_S)
            try:
                sock.sendto("\n".join(lines).encode(), address)
            except OSError:
                return

    def reloading(self) -> None:
        """The configuration is being read again; ``READY=1`` says that it was."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
