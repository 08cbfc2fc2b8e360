"""Fifty swaps under keep-alive clients that idle at random for up to half a minute, on more than one Python. Slow."""

from __future__ import annotations

import http.client
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import models
from tests.integration.worker.rig import Rig
from tests.swap_clients import Clients, Unix

ROOT = Path(__file__).parents[3]
SWAPS, CLIENTS, IDLE_S = 50, 4, 30.0
MEMBERS = ("contract", "runtime[onnx]", "agent[onnx,uvloop]")


def interpreter(version: str, folder: Path) -> str:
    """A Python of that version with the agent: the one at hand, or one made for this test."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    named = [str(path) for path in sorted(root.glob(f"versions/{version}.*/bin/python{version}"))]
    # pyenv's own shim is on the PATH, and fails where that version is not the chosen one.
    found = [one for one in (shutil.which(f"python{version}"), *named) if one is not None]
    python = next(
        (one for one in found if subprocess.run([one, "-V"], capture_output=True, check=False).returncode == 0), None
    )
    if python is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no Python {version} here")
        pytest.skip(f"no Python {version} here")
    environment = folder / f"python-{version}"
    subprocess.run(
        [str(ROOT / ".ci" / "make-venv"), str(environment)], env={**os.environ, "PYTHON": python}, check=True
    )
    made = str(environment / "bin" / "python")
    parts = [f"{ROOT / part.partition('[')[0]}{part[len(part.partition('[')[0]) :]}" for part in MEMBERS]
    subprocess.run(
        [made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), *parts],
        check=True, timeout=900,
    )  # fmt: skip
    told = subprocess.run([made, "-c", "import sys; print(sys.version)"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith(version + ".")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_fifty_swaps_fail_no_request_of_clients_that_idle_at_random_and_never_retry(
    tmp_path: Path, version: str
) -> None:
    python = interpreter(version, tmp_path)
    versions = ("1.0.0", "1.1.0")
    for one in versions:
        models.build_bundle(tmp_path / one, version=one)
    rng = random.Random(version)
    with Rig(tmp_path, python, unix=tmp_path / "s") as rig:
        if python != sys.executable:
            # It has the agent installed; the sources at hand are for the one that runs the tests.
            rig.environment.pop("PYTHONPATH", None)
        worker = rig.start(rig.served(tmp_path / versions[0]), fold_interval_s=0.2)
        clients = Clients()
        for i in range(CLIENTS):
            clients.add(http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60), IDLE_S, i)
            clients.add(Unix(tmp_path / "s"), IDLE_S, 100 + i)
        # Beside them one each that swaps meet in the middle of a request.
        clients.add(http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60), 0.0, 7)
        clients.add(Unix(tmp_path / "s"), 0.0, 107)
        try:
            for i in range(SWAPS):
                time.sleep(rng.uniform(0.0, 4.0))
                one = versions[(i + 1) % 2]
                worker = rig.swap(worker, rig.served(tmp_path / one, version=one), fold_interval_s=0.2)
        finally:
            clients.finish()
        rig.flush(worker)
        counted = rig.total().ok
        assert rig.stop(worker) == 0
    assert clients.failures == []
    assert counted == sum(clients.answered.values()) > 1000
