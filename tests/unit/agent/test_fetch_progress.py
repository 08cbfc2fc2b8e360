"""What is told of a download, and how often."""

from __future__ import annotations

import pytest
from skerry_agent.progress import TELL_S, FetchProgress
from skerry_contract import wire


class Boot:
    def __init__(self) -> None:
        self.now_s = 100.0

    def boot_s(self) -> float:
        return self.now_s


def line(done: int, size: int = 1000) -> dict[str, object]:
    return {"file": "model.onnx", "done": done, "size": size, "total_done": done, "total_size": size}


@pytest.fixture
def boot() -> Boot:
    return Boot()


def test_a_short_download_is_not_told_and_a_long_one_now_and_then(boot: Boot) -> None:
    told: list[int] = []
    progress = FetchProgress(boot, lambda: told.append(progress.now.done), 1.0)  # type: ignore[arg-type,union-attr]
    progress.begin()
    for second in range(100):
        boot.now_s = 100.0 + second
        progress.take(line(second * 10))
    assert told == [300, 600, 900]
    assert TELL_S == 30.0
    progress.end()
    assert (progress.now, progress.status()) == (None, None)


def test_speed_counts_what_came_and_not_what_was_here(boot: Boot) -> None:
    progress = FetchProgress(boot, lambda: None, 1.0)  # type: ignore[arg-type]
    progress.begin()
    boot.now_s += 5
    progress.take(line(600))
    assert progress.status() == {
        "file": "model.onnx", "done_bytes": 600, "size_bytes": 1000, "bytes_per_s": 0.0, "left_s": None,
    }  # fmt: skip
    boot.now_s += 10
    progress.take(line(700))
    assert progress.now == wire.Progress(done=700, size=1000)
    status = progress.status()
    assert status is not None
    assert (status["bytes_per_s"], status["left_s"]) == (10.0, 30.0)


@pytest.mark.parametrize(
    "said",
    [{}, line(-1), line(2000), {**line(1), "total_done": "1"}, {**line(1), "total_size": None}, line(1, 1 << 64)],
)
def test_a_line_that_cannot_be_is_passed_over(boot: Boot, said: dict[str, object]) -> None:
    progress = FetchProgress(boot, lambda: None, 0.0)  # type: ignore[arg-type]
    progress.begin()
    progress.take(said)
    assert progress.now is None
