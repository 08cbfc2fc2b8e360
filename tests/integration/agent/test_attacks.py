"""Attacks by name on a whole device: a real agent with its workers and couriers, a real server with its broker, the operator's real keys.

Between the device and the server's HTTP stands a proxy with the server's certificate, and somebody holds the server's rights at the broker: he publishes
what he likes, to anyone. The tests share one fleet and follow each other: the device runs 1.1.0 and confirmed 1.0.0 before it.
"""

from __future__ import annotations

import datetime as dt
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from skerry_cli import catalog, key_files, keys
from skerry_contract import ids, topics, wire
from skerry_server.metadata import load_online_signer
from skerry_server.repository import Repository

from tests.integration.agent.rig import wait_for
from tests.integration.agent.test_drawer import NAME, Agent
from tests.proxy import Proxy
from tests.rig_server import Operator, ServerRig

CATALOG_LIFE = dt.timedelta(days=180)
FAR = 1 << 31
YEAR_2100_S = 4_102_444_800
BUNDLES = ("1.0.0", "1.1.0")


class Behind:
    """The server as a device is told of it: behind the proxy."""

    def __init__(self, server: ServerRig, proxy: Proxy) -> None:
        self.url, self.good = proxy.url, server.good


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    rig = ServerRig(tmp_path_factory.mktemp("server") / "data").start()
    settings = {"window_s": 5, "trial_s": 0.5, "trial_inferences": 0, "jitter_s": 0, "sync_s": 60}
    rig.good("PUT", "/api/v1/groups/press", {"settings": settings})
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def operator(server: ServerRig, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    found = Operator(server, tmp_path_factory.mktemp("operator"))
    found.install_trust()
    return found


@pytest.fixture(scope="module")
def digests(operator: Operator) -> dict[str, str]:
    return {version: operator.publish("gas", version, seed=n) for n, version in enumerate(BUNDLES)}


@pytest.fixture(scope="module")
def proxy(server: ServerRig) -> Iterator[Proxy]:
    found = Proxy(server)
    yield found
    found.close()


@pytest.fixture(scope="module")
def agent(
    server: ServerRig,
    operator: Operator,
    proxy: Proxy,
    digests: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Agent]:
    made = Agent(tmp_path_factory.mktemp("device") / "agent", Behind(server, proxy), operator)  # type: ignore[arg-type]
    try:
        assign(server, digests["1.0.0"])
        made.start()
        made.wait_runs("1.0.0")
        assign(server, digests["1.1.0"])
        made.wait_runs("1.1.0")
        yield made
    finally:
        made.stop()


@pytest.fixture
def broker(server: ServerRig) -> Iterator[paho.Client]:
    """The server's own rights at its broker, in other hands."""
    context = ssl.create_default_context(cafile=str(server.ca_file))
    context.load_cert_chain(server.data / "ca" / "client.pem", server.data / "ca" / "client.key")
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="thief", protocol=paho.MQTTv311)
    client.tls_set_context(context)
    client.connect(server.mqtt["host"], server.mqtt["port"])
    client.loop_start()
    wait_for(client.is_connected, why="the thief's session")
    yield client
    client.disconnect()
    client.loop_stop()


def assign(server: ServerRig, digest: str) -> None:
    server.good("PUT", f"/api/v1/devices/{NAME}/pins/gas", {"digest": digest})


def say(client: paho.Client, topic: str, message: bytes, *, retain: bool = False) -> None:
    client.publish(topic, message, qos=1, retain=retain).wait_for_publish(10)


def lower_bound_s(agent: Agent) -> float:
    """What the device keeps beside its store."""
    (kept,) = agent.folder.rglob("remembered.json")
    return float(json.loads(kept.read_bytes())["lower_bound_s"])


@pytest.mark.attack("replayed bell")
def test_bells_of_a_malicious_broker_cost_few_syncs_and_hold_no_update_back(
    server: ServerRig, agent: Agent, proxy: Proxy, digests: dict[str, str], broker: paho.Client
) -> None:
    bells = (topics.bell(NAME), topics.group_bell(ids.group_name("press")))
    before = len([one for one in proxy.seen if one.path == "/device/v1/self"])
    began = time.monotonic()
    for number in (1, 0, 7, 7, 7, 3, (1 << 53) - 1, *range(100, 300)):
        for topic in bells:
            broker.publish(topic, wire.encode(wire.Bell(version=number)), qos=1, retain=number == 299)
    for rubbish in (b"", b"\xff", msgspec.msgpack.encode({"schema": 1, "version": 1 << 63}), b"\0" * 70_000):
        say(broker, bells[0], rubbish)
    wait_for(
        lambda: len([one for one in proxy.seen if one.path == "/device/v1/self"]) > before, why="a bell that was heard"
    )
    time.sleep(1.0)
    syncs = len([one for one in proxy.seen if one.path == "/device/v1/self"]) - before
    assert syncs <= 4 + (time.monotonic() - began), "some four hundred bells"
    assert agent.runs("1.1.0")
    # The server's own bell is heard after all that.
    assign(server, digests["1.0.0"])
    agent.wait_runs("1.0.0")
    assign(server, digests["1.1.0"])
    agent.wait_runs("1.1.0")


@pytest.mark.attack("clock poisoning")
def test_no_time_that_anybody_says_moves_the_devices_and_a_signed_one_does(
    server: ServerRig, agent: Agent, proxy: Proxy, digests: dict[str, str], broker: paho.Client
) -> None:
    bound = lower_bound_s(agent)
    assert abs(bound - time.time()) < 3600
    epoch = agent.status()["outbox"]["epoch"]
    for when in (float(YEAR_2100_S), 0.0, 1e300):
        say(broker, topics.ack(NAME), wire.encode(wire.Ack(epoch=epoch, upto=0, server_time=when)))
    # The birth of a server is a time too: the highest that there may be, and gone again.
    for status in ("offline", "online"):
        say(broker, topics.SERVER_STATE, wire.encode(wire.ServerState(status=status, birth=(1 << 53) - 1)), retain=True)
    proxy.date = "Fri, 01 Jan 2100 00:00:00 GMT"
    try:
        agent.call("POST", "/skerry/v1/sync", {})
        # Its requests are dated by a wrong clock now and refused; what it runs comes from signed metadata all the same.
        assign(server, digests["1.0.0"])
        agent.call("POST", "/skerry/v1/sync", {})
        agent.wait_runs("1.0.0")
        assert lower_bound_s(agent) < time.time() + 60
    finally:
        proxy.date = ""
    agent.stop()
    agent.start()
    assign(server, digests["1.1.0"])
    agent.call("POST", "/skerry/v1/sync", {})
    agent.wait_runs("1.1.0")
    assert bound <= lower_bound_s(agent) < time.time() + 60


@pytest.mark.attack("rollback of a model", "signed floors", "emergency return")
def test_an_expired_catalog_stops_no_return_and_a_forced_floor_stops_what_lies_below_it(
    server: ServerRig, operator: Operator, agent: Agent, digests: dict[str, str]
) -> None:
    ends = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
    operator._approver().change(catalog.Change(), now=ends - CATALOG_LIFE)
    time.sleep(max(0.0, (ends - dt.datetime.now(dt.UTC)).total_seconds()) + 0.1)
    (alert,) = server.good("GET", "/api/v1/repository/alerts")["items"]
    assert (alert["code"], alert["role"]) == ("metadata_expired", "catalog")
    assign(server, digests["1.0.0"])
    agent.wait_runs("1.0.0")

    # The approvers force it out, and what is permitted and was confirmed comes back by itself; whoever holds the server assigns in vain.
    operator._approver().change(
        catalog.Change(floors={"gas": "1.1.0"}, forced={"gas": "1.1.0"}), now=dt.datetime.now(dt.UTC)
    )
    agent.call("POST", "/skerry/v1/sync", {})
    agent.wait_runs("1.1.0")
    wait_for(
        lambda: (agent.status()["update"] or {}).get("code") in ("below_floor", "below_forced_floor"),
        why=lambda: f"the refusal: {agent.status()['update']} {agent.log()[-3000:]}",
    )
    assert agent.runs("1.1.0")


@pytest.mark.attack("fast-forwarded versions")
def test_another_online_key_brings_back_a_device_whose_versions_a_thief_ran_ahead(
    server: ServerRig, operator: Operator, agent: Agent, digests: dict[str, str]
) -> None:
    repository = server.data / "repository"
    honest = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    stolen = load_online_signer(server.data / "keys" / "online.pem")
    ahead = dt.timedelta(hours=12)
    thief = Repository(repository, stolen, lambda: dt.datetime.now(dt.UTC) + ahead)
    thief.raise_versions({"timestamp": FAR, "snapshot": FAR, "fleet": FAR})
    agent.call("POST", "/skerry/v1/sync", {})
    wait_for(lambda: agent.status()["tuf"]["timestamp"] > FAR, why="the thief's versions")
    assert lower_bound_s(agent) > time.time() + 11 * 3600
    # The operator stops the server, puts the repository back, makes another key, and has root and targets name that one alone.
    server.stop()
    for path in [path for path in repository.rglob("*") if path.is_file()]:
        path.unlink()
    for path, data in honest.items():
        path.write_bytes(data)
    command = [sys.executable, "-m", "skerry_server", "new-online-key", "--data", str(server.data)]
    made = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    new = key_files.read_online_keys(Path(made["online_keys"]).read_text())[made["keyid"]]
    server.start()
    now = dt.datetime.now(dt.UTC)
    named = {new.keyid: new}
    holders = {name: key_files.load_signer(operator.ceremony.key_path(name), None) for name in ("root", "targets")}
    root = keys.next_root(operator.ceremony.root, signers=[holders["root"]], now=now, online_keys=named)
    targets = keys.next_targets(
        operator.ceremony.targets, root=root, signers=[holders["targets"]], now=now, online_keys=named
    )
    server.good("POST", "/api/v1/repository/set", {"root": root.decode(), "targets": targets.decode()})
    agent.call("POST", "/skerry/v1/sync", {})
    wait_for(
        lambda: agent.status()["tuf"]["root"] == 2 and agent.status()["tuf"]["timestamp"] < FAR,
        why=lambda: f"the honest versions: {agent.status()['tuf']} {agent.log()[-3000:]}",
    )
    assert agent.runs("1.1.0")
    assert lower_bound_s(agent) < time.time() + 60
