"""msgspec is not safe where two threads first read a type at once (``skerry_contract.reading``): each type is made ready at import."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.architecture.source import ROOT, modules

THREADED = ("skerry_contract", "skerry_runtime", "skerry_server")
READERS = ("convert", "decode")
RACE = """
import json, sys, threading
sys.setswitchinterval(1e-6)
import msgspec
from skerry_contract import manifest
document = json.loads(sys.stdin.read())
start = threading.Barrier(8)
def read():
    start.wait()
    msgspec.convert(document, manifest.Manifest)
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
MANIFEST = ROOT / "tests" / "golden" / "v1" / "manifest.json"


def named(tree: ast.AST) -> set[str]:
    """Classes that an expression names."""
    found = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
    }
    return {name for name in found if name.lstrip("_")[:1].isupper()}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [
        (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
    ]


def kinds_read(tree: ast.Module) -> set[str]:
    """Types by name that a module reads."""
    found: set[str] = set()
    for name, call in calls(tree):
        if name in READERS:
            found |= {kind for argument in call.args for kind in named(argument)}
            found |= {kind for argument in call.keywords if argument.arg == "type" for kind in named(argument.value)}
        elif name == "from_builtins" and isinstance(call.func, ast.Attribute):
            found |= named(call.func.value)
    return found


def made_ready(tree: ast.Module) -> set[str]:
    """Types that a module makes ready when it is imported."""
    found: set[str] = set()
    for statement in tree.body:
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for name, call in calls(statement):
                if name in ("ready", "Decoder"):
                    found |= {kind for argument in call.args for kind in named(argument)}
    return found


def test_every_type_that_threads_read_is_made_ready_at_import() -> None:
    trees = [module.tree for package in THREADED for module in modules(package).values()]
    ready = set().union(*(made_ready(tree) for tree in trees))
    # Read at the start, before there are threads.
    ready |= {"Settings"}
    wanted = set().union(*(kinds_read(tree) for tree in trees))
    assert {"Manifest", "GroupDocument", "State", "Ruling"} <= wanted, "the search finds what is known to be read"
    assert wanted - ready - {"MAX_INFLATED_BYTES", "MAX_MESSAGE_BYTES"} == set()


@pytest.mark.parametrize("attempt", range(3))
def test_threads_that_read_a_type_first_and_at_once_live(attempt: int) -> None:
    command = [sys.executable, "-c", RACE]
    ended = subprocess.run(command, input=MANIFEST.read_text(), capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), attempt
