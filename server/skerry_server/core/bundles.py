"""The life of a bundle on the server: a table. Pure.

``draft`` (pushed) -> ``validated`` (ran in a child process) -> ``approved`` (an installed catalog lists it) -> ``deprecated`` (still
runs, no new rollouts) -> ``retired`` (final). ``rejected`` from the first two; only validating it again leads out, since what
rejected it may have been this server: too little time, too little memory. A catalog that no longer lists a bundle retires it.
"""

from __future__ import annotations

from typing import Literal

State = Literal["draft", "validated", "approved", "deprecated", "retired", "rejected"]
Action = Literal["pass", "reject", "list", "delist", "deprecate", "retire"]

TRANSITIONS: dict[tuple[State, Action], State] = {
    ("draft", "pass"): "validated",
    ("draft", "reject"): "rejected",
    ("validated", "reject"): "rejected",
    ("rejected", "pass"): "validated",
    ("rejected", "reject"): "rejected",
    ("validated", "list"): "approved",
    ("approved", "deprecate"): "deprecated",
    ("approved", "delist"): "retired",
    ("approved", "retire"): "retired",
    ("deprecated", "delist"): "retired",
    ("deprecated", "retire"): "retired",
}


def allowed(state: State) -> list[Action]:
    """What can be done with a bundle in this state, sorted."""
    return sorted(action for held, action in TRANSITIONS if held == state)
