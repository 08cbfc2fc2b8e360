"""One server for the tests of a module, with a group; trust and devices where a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.server.rollout_fleet import GROUP, Fleet
from tests.rig_server import DeviceRig, Operator, ServerRig


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


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServerRig]:
    """A server of its own, which the test may kill. Devices are few seconds away from being offline."""
    found = ServerRig(tmp_path / "server").start()
    found.good("PUT", f"/api/v1/groups/{GROUP}", {"settings": {"window_s": 1}})
    yield found
    found.close()


@pytest.fixture
def maker(rig: ServerRig, tmp_path: Path) -> Operator:
    """The operator of that server, trust installed."""
    found = Operator(rig, tmp_path / "operator")
    found.install_trust()
    return found


@pytest.fixture
def fleet(rig: ServerRig, maker: Operator, tmp_path: Path) -> Iterator[Fleet]:
    """Eight devices."""
    found = Fleet(rig, tmp_path, 8)
    yield found
    found.close()
