"""Asking the server to recompute the judge's rulings on a stage: it answers for some looks at a time, and here they are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skerry_cli.client import Api, quote
from skerry_cli.errors import Failed


def explain_stage(
    api: Api, rollout: str, stage: int | None = None, *, progress: Callable[[int, int], Any] = lambda _done, _of: None
) -> dict[str, Any]:
    """Every look of a stage, recomputed, as one answer.

    Args:
        stage: counted from 0; the last judged one when None.
        progress: called after each part but the last, with how many looks are recomputed and how many the stage has.

    Raises:
        Failed: refused or unreachable, or a part that brings nothing new.
    """
    path = f"/api/v1/rollouts/{quote(rollout)}/explain"
    whole: dict[str, Any] = api.get(path, stage=stage)
    while (after := whole["next"]) is not None:
        progress(len(whole["looks"]), whole["count"])
        part = api.get(path, stage=whole["stage"], after=after)
        if not part["looks"] or part["looks"][0]["number"] <= whole["looks"][-1]["number"]:
            raise Failed(f"{api.server}{path}: wanted the looks after {after}")
        # What is said of the whole stage is the newest: looks may be added meanwhile.
        alike = whole["identical"] and part["identical"]
        whole = part | {"looks": whole["looks"] + part["looks"], "identical": alike}
    return {name: value for name, value in whole.items() if name != "next"}
