"""Update locks of an application: another bundle begins to answer when its work allows it.

Each call is a connection of its own, so that an application needs no open model for it. A lock ends at its time, whatever becomes of the
application; the agent keeps it on disk.
"""

from __future__ import annotations

import os
import socket as sockets
import time
from pathlib import Path

from skerry_agent import __version__, appwire
from skerry_agent import workerwire as ww
from skerry_agent.errors import Degraded, Rejected, Transient
from skerry_agent.sdk.model import DEFAULT_SOCKET, SOCKET_VARIABLE
from skerry_agent.socket_path import short

_PATIENCE_S = 10.0


def lock_updates(reason: str, *, for_s: float, owner: str = "application", socket: str | Path | None = None) -> None:
    """Holds updates back for a while: they are fetched and checked, and begin to answer later. Another lock of the owner replaces it.

    Args:
        reason: in words, for whoever asks the device why.
        for_s: seconds; the agent's ``updates.lock_s`` is the most.
        owner: tells the locks of one user apart; the user is added by the agent.
        socket: as for ``open``.

    Raises:
        Rejected: ``bad_lock`` or ``too_many_locks``.
        Degraded: ``not_running``, ``not_allowed``, ``agent_too_old``, or it could not be stored.
        Transient: ``agent_silent``, or ``update_begins``: another bundle takes over right now; ask again in a moment.
    """
    _ask(appwire.Lock(owner=owner, reason=reason, for_s=for_s), socket)


def unlock_updates(*, owner: str = "application", socket: str | Path | None = None) -> None:
    """Ends a lock before its time. Raises as ``lock_updates``; ``Rejected`` (``not_locked``) when there is none."""
    _ask(appwire.Unlock(owner=owner), socket)


def _ask(wanted: ww.Message, where: str | Path | None) -> None:
    path = Path(where or os.environ.get(SOCKET_VARIABLE, "") or DEFAULT_SOCKET)
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as sock:
        sock.settimeout(_PATIENCE_S)
        try:
            with short(path) as address:
                sock.connect(address)
            appwire.send(sock, appwire.Hello(protocol=appwire.PROTOCOL, agent=__version__))
            welcome = _next(sock, path)
            if isinstance(welcome, appwire.Sorry):
                raise Degraded(welcome.code, welcome.detail)
            if not isinstance(welcome, appwire.Welcome) or not welcome.locks:
                raise Degraded("agent_too_old", f"the agent at {path} takes no locks of applications")
            appwire.send(sock, wanted)
            answer = _next(sock, path)
        except TimeoutError:
            raise Transient("agent_silent", f"{path}: no answer within {_PATIENCE_S:g} s") from None
        except OSError as error:
            advice = "run the agent, or name its apps.socket: socket=... or SKERRY_APPS_SOCKET"
            raise Degraded("not_running", f"no agent answers at {path}: {error.strerror}", advice=advice) from None
    if not isinstance(answer, appwire.Locked):
        raise Degraded("malformed", f"{path}: an unexpected {type(answer).__name__}")
    if not answer.ok:
        if answer.code == "update_begins":
            raise Transient(answer.code, answer.detail)
        kind = Rejected if answer.code in ("bad_lock", "too_many_locks", "not_locked") else Degraded
        raise kind(answer.code, answer.detail)


def _next(sock: sockets.socket, path: Path) -> ww.Message:
    """The next message. Raises ``TimeoutError`` after the whole patience, ``OSError``."""
    until_s = time.monotonic() + _PATIENCE_S
    sock.settimeout(max(0.01, until_s - time.monotonic()))
    try:
        found = appwire.receive_at_application(sock)
    except appwire.Malformed as error:
        raise Degraded("malformed", f"{path}: {error}") from None
    if found is None:
        raise Degraded("agent_away", f"{path}: the agent hung up")
    message, fds = found
    for fd in fds:
        os.close(fd)
    return message
