"""How a bundle in shadow is doing, judged like a serving worker: it must end when it hangs or grows.

Nobody waits for its answers, so nobody would notice; meanwhile it has a core and memory that others need, and no pair comes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from skerry_agent.core import liveness

LOOK_S = 2.0
"""More than this between two looks is time in which nobody ran: a suspended device, a supervisor kept busy."""


@dataclass(kw_only=True, slots=True)
class Care:
    """Of one process in shadow. Times are the supervisor's, seconds, monotonic.

    Attributes:
        needs_mb: what the model declares; slack_mb: what it may have beyond, from the configuration.
        code, detail: why it must end; empty while it need not.
    """

    needs_mb: float
    slack_mb: float
    code: str = ""
    detail: str = ""
    _most_mb: float = 0.0
    _own_mb: float = 0.0
    _looked_s: float = 0.0
    _life: liveness.Life = field(default_factory=lambda: liveness.Life(silent_s=0.0))

    def begin(self, now_s: float, *, base_mb: float, ready_mb: float) -> None:
        """It is loaded and proved."""
        self._looked_s = now_s
        self._most_mb = liveness.allowed_mb(
            base_mb=base_mb, ready_mb=ready_mb, needs_mb=self.needs_mb, slack_mb=self.slack_mb
        )

    def hear(self, now_s: float, *, own_mb: float, busy_s: float, expected_s: float) -> None:
        """It has reported."""
        self._looked_s, self._own_mb = now_s, own_mb
        self._life = liveness.Life(silent_s=0.0, busy_s=busy_s, expected_s=expected_s)

    def look(self, now_s: float, limits: liveness.Limits) -> bool:
        """Whether it must end, found just now."""
        silent_s = self._life.silent_s + min(max(0.0, now_s - self._looked_s), LOOK_S)
        self._looked_s, self._life = now_s, replace(self._life, silent_s=silent_s)
        if self.code:
            return False
        hung = liveness.judge_liveness(self._life, limits)
        if hung:
            self.code, self.detail = "worker_hung", hung
        elif self._own_mb > self._most_mb:
            self.code = "worker_leaked"
            self.detail = f"{self._own_mb:.0f} MB of its own, at most {self._most_mb:.0f} MB"
        return bool(self.code)
