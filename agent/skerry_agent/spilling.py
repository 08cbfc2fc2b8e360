"""Messages too long for a datagram: they travel as a memory file whose descriptor rides on a short one.

The channel of a worker and the socket of applications do it alike; only what comes from an application is not believed.
"""

from __future__ import annotations

import os
import stat


def spill(data: bytes) -> int:
    """The descriptor of a memory file that holds the message; the caller's to close."""
    fd = os.memfd_create("skerry-message", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def unspill(fd: int, most_bytes: int | None = None) -> bytes:
    """The message in a file, whose descriptor is closed.

    Args:
        most_bytes: of a message that may be anybody's; None for one of our own.

    Raises:
        ValueError: it is no file, or a longer one.
        OSError: it cannot be read.
    """
    try:
        status = os.fstat(fd)
        # Not a pipe or a device, on which a read may wait for ever.
        if not stat.S_ISREG(status.st_mode) or (most_bytes is not None and status.st_size > most_bytes):
            raise ValueError(f"wanted a file of at most {most_bytes} bytes")
        return os.pread(fd, status.st_size, 0)
    finally:
        os.close(fd)
