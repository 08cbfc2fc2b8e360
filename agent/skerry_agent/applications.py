"""Applications that run a confirmed bundle in their own process (``sdk``): the supervisor's side of their socket.

What they count comes in as a worker's does: windows with ring positions, committed in one transaction. When an application is gone,
however it went, its lock on its ring is (``lending``), and the serving worker folds the rest. Who it is says the kernel; what one that
is connected may do is ``appclient``'s. Follows what is *confirmed*: a trial is the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skerry_agent import appwire, local_socket
from skerry_agent.appclient import Client, House
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.holding import Holding
from skerry_agent.logs import kv
from skerry_agent.serving.rings import Rings
from skerry_agent.slots import Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)

SOCKET = "apps.sock"
_BACKLOG = 64
_CREDENTIALS = struct.Struct("3i")


class Applications(House):
    """The socket of the applications, and everybody who is connected.

    Args:
        window_s: how long a window spans now.
        on_event: takes (name, code, data) for the server.
        holding: takes locks of updates.
        device: its id, for spans.

    Raises:
        Degraded: ``address_in_use``.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        slots: Slots,
        clock: Clock,
        rings: Rings,
        *,
        window_s: Callable[[], float],
        on_event: Callable[[str, str, dict[str, Any]], None],
        holding: Holding,
        device: str = "",
    ) -> None:
        super().__init__(
            config, store, slots, clock, rings, window_s=window_s, on_event=on_event, holding=holding, device=device
        )
        self._uids = {0, os.geteuid(), *_uids(config.apps.users)}
        path = Path(config.apps.socket) if config.apps.socket else config.run_dir / SOCKET
        self._socket = local_socket.bind(
            path, int(config.apps.socket_mode, 8), kind=socket.SOCK_SEQPACKET, advice="change apps.socket"
        )
        self.path = path

    def configure(self, config: Config) -> None:
        """Goes on with another configuration: who is connected stays so."""
        self.config = config
        self._uids = {0, os.geteuid(), *_uids(config.apps.users)}

    def start(self) -> None:
        """Accepts from now on, in the running loop."""
        self.loop = asyncio.get_running_loop()
        self._socket.socket.setblocking(False)
        self._socket.socket.listen(_BACKLOG)
        self.loop.add_reader(self._socket.socket.fileno(), self._accept)

    def stop(self) -> None:
        """Hangs up on everybody; they go on alone and come back to the next agent."""
        if hasattr(self, "loop"):
            self.loop.remove_reader(self._socket.socket.fileno())
        for client in list(self.clients):
            client.close()
        self._socket.close()

    def tick(self) -> None:
        """Tells who follows a model what is confirmed now; forgets rings that are gone. Called about every half second."""
        for client in list(self.clients):
            client.tick()
        self.forget_gone()

    def report(self) -> dict[str, Any]:
        """For the status: who is connected and what runs there."""
        found = []
        for client in sorted(self.clients, key=lambda c: c.pid):
            running = {model: self.grants[ring].version for model, ring in client.rings.items() if ring in self.grants}
            found.append({"pid": client.pid, "uid": client.uid, "running": running})
        return {"socket": str(self.path), "connected": found}

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock, _ = self._socket.socket.accept()
            sock.setblocking(False)
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, _gid = _CREDENTIALS.unpack(raw)
            refusal = None
            if uid not in self._uids:
                refusal = appwire.Sorry(code="not_allowed", detail=f"user {uid} is not in apps.users of this agent")
            elif len(self.clients) >= self.config.apps.clients:
                most = self.config.apps.clients
                refusal = appwire.Sorry(
                    code="too_many_applications", detail=f"apps.clients of this agent allows {most}"
                )
            if refusal is not None:
                log.warning("application refused", extra=kv(pid=pid, uid=uid, code=refusal.code))
                with contextlib.suppress(OSError):
                    appwire.send(sock, refusal)
                sock.close()
                return
            self.clients.add(Client(self, sock, pid, uid))


def _uids(users: tuple[str, ...]) -> set[int]:
    found = set()
    for user in users:
        try:
            found.add(int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid)
        except KeyError:
            log.warning("no such user", extra=kv(user=user, key="apps.users"))
    return found
