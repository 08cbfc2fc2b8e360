"""The looks of a stage are asked for in parts and put together; a server that repeats itself is not asked for ever."""

from __future__ import annotations

from typing import Any

import pytest
from skerry_cli.errors import Failed
from skerry_cli.explaining import explain_stage


class Server:
    """Answers as the server does for a stage of so many looks, of which one comes out otherwise; looks are added while it is asked."""

    server = "https://server"

    def __init__(self, looks: int, *, bad: int = 0, grows: int = 0) -> None:
        self.looks, self.bad, self.grows = looks, bad, grows
        self.asked: list[tuple[int | None, int]] = []

    def get(self, path: str, *, stage: int | None = None, after: str = "0") -> dict[str, Any]:
        assert path == "/api/v1/rollouts/r-1/explain"
        self.asked.append((stage, int(after)))
        numbers = range(int(after) + 1, min(int(after) + 50, self.looks) + 1)
        looks = [{"number": n, "identical": n != self.bad} for n in numbers]
        ends = int(after) + 50 >= self.looks
        answer = {"stage": 1, "looks": looks, "count": self.looks, "identical": self.bad not in numbers}
        answer |= {"next": None if ends else str(numbers[-1]), "ruling": {"look": self.looks}}
        self.looks += self.grows
        return answer


def test_all_looks_come_as_one_answer_and_the_rollout_may_move_on_meanwhile() -> None:
    told: list[tuple[int, int]] = []
    server = Server(120, bad=70, grows=3)
    found = explain_stage(server, "r-1", progress=lambda done, of: told.append((done, of)))  # type: ignore[arg-type]
    assert [look["number"] for look in found["looks"]] == list(range(1, 127))
    assert (found["identical"], found["count"], found["ruling"], "next" in found) == (False, 126, {"look": 126}, False)
    assert server.asked == [(None, 0), (1, 50), (1, 100)], "the stage that was meant first"
    assert told == [(50, 120), (100, 123)]


def test_a_short_stage_is_asked_once_and_without_a_word() -> None:
    server = Server(50)
    found = explain_stage(server, "r-1", 1, progress=lambda *_: pytest.fail("nothing to wait for"))  # type: ignore[arg-type]
    assert (len(found["looks"]), found["identical"], server.asked) == (50, True, [(1, 0)])


def test_a_server_that_repeats_itself_is_not_asked_for_ever() -> None:
    class Again(Server):
        def get(self, path: str, **_asked: Any) -> dict[str, Any]:
            return super().get(path)

    with pytest.raises(Failed, match="wanted the looks after 50"):
        explain_stage(Again(120), "r-1")  # type: ignore[arg-type]
