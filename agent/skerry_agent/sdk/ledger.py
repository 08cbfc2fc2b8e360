"""What was counted in this process and is not yet in the agent's store: the files of the rings and label books, and windows cut from them.

A window that was sent stays as it is until the agent says what its store holds; only some are on their way at a time. The oldest of the
others merge beyond a number, exactly, so that memory is bounded and no inference is forgotten while the agent is away, hangs, or
cannot store. Belongs to the connection's thread,
but for ``take``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import deque
from dataclasses import dataclass, field

from skerry_contract import window as w
from skerry_contract import wire

from skerry_agent import workerwire as ww

MOST_WAITING = 64
"""Windows of a ring that are kept apart."""
MOST_SENT = 16
"""Windows of a ring that are on their way, so not yet in the agent's store."""
MOST_POSITIONS = 1 << 22
"""A merged window spans at most so many: beyond twice that a sum of squares could leave int64."""


@dataclass(slots=True)
class Waiting:
    """A window or the end of a book, in its order."""

    message: ww.WindowCut | ww.BookClosed
    sent: bool = False


@dataclass(slots=True, kw_only=True)
class File:
    """A ring or a label book that the agent gave away.

    Attributes:
        ring: the ring that it is, or belongs to.
        descriptor: proves after a reconnection that it is ours.
        waiting: what the agent's store does not have yet.
        ready: whether the agent knows on this connection that we hold it.
        upto: nothing more will come after this position; None while something may.
    """

    ring: str
    path: str
    descriptor: int
    key: w.Key
    version: str
    waiting: deque[Waiting] = field(default_factory=deque)
    ready: bool = True
    upto: int | None = None

    def release(self) -> None:
        """Gives up the lock and the descriptor."""
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1

    def abandon(self) -> int:
        """Leaves the lock to the parent of this process; returns the descriptor, which is to be closed."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def hold(self) -> None:
        """Takes the lock again that the end of a mapping gave up: windows of the file still wait here."""
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def committed(self, upto: int) -> None:
        """The store holds everything below ``upto``."""
        while self.waiting:
            first = self.waiting[0].message
            if not isinstance(first, ww.WindowCut) or first.upto > upto:
                return
            self.waiting.popleft()

    def unsend(self, upto: int) -> None:
        """A new connection: what the store lacks is sent again."""
        self.committed(upto)
        for one in self.waiting:
            one.sent = False

    @property
    def room(self) -> bool:
        """Whether another window may be on its way: only the first ones that wait are."""
        return len(self.waiting) < MOST_SENT or not self.waiting[MOST_SENT - 1].sent

    def squeeze(self) -> None:
        """Merges the oldest windows that were not sent, where more than ``MOST_WAITING`` wait."""
        if len(self.waiting) <= MOST_WAITING:
            return
        for i in range(len(self.waiting) - 1):
            a, b = self.waiting[i].message, self.waiting[i + 1].message
            if self.waiting[i].sent or not isinstance(a, ww.WindowCut) or not isinstance(b, ww.WindowCut):
                continue
            if b.upto - a.start <= MOST_POSITIONS:
                self.waiting[i].message = merged(a, b)
                del self.waiting[i + 1]
                return


def merged(a: ww.WindowCut, b: ww.WindowCut) -> ww.WindowCut:
    """One window for two that follow each other."""
    both = [wire.decode(w.Window, cut.body, max_bytes=wire.MAX_INFLATED_BYTES) for cut in (a, b)]
    return ww.WindowCut(
        ring=a.ring,
        start=a.start,
        upto=b.upto,
        body=wire.encode(w.merge(*both)),
        inferences=a.inferences + b.inferences,
    )


class Ledger:
    """The files by path."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self._new: deque[ww.WindowCut | ww.BookClosed] = deque()

    def take(self, message: ww.WindowCut | ww.BookClosed) -> None:
        """Takes what a recorder or a book cut; from any thread."""
        self._new.append(message)

    def sort_in(self) -> None:
        """Puts what came to its file; merges what is too much."""
        while self._new:
            message = self._new.popleft()
            file = self.files.get(message.ring if isinstance(message, ww.WindowCut) else message.book)
            if file is not None:
                file.waiting.append(Waiting(message))
                file.squeeze()

    @property
    def empty(self) -> bool:
        """Whether the agent's store holds everything that was cut."""
        return not self._new and not any(file.waiting for file in list(self.files.values()))

    def forget(self, path: str) -> None:
        """A file is over."""
        file = self.files.pop(path, None)
        if file is not None:
            file.release()
