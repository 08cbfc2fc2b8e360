"""The unix socket of the local endpoint: bound beside the TCP address, listened on by the same workers.

The supervisor holds the lock of the state folder when it comes here, so a socket file that nobody answers on is left over
from an agent that was killed and is replaced. One that answers belongs to another program and stays.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from skerry_agent.errors import Degraded
from skerry_agent.socket_path import short


class LocalSocket:
    """A bound unix socket, not yet listening. ``path`` is its file's."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self.path = path
        self.socket = sock
        self._inode = os.stat(path).st_ino

    def close(self) -> None:
        """Closes it and removes its file, unless another one stands there by now."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                self.path.unlink()


def bind(
    path: Path, mode: int, *, kind: int = socket.SOCK_STREAM, advice: str = "change serving.socket"
) -> LocalSocket:
    """Binds the socket.

    Args:
        path: absolute; its folder exists.
        mode: of the file, e.g. 0o660: who may connect.
        kind: of the socket.
        advice: for who meets another program there.

    Raises:
        Degraded: ``address_in_use`` when something else is there or the folder cannot be written.
    """
    # Bound under another name and moved into place with its mode: nobody meets it with the mode of the umask.
    temporary = path.with_name(f".{os.getpid()}.sock")
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        _require_free(path, kind, advice)
        temporary.unlink(missing_ok=True)
        with short(temporary) as address:
            sock.bind(address)
        os.chmod(temporary, mode)
        os.rename(temporary, path)
        return LocalSocket(path, sock)
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Degraded("address_in_use", f"{path}: {error.strerror or error}", advice=advice) from None
    except Degraded:
        sock.close()
        raise


def _require_free(path: Path, type_: int, advice: str) -> None:
    try:
        kind = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise Degraded("address_in_use", f"{path} is there and no socket", advice=f"{advice}, or remove it")
    with socket.socket(socket.AF_UNIX, type_) as probe:
        probe.settimeout(1.0)
        try:
            with short(path) as address:
                probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError as error:
            raise Degraded("address_in_use", f"{path}: {error}", advice=advice) from None
    raise Degraded("address_in_use", f"{path}: another program answers there", advice=advice)
