"""Writes the generated parts of the reference: ``python docs/generate.py``; with ``--check`` it only says which are stale.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``. What stands outside is written by hand.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def lifecycle_table() -> str:
    """The agent's table as the program prints it."""
    from skerry_agent.core import lifecycle

    return f"```\n{lifecycle.printed()}\n```"


def lifecycle_diagram() -> str:
    """The same table as a picture: one arrow per pair of states, with the events that take it."""
    from skerry_agent.core import lifecycle

    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), move in lifecycle.TABLE.items():
        if move.to != state:
            arrows.setdefault((state, move.to), []).append(event.__name__)
    order = lifecycle.STATES.index
    lines = [
        f"    {a} --> {b}: {', '.join(events)}"
        for (a, b), events in sorted(arrows.items(), key=lambda item: (order(item[0][0]), order(item[0][1])))
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> idle", *lines, "```"])


def hash64_vectors() -> str:
    """The test vectors of ``hash64``."""
    vectors = json.loads((ROOT / "tests" / "golden" / "v1" / "hash64.json").read_text())
    lines = ["| salt (hex) | id | hash64 |", "|---|---|---|"]
    lines += [f"| `{v['salt']}` | `{v['id']}` | {v['hash64']} |" for v in vectors]
    return "\n".join(lines)


def http_routes() -> str:
    """Every route of the server, with the role it needs."""
    import importlib
    import pkgutil

    from fastapi.routing import APIRoute
    from skerry_server import api

    rows = []
    for module in pkgutil.iter_modules(api.__path__):
        router = getattr(importlib.import_module(f"{api.__name__}.{module.name}"), "router", None)
        for route in router.routes if router is not None else []:
            if isinstance(route, APIRoute):
                rows += [(route.path, method, _needs(route), route.summary or "") for method in sorted(route.methods)]
    lines = ["| request | needs | does |", "|---|---|---|"]
    lines += [f"| `{method} {path}` | {needs} | {summary} |" for path, method, needs, summary in sorted(set(rows))]
    return "\n".join(lines)


def _needs(route: Any) -> str:
    if route.openapi_extra and "x-needs" in route.openapi_extra:
        return str(route.openapi_extra["x-needs"])
    hints = route.endpoint.__annotations__
    caller = hints.get("caller") or hints.get("_caller")
    if caller is not None:
        return str(caller).lower()
    return "device's signature" if "device" in hints and hints["device"] == "SignedByDevice" else "-"


def agent_keys() -> str:
    """Every key of ``agent.toml`` with its default."""
    from skerry_agent import config

    lines = ["| key | default |", "|---|---|", "| `state_dir` | none: must be set |"]
    for section, kind in get_type_hints(config.Config).items():
        if dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                lines.append(f"| `{section}.{field.name}` | {_shown(_default(field))} |")
    return "\n".join(lines)


def server_keys() -> str:
    """Every key of ``server.toml`` with its default."""
    import msgspec
    from skerry_server import config

    lines = ["| key | default |", "|---|---|"]
    for section, kind in config.SECTIONS.items():
        lines += [f"| `{section}.{field.name}` | {_shown(field.default)} |" for field in msgspec.structs.fields(kind)]
    return "\n".join(lines)


def attacks() -> str:
    """Every attack by name, with the tests that carry it out."""
    sys.path.append(str(ROOT))
    from tests import attacks as listed

    return listed.table()


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{json.dumps(list(value))}`"
    return f"`{json.dumps(value)}`"


PARTS: dict[str, Callable[[], str]] = {
    "lifecycle table": lifecycle_table,
    "lifecycle diagram": lifecycle_diagram,
    "hash64 vectors": hash64_vectors,
    "http routes": http_routes,
    "agent keys": agent_keys,
    "server keys": server_keys,
    "attacks by name": attacks,
}


def renewed(text: str) -> str:
    """The page with its generated parts made anew. Raises ``KeyError`` for a part that nobody makes."""

    def part(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end of {name} -->"

    return re.sub(r"<!-- generated: ([a-z0-9 ]+) -->.*?<!-- end of \1 -->", part, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """Renews the pages, or names the stale ones."""
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if renewed(text) != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in arguments:
                page.write_text(renewed(text), encoding="utf-8")
    for name in stale:
        print(f"{name}: {'is stale; run python docs/generate.py' if '--check' in arguments else 'renewed'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
