"""Which model a worker is at: a few bytes of memory that it shares with the supervisor, who reads them when it is dead."""

from __future__ import annotations

import mmap
import os


class Note:
    """One worker's note: a byte per thread that runs models, holding the number of the model in work, or 0.

    Args:
        models: in the order of their numbers, from 1; a worker of one model needs no note.
    """

    SIZE = 2

    def __init__(self, models: tuple[str, ...]) -> None:
        self._models = models
        self.fd: int | None = None
        if len(models) > 1:
            try:
                self.fd = os.memfd_create("skerry-note", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, mmap.PAGESIZE)
            except OSError:
                # Out of descriptors: whoever brings it down then stays unnamed.
                self.close()

    def suspects(self) -> tuple[str, ...]:
        """Models that were in work; the only one where there is but one."""
        if len(self._models) == 1:
            return self._models
        if self.fd is None:
            return ()
        found = {number for number in os.pread(self.fd, self.SIZE, 0) if 0 < number <= len(self._models)}
        return tuple(self._models[number - 1] for number in sorted(found))

    def close(self) -> None:
        """Gives the memory up."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
