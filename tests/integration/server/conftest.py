"""One server for the tests of a module, with a group; trust and devices where a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
