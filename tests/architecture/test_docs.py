"""The documentation says what is true: links lead somewhere, commands exist, generated parts are fresh, codes are complete."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from skerry_agent import cli as agent_cli
from skerry_agent.core import lifecycle
from skerry_cli import app as operator_cli
from skerry_runtime.errors import ADVICE
from skerry_server import cli as server_cli

from tests.architecture.source import ROOT, modules
from tests.golden.formats import STRUCTS
from tests.integration.server.test_access import COMMANDS, ROLES

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md"), ROOT / "tests/golden/README.md"]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
ADRS = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_generated_parts_are_fresh() -> None:
    check = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_names_the_role_that_a_route_wants() -> None:
    """Against the table that a real server is tried with."""
    rows = re.findall(
        r"^\| `([A-Z]+) (\S+)` \| ([^|]+) \|", (ROOT / "docs" / "reference" / "http-api.md").read_text(), re.MULTILINE
    )
    needs = {(method, re.sub(r"\{\w+\}", "[^/]+", path)): cell.strip() for method, path, cell in rows}
    for method, path, body, may in COMMANDS:
        (cell,) = {cell for (m, pattern), cell in needs.items() if m == method and re.fullmatch(pattern, path)}
        role = cell
        if "(" in cell:
            assert isinstance(body, dict)
            (role,) = [
                found for found, what in re.findall(r"(\w+) \(([^)]*)\)", cell) if body["role"] in what.split(", ")
            ]
        assert may == (set(ROLES) if role == "viewer" else {role, "admin"}), (method, path, cell)


def commands_named() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for block in SHELL.findall(page.read_text()):
            for line in re.split(r"[\n|;&]|\$\(", block.replace("\\\n", " ")):
                words = line.split("#")[0].strip().rstrip(")").split(">")[0]
                if re.match(r"(skerry|skerry-agent|skerry-server) ", words):
                    found.append((shown(page), shlex.split(words)))
    return found


def test_some_commands_are_found() -> None:
    assert len(commands_named()) > 15


@pytest.mark.parametrize(("page", "words"), commands_named(), ids=lambda value: " ".join(value)[:60])
def test_commands_in_the_documentation_exist(page: str, words: list[str]) -> None:
    program, *arguments = words
    if program == "skerry":
        command = typer.main.get_command(operator_cli.app)
        while hasattr(command, "commands") and arguments:
            name = arguments.pop(0)
            assert name in command.commands, f"{page}: skerry has no command {name}"
            command = command.commands[name]
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    else:
        parser = server_cli.parser() if program == "skerry-server" else agent_cli._parser()
        (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        name = arguments.pop(0)
        assert name in choices, f"{page}: {program} has no command {name}"
        known = set(choices[name]._option_string_actions)
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for page in PAGES for target in re.findall(r"(?:`|^|&& )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert named - {"sure", "a"} <= targets
    assert {"demo", "test"} <= named


def test_the_two_commands_are_the_first_in_the_readme() -> None:
    first = SHELL.search((ROOT / "README.md").read_text())
    assert first is not None
    assert first.group(1).split("\n")[:2] == ["make demo", "make test"]


def codes_of_the_agent() -> set[str]:
    """What the lifecycle can end with, and the first argument of every error that names one."""
    found = {code.partition("@")[0] for code in lifecycle.ATTEMPTS}
    found |= {move.code for move in lifecycle.TABLE.values() if move.code}
    for module in modules("skerry_agent").values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "Rejected",
                "Degraded",
                "Transient",
                "Refusal",
            ):
                if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    found.add(node.args[0].value)
    return found


def test_every_reason_code_is_explained() -> None:
    page = (ROOT / "docs" / "reference" / "reason-codes.md").read_text()
    explained = set(re.findall(r"`([a-z_]+)`", page))
    assert codes_of_the_agent() - explained == set()
    assert set(ADVICE) - explained == set()


def test_every_attempt_limit_is_stated() -> None:
    page = (ROOT / "docs" / "reference" / "reason-codes.md").read_text()
    for code, limit in lifecycle.ATTEMPTS.items():
        (row,) = re.findall(rf"^\| `{code.partition('@')[0]}` \|.*\| (.*) \|$", page, re.MULTILINE)
        assert f"{limit}" in row, code


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_every_field_of_a_format_stands_in_the_reference(kind: type) -> None:
    page = (ROOT / "docs" / "reference" / "formats.md").read_text()
    assert {name for name in kind.__struct_fields__ if name != "extra" and f"`{name}`" not in page} == set()


@pytest.mark.parametrize("adr", ADRS, ids=lambda path: path.stem)
def test_a_decision_says_what_it_costs(adr: Path) -> None:
    text = adr.read_text()
    assert re.match(rf"# {adr.name[:4]}\. ", text)
    assert "Status:" in text
    for heading in ("Context", "Decision", "Consequences"):
        assert re.search(rf"^#+ {heading}$", text, re.MULTILINE), heading
    assert len(re.findall(r"^Bad:\n\n(?:- )", text, re.MULTILINE)) >= 1


def test_decisions_have_numbers_of_their_own_and_stand_in_the_list() -> None:
    numbers = [adr.name[:4] for adr in ADRS]
    assert len(set(numbers)) == len(numbers)
    listed = re.findall(r"^\| \[(\d{4})\]\(([^)]+)\)", (ROOT / "docs" / "adr" / "README.md").read_text(), re.MULTILINE)
    assert listed == [(adr.name[:4], adr.name) for adr in ADRS]
