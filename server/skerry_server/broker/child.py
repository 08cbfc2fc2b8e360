"""Becomes the broker, bound to the life of the server that started it.

``python -I child.py <parent pid> <program> <argument>...`` asks the kernel to kill this process when its parent dies, and then
replaces itself by the program. So a server that ends by ``kill -9`` leaves no broker behind. The request is made here and not
between fork and exec, where a process with threads may run next to nothing safely.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """See the module. Exits with 3 when the parent is gone already."""
    parent = int(arguments[0])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before the request was made.
    if os.getppid() != parent:
        raise SystemExit(3)
    os.execv(arguments[1], arguments[1:])  # noqa: S606  a program and arguments of our own making, without a shell


if __name__ == "__main__":
    main(sys.argv[1:])
