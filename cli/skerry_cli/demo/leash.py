"""Runs a program that ends with the demo: sets the parent-death signal, then becomes the program.

Called by path with ``python -I -S``, so that it costs a few milliseconds and imports nothing of ours. Where the system has no
such signal (it is Linux's), the program is run all the same, and the demo's own clean-up is the only one.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """``leash.py <pid of the demo> <program> <arguments>``."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died between the fork and the call above: no signal will come
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the command is the demo's own


if __name__ == "__main__":
    main()
