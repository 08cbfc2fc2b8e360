"""The tool as a person runs it: a process of its own, against a real server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from skerry_cli import app

from tests import models, warm
from tests.rig_server import ServerRig


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs ``skerry`` with an environment of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def __call__(self, *arguments: str | Path, given: str = "", **environment: str) -> Done:
        found = warm.run(
            "skerry_cli", [str(one) for one in arguments], env=self._whole(environment), given=given, timeout=90
        )
        assert "Traceback" not in found.stderr, found.stderr
        return Done(found.returncode, found.stdout, found.stderr)

    def open(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts ``skerry`` and leaves it running; its stdout is a pipe."""
        command = [sys.executable, "-m", "skerry_cli", *arguments]
        return subprocess.Popen(command, env=self._whole({}), stdout=subprocess.PIPE, text=True)

    def _whole(self, environment: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")}
        return {**kept, "HOME": str(self.folder), "SKERRY_CONFIG": "", **self.environment, **environment}


class CliHere(Cli):
    """The same tool in this process, for tests with many commands: what a start costs is not theirs to show."""

    def __call__(self, *arguments: str | Path, given: str = "", **environment: str) -> Done:
        before, stdin = dict(os.environ), sys.stdin
        out, err = io.StringIO(), io.StringIO()
        os.environ.clear()
        os.environ.update(self._whole(environment))
        sys.stdin = io.StringIO(given)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = app.run([str(argument) for argument in arguments])
        finally:
            sys.stdin = stdin
            os.environ.clear()
            os.environ.update(before)
        return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    rig = ServerRig(tmp_path_factory.mktemp("server") / "data").start()
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operator")


@pytest.fixture(scope="module")
def cli(server: ServerRig, folder: Path) -> Cli:
    """The tool of an operator who has held the ceremony and published it."""
    run = Cli(
        folder,
        {
            "SKERRY_SERVER": server.ready["url"],
            "SKERRY_TOKEN": (server.data / "admin.token").read_text().strip(),
            "SKERRY_CA": str(server.data / "ca" / "ca.pem"),
            "SKERRY_KEYS": str(folder / "keys"),
        },
    )
    done = run("keys", "init", "--dir", folder / "keys", "--no-password", "--publish")
    assert done.code == 0, done.err
    assert run("group", "create", "field").code == 0
    return run


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """A bundle ``gas`` 1.0.0 on disk."""
    models.build_bundle(folder / "gas-1", model="gas", version="1.0.0")
    return folder / "gas-1"
