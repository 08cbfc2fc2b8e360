"""Reads the imports of the five packages from their source, without running it."""

from __future__ import annotations

import ast
import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEMBERS = {
    "skerry_contract": "contract",
    "skerry_runtime": "runtime",
    "skerry_agent": "agent",
    "skerry_server": "server",
    "skerry_cli": "cli",
}


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file: its dotted name, its tree, and every module it imports, wherever the statement stands.

    ``imports_when_imported`` leaves out what stands below ``if __name__ == "__main__"``.
    """

    name: str
    path: Path
    tree: ast.Module
    imports: frozenset[str]
    imports_when_imported: frozenset[str]

    @property
    def top_level_imports(self) -> frozenset[str]:
        """First parts of the names it imports."""
        return frozenset(name.partition(".")[0] for name in self.imports)


@functools.cache
def modules(package: str) -> dict[str, Module]:
    """The modules of a package by dotted name."""
    folder = ROOT / MEMBERS[package]
    files = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((folder / package).rglob("*.py"))
    }
    found = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        library = ast.Module([node for node in tree.body if not _is_main_guard(node)], [])
        found[name] = Module(
            name=name,
            path=path,
            tree=tree,
            imports=frozenset(_imports(tree, set(files))),
            imports_when_imported=frozenset(_imports(library, set(files))),
        )
    return found


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _imports(tree: ast.Module, ours: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                # "from package import module" means the module, "from module import name" the module too.
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in ours else node.module)
    return found


@functools.cache
def project(member: str) -> dict:
    """The ``[project]`` table of a member."""
    return tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]
