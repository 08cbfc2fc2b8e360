"""Approvers away, or in a hurry: a real agent, a real server and its repository, with a catalog that has expired and with a forced floor."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Iterator

import pytest
from skerry_cli import catalog

from tests.integration.agent.rig import wait_for
from tests.integration.agent.test_drawer import Agent
from tests.rig_server import Operator, ServerRig

CATALOG_LIFE = dt.timedelta(days=180)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    rig = ServerRig(tmp_path_factory.mktemp("server")).start()
    settings = {"window_s": 5, "trial_s": 1, "trial_inferences": 0, "jitter_s": 0}
    rig.good("PUT", "/api/v1/groups/press", {"settings": settings})
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def operator(server: ServerRig, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    found = Operator(server, tmp_path_factory.mktemp("operator"))
    found.install_trust()
    return found


@pytest.fixture(scope="module")
def agent(server: ServerRig, operator: Operator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    made = Agent(tmp_path_factory.mktemp("device") / "agent", server, operator)
    yield made
    made.stop()


def assign(server: ServerRig, digest: str) -> None:
    server.good("PUT", "/api/v1/devices/drawer-1/pins/gas", {"digest": digest})


@pytest.mark.slow
@pytest.mark.attack("rollback of a model", "signed floors", "emergency return")
def test_an_expired_catalog_stops_no_return_to_what_the_device_confirmed_and_a_forced_floor_does(
    server: ServerRig, operator: Operator, agent: Agent
) -> None:
    digests = {
        version: operator.publish("gas", version, seed=n) for n, version in enumerate(("1.0.0", "1.1.0", "1.2.0"))
    }
    assign(server, digests["1.0.0"])
    agent.start()
    agent.wait_runs("1.0.0")
    assign(server, digests["1.1.0"])
    agent.wait_runs("1.1.0")

    # The approvers' last catalog ends in a few seconds, and nobody renews it.
    ends = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=3)
    operator._approver().change(catalog.Change(), now=ends - CATALOG_LIFE)
    time.sleep(max(0.0, (ends - dt.datetime.now(dt.UTC)).total_seconds()) + 1)
    assign(server, digests["1.2.0"])
    wait_for(lambda: agent.status()["update"]["code"] == "expired", why=lambda: agent.log()[-3000:])
    assert agent.runs("1.1.0"), "a new bundle needs a catalog that holds; what serves does not"
    assign(server, digests["1.0.0"])
    agent.wait_runs("1.0.0")
    (alert,) = server.good("GET", "/api/v1/repository/alerts")["items"]
    assert (alert["code"], alert["role"]) == ("metadata_expired", "catalog")

    # The approvers are back: what they renew lets the new bundle in, and what they force ends the old one.
    operator._approver().change(
        catalog.Change(floors={"gas": "1.2.0"}, forced={"gas": "1.2.0"}), now=dt.datetime.now(dt.UTC)
    )
    agent.call("POST", "/skerry/v1/sync", {})
    wait_for(lambda: "gas" not in agent.status()["running"], why=lambda: f"it stops: {agent.log()[-3000:]}")
    wait_for(
        lambda: "floor" in json.dumps(server.good("GET", "/api/v1/devices/drawer-1/why")),
        why=lambda: f"the reason: {server.good('GET', '/api/v1/devices/drawer-1/why')}",
    )
    assign(server, digests["1.2.0"])
    agent.wait_runs("1.2.0")
    assert server.good("GET", "/api/v1/repository/alerts")["items"] == []
