"""Every module of ``tests/bench`` is a benchmark or said to be none, so that ``make bench`` ends as its figures do."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.bench import __main__ as benches
from tests.bench.result import scratch

FOLDER = Path(benches.__file__).parent


def runs(name: str) -> bool:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    return any(isinstance(part, ast.FunctionDef) and part.name == "run" for part in tree.body)


def test_what_is_listed_as_a_benchmark_can_be_run() -> None:
    assert [name for name in benches.names() if not runs(name)] == []


def test_what_is_said_to_be_no_benchmark_is_here_and_is_none() -> None:
    assert [name for name in sorted(benches.NOT_BENCHMARKS) if not (FOLDER / f"{name}.py").exists() or runs(name)] == []


def test_a_fresh_clone_has_room_for_what_benchmarks_write(tmp_path: Path) -> None:
    for _ in range(2):
        assert scratch(tmp_path).is_dir()
