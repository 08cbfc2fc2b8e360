"""The acceptance suite of the protocol: the same checks by tritonclient and by kserve's client against one real worker.

``clients/checks.py`` has the checks. Each client runs in a process of its own: tritonclient in this environment, kserve's in the one that
``make setup-clients`` makes, for it brings a server and half a hundred packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models
from tests.integration.worker.clients import checks
from tests.integration.worker.echo import echo_bundle
from tests.integration.worker.rig import Rig

ROOT = Path(__file__).parents[3]
PYTHONS = {"tritons": Path(sys.executable), "kserves": ROOT / ".venv-kserve" / "bin" / "python"}
CASES = [(name, check.__name__) for name, found in checks.BY_CLIENT.items() for check in found]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("clients")
    models.build_bundle(folder / "gas")
    models.build_bundle(folder / "wide", model="wide", kind="identity", n_features=1024)
    echo_bundle(folder / "echo", model="echo")
    echo_bundle(folder / "cube", model="cube", shape=(2, 2))
    echo_bundle(folder / "plain", model="plain", without=("FP16",))
    with Rig(folder) as rig:
        rig.start(*(rig.served(folder / name, name=name) for name in ("gas", "wide", "echo", "cube", "plain")))
        yield rig
        assert not rig.gaps


@pytest.fixture(scope="module")
def outcomes(serving: Rig) -> dict[str, dict[str, str]]:
    """What went wrong, by client and check; empty for nothing."""
    found = {}
    for name, python in PYTHONS.items():
        if not python.exists():
            continue
        asked = [str(python), "-m", "tests.integration.worker.clients.run", name, str(serving.port)]
        # Nothing of this environment may be among the other's.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        ran = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
        found[name] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("client", "check"), CASES, ids=[f"{client}-{check}" for client, check in CASES])
def test_a_public_client_gets_what_the_protocol_promises(
    outcomes: dict[str, dict[str, str]], client: str, check: str
) -> None:
    if client not in outcomes:
        why = f"{PYTHONS[client].parents[1].name} is not there: `make setup-clients` makes it"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    assert outcomes[client][check] == ""
