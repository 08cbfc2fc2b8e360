"""Every module of ``tests/bench`` is a benchmark or said to be none, so that ``make bench`` ends as its figures do."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.bench import __main__ as benches
from tests.bench import finetunes, update_bytes
from tests.bench.result import scratch

FOLDER = Path(benches.__file__).parent


def runs(name: str) -> bool:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    return any(isinstance(part, ast.FunctionDef) and part.name == "run" for part in tree.body)


def test_what_is_listed_as_a_benchmark_can_be_run() -> None:
    assert [name for name in benches.names() if not runs(name)] == []


def test_what_is_said_to_be_no_benchmark_is_here_and_is_none() -> None:
    assert [name for name in sorted(benches.NOT_BENCHMARKS) if not (FOLDER / f"{name}.py").exists() or runs(name)] == []


def test_the_fine_tunes_that_benchmarks_name_are_made() -> None:
    assert sorted({*update_bytes.PAIRS, *finetunes.LOW_RATE} - {*finetunes.NAMES}) == []


def test_what_one_benchmark_takes_from_another_module_of_the_tests_is_defined_there() -> None:
    lacking = []
    for path in sorted(FOLDER.glob("*.py")):
        for part in ast.walk(ast.parse(path.read_text())):
            if isinstance(part, ast.ImportFrom) and part.module is not None and part.module.startswith("tests"):
                lacking += [
                    f"{path.name}: {part.module}.{one.name}" for one in part.names if not has(part.module, one.name)
                ]
    assert lacking == []


def has(module: str, name: str) -> bool:
    place = FOLDER.parents[1].joinpath(*module.split("."))
    if (place / f"{name}.py").exists():
        return True
    tree = ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text())
    defined = {part.name for part in ast.walk(tree) if isinstance(part, ast.FunctionDef | ast.ClassDef)}
    defined |= {part.id for part in ast.walk(tree) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return name in defined


def test_a_fresh_clone_has_room_for_what_benchmarks_write(tmp_path: Path) -> None:
    for _ in range(2):
        assert scratch(tmp_path).is_dir()
