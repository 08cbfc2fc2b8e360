"""What the demo says: headings, plain sentences, and one line of progress that is replaced while something goes on.

On a terminal the progress line is redrawn in place; into a file or a pipe it is written now and then, so that a log stays
readable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.status import Status
from rich.text import Text

_QUIET_S = 8.0


class Screen:
    """See the module. ``clock``: monotonic seconds."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        # Into a pipe nobody says how wide a table may be.
        self._console = console or Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
        self._clock = clock
        self._began = clock()
        self._status: Status | None = None
        self._shown = ""
        self._shown_at = float("-inf")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return self._clock() - self._began

    @property
    def console(self) -> Console:
        """For tables."""
        return self._console

    def heading(self, text: str) -> None:
        """Begins a step."""
        self.settle()
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def say(self, text: str, *, style: str = "") -> None:
        """One plain sentence, with the time since the demo began."""
        self.settle()
        self._console.print(Text(f"{self.elapsed_s:6.1f}s  ", style="dim") + Text(text, style=style))

    def progress(self, text: str) -> None:
        """What is going on now."""
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(Text(text))
                self._status.start()
            else:
                self._status.update(Text(text))
            return
        now = self._clock()
        if text != self._shown and now - self._shown_at >= _QUIET_S:
            self._console.print(f"{self.elapsed_s:6.1f}s  ... {text}", markup=False)
            self._shown, self._shown_at = text, now

    def settle(self) -> None:
        """Takes the progress line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        with suppress(OSError, ValueError):
            sys.stdout.flush()
