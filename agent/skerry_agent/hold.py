"""What one agent holds alone: its state folder, and the addresses of the applications.

A worker of a former life may still hold the addresses; it is waited for, and ended when it hangs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from skerry_agent import local_socket
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.errors import Degraded
from skerry_agent.leftovers import Roll
from skerry_agent.local_socket import LocalSocket
from skerry_agent.logs import kv

log = logging.getLogger(__name__)

_FORMER_S = 3.0
"""A worker of a former life gives up the address at once, unless it hangs; so long it may be merely slow."""
_KILLED_S = 5.0


def lock(config: Config) -> int:
    """One agent per state folder. The lock ends with the process, however it ends.

    Returns:
        Its descriptor, to be kept.

    Raises:
        Degraded: ``already_running``; ``storage_failed`` where nothing can be written.
    """
    path = config.run_dir / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        advice = "mount it to be written; a card that was remounted to be read only is worn out: replace it"
        if error.errno != errno.EROFS:
            advice = "check the disk and its rights"
        raise Degraded("storage_failed", f"{path}: {error.strerror}", advice=advice) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Degraded(
            "already_running", f"another agent uses {config.state_dir}", advice="stop it, or use another state_dir"
        ) from None
    return descriptor


def bind(config: Config, roll: Roll, clock: Clock) -> socket.socket | None:
    """The address of the applications, bound and not yet listening: the first worker makes it accept. None where none is wanted.

    Port 0 takes a free port once and keeps it over restarts, so that applications find the agent again.

    Raises:
        Degraded: ``address_in_use``.
    """
    host, port = config.serving.host, config.serving.port
    if port == "none":
        return None
    family = socket.AF_INET6 if ":" in config.serving.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if port == 0 and (last := _last_port(config)) != 0:
        try:
            _bind_behind(sock, host, last, roll, clock)
            return sock
        except (OSError, OverflowError) as error:
            log.warning("address is taken; using another", extra=kv(host=host, port=last, detail=str(error)))
    try:
        _bind_behind(sock, host, port, roll, clock)
    except OSError as error:
        sock.close()
        raise Degraded("address_in_use", f"{host}:{port}: {error.strerror}", advice="change serving.port") from None
    return sock


def _bind_behind(sock: socket.socket, host: str, port: int, roll: Roll, clock: Clock) -> None:
    """Binds, once a worker of a former life has given the address up. One that hangs is ended."""
    began_s, ended = clock.boot_s(), False
    while True:
        # Asked first: one that goes between the two leaves the address free for another try.
        former = roll.former()
        try:
            sock.bind((host, port))
            return
        except OSError as error:
            waited_s = clock.boot_s() - began_s
            if error.errno != errno.EADDRINUSE or not former or waited_s > _FORMER_S + _KILLED_S:
                raise
        if waited_s > _FORMER_S and not ended:
            roll.end_former()
            ended = True
        time.sleep(0.02)


def bind_local(config: Config, roll: Roll, clock: Clock) -> LocalSocket | None:
    """The unix socket beside the address, once a worker of a former life has given it up; None where none is wanted.

    Raises:
        Degraded: ``address_in_use``.
    """
    serving = config.serving
    if not serving.socket:
        return None
    began_s, ended = clock.boot_s(), False
    while True:
        # Asked first, as above.
        former = roll.former()
        try:
            return local_socket.bind(Path(serving.socket), int(serving.socket_mode, 8))
        except Degraded:
            waited_s = clock.boot_s() - began_s
            if not former or waited_s > _FORMER_S + _KILLED_S:
                raise
        if waited_s > _FORMER_S and not ended:
            roll.end_former()
            ended = True
        time.sleep(0.02)


def _last_port(config: Config) -> int:
    try:
        return int(json.loads((config.run_dir / "serving.json").read_bytes())["port"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
