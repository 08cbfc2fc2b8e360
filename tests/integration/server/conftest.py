"""One server for the tests of a module, with a group; trust and devices where a test asks for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.server.rollout_fleet import Fleet, Maker
from tests.rig_server import DeviceRig, Operator, ServerRig

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    """A running server with the group ``press``."""
    rig = ServerRig(tmp_path_factory.mktemp("server")).start()
    rig.good("PUT", "/api/v1/groups/press", {"settings": {"window_s": 5}})
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def operator(server: ServerRig, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """The operator, whose trust is installed."""
    found = Operator(server, tmp_path_factory.mktemp("operator"))
    found.install_trust()
    return found


@pytest.fixture
def device(
    server: ServerRig, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[DeviceRig]:
    """An enrolled device with an id of its own."""
    name = f"d-{abs(hash(request.node.nodeid)) % 10**12}"
    found = DeviceRig(server, name, tmp_path_factory.mktemp("device"))
    found.enrol()
    yield found
    found.disconnect()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    """The server that the rollouts of a module share, each in a group of its own."""
    found = ServerRig(tmp_path_factory.mktemp("rollouts") / "server").start()
    yield found
    found.close()


@pytest.fixture(scope="module")
def maker(rig: ServerRig, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """The operator of that server, trust installed."""
    found = Maker(rig, tmp_path_factory.mktemp("operator"))
    found.install_trust()
    return found


@pytest.fixture
def group(rig: ServerRig) -> Iterator[str]:
    """A new group of that server. What still rolls out in it is aborted."""
    name = f"press-{next(_NUMBERS)}"
    rig.good("PUT", f"/api/v1/groups/{name}", {"settings": {"window_s": 1}})
    yield name
    for rollout in rig.good("GET", "/api/v1/rollouts?limit=1000")["items"]:
        if rollout["group"] == name and rollout["state"] in ("running", "paused"):
            rig.good("POST", f"/api/v1/rollouts/{rollout['id']}/abort", {"reason": "the test is over"})


@pytest.fixture
def fleet(rig: ServerRig, group: str, tmp_path: Path) -> Iterator[Fleet]:
    """Eight devices of that group."""
    found = Fleet(rig, group, tmp_path, 8)
    yield found
    found.close()


@pytest.fixture
def lone_rig(tmp_path: Path) -> Iterator[ServerRig]:
    """A server of its own, which the test may kill, with the group ``press``."""
    found = ServerRig(tmp_path / "server").start()
    found.good("PUT", "/api/v1/groups/press", {"settings": {"window_s": 1}})
    yield found
    found.close()


@pytest.fixture
def lone_maker(lone_rig: ServerRig, tmp_path: Path) -> Operator:
    """The operator of that server, trust installed."""
    found = Operator(lone_rig, tmp_path / "operator")
    found.install_trust()
    return found


@pytest.fixture
def lone_fleet(lone_rig: ServerRig, lone_maker: Operator, tmp_path: Path) -> Iterator[Fleet]:
    """Eight devices of it."""
    found = Fleet(lone_rig, "press", tmp_path, 8)
    yield found
    found.close()
