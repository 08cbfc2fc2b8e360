"""Says whether the service manager may be told that the agent is well: ``WATCHDOG=1`` is sent for nothing less.

A ping that only proves that a loop turns hides what the loop is for. Withheld, it makes the manager end the agent and start it
again, which is right where that may help: the store failed, or nothing has answered for longer than a worker needs to load,
to be found hung and to be replaced. Where nothing is to be served, nothing has to answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What the loop saw.

    Attributes:
        store_failed: the store gave an error that a restart cures.
        should_answer: a confirmed bundle is here.
        unanswered_s: since the endpoint last answered a request of the agent's own, or since something should.
    """

    store_failed: bool
    should_answer: bool
    unanswered_s: float


def judge_health(health: Health, unserved_s: float) -> str:
    """Why the ping is withheld; empty when it is not.

    >>> judge_health(Health(store_failed=False, should_answer=True, unanswered_s=12.0), 300.0)
    ''
    >>> judge_health(Health(store_failed=False, should_answer=True, unanswered_s=301.0), 300.0)
    'nothing has answered for 301 s, at most 300 s'
    """
    if health.store_failed:
        return "the store failed"
    if health.should_answer and health.unanswered_s > unserved_s:
        return f"nothing has answered for {health.unanswered_s:.0f} s, at most {unserved_s:g} s"
    return ""
