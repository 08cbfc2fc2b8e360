"""Every attack that must fail has a test that carries it out, and the attacker table names tests that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests import attacks
from tests.architecture.source import ROOT

PAGES = ("attacks-and-tests.md", "security-model.md")
NAMED = re.compile(r"`(test_\w+)`")
FILE = re.compile(r"`((?:unit|integration|system|architecture|golden)/[\w/]+\.py)`")


def test_every_attack_has_a_test_that_runs_by_default() -> None:
    found = attacks.marked()
    lacking = [
        name
        for name in {**attacks.ATTACKS, **attacks.RECOVERIES}
        if not any(not test.slow for test in found.get(name, []))
    ]
    assert lacking == []


def test_no_test_names_an_attack_that_is_not_in_the_list() -> None:
    assert set(attacks.marked()) - {*attacks.ATTACKS, *attacks.RECOVERIES} == set()


def test_what_the_markers_say_is_what_is_collected(request: pytest.FixtureRequest) -> None:
    """In a run of everything. A run of less has only its own files, or nothing that could be compared."""
    config = request.config
    if (
        config.option.keyword
        or config.option.markexpr != "not slow and not bench"
        or any("::" in one for one in config.args)
    ):
        pytest.skip("a part of the tests was chosen")
    items = request.session.items
    files = {item.path.relative_to(ROOT).as_posix() for item in items}
    collected = {
        (name, item.nodeid.partition("[")[0])
        for item in items
        for mark in item.iter_markers("attack")
        for name in mark.args
    }
    listed = {
        (name, test.node)
        for name, tests in attacks.marked().items()
        for test in tests
        if not test.slow and test.file in files
    }
    assert collected == listed


@pytest.mark.parametrize("page", PAGES)
def test_the_attacker_table_names_tests_that_exist(page: str) -> None:
    """In each cell a test belongs to the file before it; without one it is of any file."""
    text = (ROOT / "docs" / "explanation" / page).read_text()
    defined = {path: _tests(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")}
    anywhere = set().union(*defined.values())
    wrong = []
    for line in text.splitlines():
        file = ""
        for found in re.finditer(r"`[^`]+`", line):
            if match := FILE.fullmatch(found.group()):
                file = match.group(1)
                if (ROOT / "tests" / file) not in defined:
                    wrong.append(file)
            elif match := NAMED.fullmatch(found.group()):
                known = defined.get(ROOT / "tests" / file, set()) if file else anywhere
                if match.group(1) not in known and not match.group(1).endswith("_"):
                    wrong.append(f"{file}: {match.group(1)}")
    assert wrong == []


def _tests(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
