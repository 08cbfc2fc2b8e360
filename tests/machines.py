"""People at machines of their own: each has a folder, an environment, and the tool; nothing is shared but files handed over."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from skerry_cli import app

from tests import warm

# What typer makes of the program anew at each start; it takes longer than most commands.
_COMMAND = typer.main.get_command(app.app)

SOFTHSM = next(
    (
        path
        for path in ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
        if Path(path).exists()
    ),
    None,
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Machine:
    """One person's. Commands run in this process, as ``main`` would, or apart from it with ``apart``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.keys = folder / "keys"
        self.environment = {"SKERRY_KEY_PASSWORD": f"password of {folder.name}"}
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        folder.mkdir(parents=True)

    def __call__(self, *arguments: str | Path, given: str = "", **environment: str) -> Ended:
        with self._monkeypatch.context() as patch:
            for name in list(os.environ):
                if name.startswith("SKERRY_"):
                    patch.delenv(name)
            for name, value in {**self._base(), **self.environment, **environment}.items():
                patch.setenv(name, value)
            patch.setattr("sys.stdin", io.StringIO(given))
            patch.setattr(app, "app", _COMMAND)
            self._capsys.readouterr()
            code = app.run([str(argument) for argument in arguments])
            found = self._capsys.readouterr()
        return Ended(code, found.out, found.err)

    def ok(self, *arguments: str | Path, given: str = "", **environment: str) -> Ended:
        done = self(*arguments, given=given, **environment)
        assert done.code == 0, (arguments, done)
        return done

    def apart(self, *arguments: str | Path, **environment: str) -> Ended:
        """In a process of its own: what a PKCS#11 module is loaded into."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")}
        found = warm.run(
            "skerry_cli",
            [str(one) for one in arguments],
            env={**kept, **self._base(), **self.environment, **environment},
            timeout=90,
        )
        assert "Traceback" not in found.stderr, found.stderr
        return Ended(found.returncode, found.stdout, found.stderr)

    def _base(self) -> dict[str, str]:
        return {"HOME": str(self.folder), "SKERRY_CONFIG": "", "SKERRY_KEYS": str(self.keys)}


class Token:
    """A SoftHSM token: a real PKCS#11 module whose keys lie in a folder. Without SoftHSM the test is skipped; with CI=true it fails."""

    def __init__(self, folder: Path, label: str = "fleet") -> None:
        if SOFTHSM is None or shutil.which("softhsm2-util") is None:
            why = "SoftHSM is not installed (on Debian: apt install softhsm2)"
            if os.environ.get("CI") == "true":
                pytest.fail(why)
            pytest.skip(why)
        (folder / "tokens").mkdir(parents=True)
        config = folder / "softhsm2.conf"
        config.write_text(
            f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        self.label, self.pin = label, "271828"
        self.environment = {"SOFTHSM2_CONF": str(config), "PYKCS11LIB": SOFTHSM, "SKERRY_PIN": self.pin}
        subprocess.run(
            ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", self.pin, "--so-pin", "314159"],
            env={**os.environ, **self.environment},
            check=True,
            capture_output=True,
        )
