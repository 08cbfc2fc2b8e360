"""The attacks that must fail, by name, and which tests carry them out: the one list that docs and tests are held against.

A test says what it attacks with ``@pytest.mark.attack("name", ...)``. The markers are read from the source, not from a run, so that the table in
``docs/explanation/attacks-and-tests.md`` can be made without importing anything; what a run collects is compared with it in
``tests/architecture/test_attacks.py``.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent

ATTACKS = {
    "arbitrary software": "a bundle that no approver signed is to run",
    "rollback of metadata": "signed files that were replaced are shown again",
    "rollback of a model": "an approved, older, worse version is assigned again",
    "freeze": "nothing newer is shown any more",
    "endless data": "a file has no end",
    "slow retrieval": "a file comes byte by byte, or not at all",
    "mix and match": "files of two honest moments are put together",
    "extraneous dependencies": "what was signed is to bring along what was not",
    "wrong-group document": "a group is given the signed document of another",
    "replayed bell": "bells are rung again, out of order, for ever",
    "clock poisoning": "a device, or a server, is told a wrong time",
    "cross-device publish": "a device speaks on another's topics, also through the broker's own (`$MQTT/msgs/...`)",
    "foreign client id": "a session is opened under the client id of another, on each broker that has a configuration here",
    "stolen server enrols a device": "whoever holds the server brings devices under another root",
    "stolen server slips a bundle in": "approvers are to sign a bundle that nobody proposed",
    "replay of a signed request": "a device's request is sent again by a proxy, or changed",
    "foreign names in a CSR": "a certificate request asks for another's name",
    "path traversal": "a name leads out of its folder",
    "decompression bomb": "few bytes unpack to very many",
    "symlink": "a link stands where a file or a folder of ours is to be",
    "oversized manifest": "a manifest has no bounds",
    "duplicate JSON key": "two readers of one document understand two things",
    "homoglyph name": "a name looks like another",
    "stolen repository": "encrypted bundles are read where they lie",
    "leaked content key": "with the content key of one version the deltas are opened that lead to and from another",
    "foreign content key": "a content key is used by another device, or for another bundle",
}
"""Name: what it tries."""

RECOVERIES = {
    "signed floors": "what serves below a floor that the approvers forced stops, and what was confirmed and is permitted comes back",
    "emergency return": "a device goes back to what it confirmed though the catalog has expired",
    "server restored from a backup": "devices that saw newer metadata are served again",
    "fast-forwarded versions": "a thief of the online key ran versions and time ahead; another key ends it",
}
"""What has to work after an attack or a mishap; marked and listed as the attacks are."""


class Marked(NamedTuple):
    """A test that carries out an attack. ``slow``: it does not run by default."""

    file: str
    name: str
    slow: bool

    @property
    def node(self) -> str:
        """As pytest names it, parameters left out."""
        return f"{self.file}::{self.name}"


def marked() -> dict[str, list[Marked]]:
    """By name of the attack: the tests that say that they are it, in the order of files and lines. Unknown names are kept."""
    found: dict[str, list[Marked]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if "mark.attack(" not in source:
            continue
        file = f"tests/{path.relative_to(TESTS).as_posix()}"
        tree = ast.parse(source)
        whole = any(
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets)
            and _is_slow([node.value])
            for node in tree.body
        )
        for prefix, function in _functions(tree):
            slow = whole or _is_slow(function.decorator_list)
            for name in _names(function.decorator_list):
                found.setdefault(name, []).append(Marked(file, prefix + function.name, slow))
    return found


def _functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    plain = [("", node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    return plain + [(f"{c.name}::", node) for c in classes for node in c.body if isinstance(node, ast.FunctionDef)]


def _names(decorators: list[ast.expr]) -> list[str]:
    calls = [d for d in decorators if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.attack"]
    return [ast.literal_eval(argument) for call in calls for argument in call.args]


def _is_slow(expressions: list[ast.expr]) -> bool:
    return any(name in ast.unparse(one) for one in expressions for name in ("mark.slow", "mark.bench"))


def table() -> str:
    """The list as a table, with how many attacks there are."""
    tests = marked()
    lines = []
    for title, names in (("attack", ATTACKS), ("afterwards", RECOVERIES)):
        lines += [
            "",
            f"| {title} | what it tries | tests |" if title == "attack" else f"| {title} | | tests |",
            "|---|---|---|",
        ]
        for name, words in names.items():
            by_file: dict[str, list[str]] = {}
            for test in tests.get(name, []):
                by_file.setdefault(test.file.removeprefix("tests/"), []).append(
                    f"`{test.name.rpartition('::')[2]}`" + (" (slow)" if test.slow else "")
                )
            shown = "; ".join(f"`{file}`: {', '.join(dict.fromkeys(held))}" for file, held in by_file.items())
            lines.append(f"| {name} | {words} | {shown} |")
    every = {test for name in ATTACKS for test in tests.get(name, [])}
    told = f"Attacks refused: {len(ATTACKS)} by name, by {len(every)} tests, of which {sum(not test.slow for test in every)} run in CI."
    return "\n".join([told, *lines])
