"""Attacks by name on a real server and through it: a proxy, a thief of its disk, names and documents that deceive. Couriers and tool are real.

From ``Behind`` on a whole device is attacked: an agent with its workers and couriers, behind a proxy that has the server's certificate, while somebody
holds the server's rights at the broker and publishes what he likes. These tests share one device and follow each other.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import paho.mqtt.client as paho
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from paho.mqtt.enums import CallbackAPIVersion
from skerry_cli import catalog, key_files, keys
from skerry_contract import canonical, enrolment, group, ids, layout, topics, wire
from skerry_contract import manifest as m
from skerry_server.metadata import load_online_signer
from skerry_server.repository import Repository
from tuf.api.metadata import Metadata, TargetFile

from tests import models
from tests.integration.agent.rig import wait_for
from tests.integration.agent.test_drawer import NAME, Agent
from tests.integration.cli.conftest import CliHere
from tests.integration.tuf.conftest import Device, DeviceHere
from tests.proxy import Proxy
from tests.rig_server import Answer, DeviceRig, Operator, ServerRig, csr, key_id

USAGE, REFUSED = 2, 3
SETTINGS = {"window_s": 5, "trial_s": 0.5, "trial_inferences": 0, "jitter_s": 0, "sync_s": 60}
CATALOG_LIFE = dt.timedelta(days=180)
FAR = 1 << 31
YEAR_2100_S = 4_102_444_800
BUNDLES = ("1.0.0", "1.1.0")
AS_JSON = {"Content-Type": "application/json"}
# Cyrillic, Greek, full width, another script's digit, an invisible joiner, the other direction, a combining accent.
LOOK_ALIKES = ("g\u0430s", "g\u03b1s", "\uff47as", "gas\u0661", "ga\u200ds", "\u202esag", "ga\u0301s", "GAS")


def courier(url: str, state_dir: Path, kind: type[Device] = DeviceHere) -> Device:
    return kind(SimpleNamespace(site=SimpleNamespace(url=url), url=f"{url}/repository"), state_dir)  # type: ignore[arg-type]


def token_for(server: ServerRig, operator: Operator, device: str, url: str = "") -> str:
    """What an operator gives to a new device: the server's part, with the root that the operator's own ceremony made."""
    wish = {"device_id": device, "group": "press", "expires_s": 600}
    found = enrolment.Enrolment(
        server_url=url or server.url,
        token=server.good("POST", "/api/v1/enrolment-tokens", wish)["token"],
        ca_sha256=server.good("GET", "/api/v1/info")["ca_sha256"],
        root_sha256=operator.ceremony.root_sha256,
    )
    return enrolment.build(found)


@pytest.fixture
def proxy(server: ServerRig) -> Iterator[Proxy]:
    """For one test alone: what it has seen is this test's."""
    found = Proxy(server)
    yield found
    found.close()


@pytest.mark.attack("replay of a signed request")
def test_what_a_proxy_records_is_of_no_use_to_it(
    server: ServerRig, operator: Operator, proxy: Proxy, tmp_path: Path
) -> None:
    device = courier(proxy.url, tmp_path / "state", Device)
    device.ok("enrol", token=token_for(server, operator, "proxied-1", proxy.url))
    assert device.ok("sync", group="press")["self_error"] is None
    (own,) = [one for one in proxy.seen if one.path == "/device/v1/self"]
    assert proxy.send(own).status == 401, "the same bytes again"

    # It holds a signed request back, so that its nonce is unused, and changes it on the way: another body, path, method, key.
    proxy.held = lambda request: request.path == "/device/v1/renew"
    assert device.error("renew") == ("transient", "unreachable")
    renewal = [one for one in proxy.seen if one.path == "/device/v1/renew"][-1]
    thief = ec.generate_private_key(ec.SECP256R1())
    other = json.dumps({"csr": csr(thief, "proxied-1")}).encode()
    changes: tuple[dict[str, Any], ...] = (
        {"body": other},
        {"body": renewal.body + b" "},
        {"path": "/device/v1/keys/" + "0" * 64},
        {"method": "GET", "path": "/device/v1/self"},
        {"path": "/device/v1/logs/1"},
        {"Authorization": own.headers["Authorization"]},
    )
    for change in changes:
        assert proxy.send(renewal, **change).status == 401, change
    # Late, and as it was, it is the device's own word; and that once.
    proxy.held = lambda _request: False
    assert [proxy.send(renewal).status for _ in range(2)] == [200, 401]
    # The enrolment, after it passed: the token is spent for any other key. (What is held back before: the next test.)
    (entry,) = [one for one in proxy.seen if one.path == "/device/v1/enrol"]
    body = {**json.loads(entry.body), "csr": csr(thief, "proxied-1")}
    assert proxy.send(entry, body=json.dumps(body).encode()).status == 401


def test_a_token_is_its_bearers_so_a_proxy_that_holds_it_back_enrols_itself_and_the_device_says_so(
    server: ServerRig, operator: Operator, proxy: Proxy, tmp_path: Path
) -> None:
    """No attack that fails, but what the attacker table says of it: who has the server's certificate reads the token. Who has not, does not
    (``integration/tuf/test_enrolment.py``)."""
    device, token = courier(proxy.url, tmp_path / "state", Device), token_for(server, operator, "held-1", proxy.url)
    proxy.held = lambda request: request.path == "/device/v1/enrol"
    assert device.error("enrol", token=token) == ("transient", "unreachable")
    proxy.held = lambda _request: False
    entry = [one for one in proxy.seen if one.path == "/device/v1/enrol"][-1]
    thief, asked = DeviceRig(server, "held-1", tmp_path), json.loads(entry.body)

    def stolen(name: str, key: Any) -> Answer:
        return proxy.send(entry, body=json.dumps({**asked, "csr": csr(key, name), "device_id": name}).encode())

    # It is the id that the operator named, once, and nothing beside it.
    assert stolen("held-2", thief.key).code == "wrong_device"
    assert stolen("held-1", thief.key).status == 200
    assert stolen("held-1", ec.generate_private_key(ec.SECP256R1())).code == "bad_enrolment_token"
    assert thief.ask("GET", "/device/v1/self").json()["group"] == "press"
    # The device does not fail in silence, and a fresh token for its id takes the thief's key out.
    assert device.error("enrol", token=token) == ("rejected", "bad_enrolment_token")
    device.ok("enrol", token=token_for(server, operator, "held-1"))
    assert thief.ask("GET", "/device/v1/self").status == 401
    rows = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    keys_of = [row for row in rows if row["action"] == "device.enrol" and row["subject"] == "device:held-1"]
    assert len(keys_of) == 2 and keys_of[1]["before"]["public_key_sha256"] == key_id(thief.key)


def test_a_proxy_that_puts_its_own_encryption_key_into_an_enrolment_is_given_no_content_key(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    """The enrolment carries it unsigned; what asks for a content key carries it signed, and both must be one."""
    device, own, thief = (
        DeviceRig(server, "swapped-1", tmp_path),
        *(ec.generate_private_key(ec.SECP256R1()) for _ in range(2)),
    )
    device.enrol(encryption_key=public_pem(thief))
    path = "/device/v1/keys/" + "0" * 64
    asked = device.ask("POST", path, {"encryption_key": public_pem(own)})
    assert (asked.status, asked.code) == (403, "encryption_key_differs")
    # The same request with the thief's key in it is none of the device's.
    body = json.dumps({"encryption_key": public_pem(own)}).encode()
    authorization = device.signed(device.claims("POST", path, body))
    changed = device.ask("POST", path, {"encryption_key": public_pem(thief)}, authorization=authorization)
    assert (changed.status, changed.code) == (401, "bad_device_token")
    server.good("POST", "/api/v1/devices/swapped-1/forget-key", {"reason": "another key than the device's own"})
    assert device.ask("POST", path, {"encryption_key": public_pem(own)}).code == "key_not_allowed"


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def trusted(device: Device) -> dict[str, bytes]:
    """What a device's trust stands on; versions that the stolen online key ran ahead are left behind with that key (``fast-forwarded versions``)."""
    return {
        name: data for name, data in device.files().items() if name not in ("tuf/timestamp.json", "tuf/snapshot.json")
    }


class Thief:
    """Has the server's disk: its online key, its CA, its repository; and puts a repository of his own in its place."""

    def __init__(self, server: ServerRig, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.place = server.data / "repository"
        now = dt.datetime.now(dt.UTC)
        online = key_files.read_online_keys(json.dumps(server.good("GET", "/api/v1/repository/online-keys")))
        self.ceremony = keys.hold_ceremony(folder / "keys", online_keys=online, password=None, now=now)
        signer = load_online_signer(server.data / "keys" / "online.pem")
        self.own = Repository(folder / "repository", signer, lambda: dt.datetime.now(dt.UTC))
        self.own.install(root=self.ceremony.root, targets=self.ceremony.targets)
        self.evil = folder / "evil"
        self.digest = models.build_bundle(self.evil, "gas", "6.6.6")
        manifest = (self.evil / m.MANIFEST_FILE).read_bytes()
        for file in m.parse(manifest).variants[0].files:
            self.own.put_blob([(self.evil / file.path).read_bytes()], file.sha256)
        path = layout.manifest_target("gas", "6.6.6")
        catalog = Metadata.from_bytes(self.ceremony.catalog)
        custom = {"custom": {"submitter": "ci", "approvers": ["approver"]}}
        catalog.signed.targets[path] = TargetFile(len(manifest), {"sha256": self.digest}, path, custom)
        catalog.sign(key_files.load_signer(self.ceremony.key_path("approver"), None))
        self.own.install_catalog(catalog.to_bytes(), self.ceremony.floors, lambda _: manifest)
        stable = group.Target(digest=self.digest, version="6.6.6")
        document = group.GroupDocument(
            schema=1, group="press", generation=99, models={"gas": group.ModelPlan(stable=stable)}
        )
        self.own.publish_group("press", group.encode(document))
        self.own.raise_versions({"timestamp": 1000, "snapshot": 1000, "fleet": 1000})

    def __enter__(self) -> Thief:
        self.honest = self.folder / "honest"
        self.place.rename(self.honest)
        shutil.copytree(self.folder / "repository", self.place)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.place)
        self.honest.rename(self.place)


@pytest.mark.attack("stolen server enrols a device", "arbitrary software")
def test_a_stolen_server_brings_no_device_under_a_root_of_its_own(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    known, new = courier(server.url, tmp_path / "known"), courier(server.url, tmp_path / "new")
    known.ok("enrol", token=token_for(server, operator, "known-1"))
    known.ok("sync", group="press")
    given = token_for(server, operator, "new-1")
    with Thief(server, tmp_path / "thief") as thief:
        # A new device with what its operator gave it: refused before the token is spent, and nothing of it stays.
        assert new.error("enrol", token=given) == ("rejected", "untrusted_root")
        assert not [name for name in new.files() if not name.startswith("identity/device.key")]
        # One that is there, also when it is enrolled again with a token that the thief made.
        before = trusted(known)
        assert known.error("sync", group="press") == ("rejected", "bad_signature")
        wrong = enrolment.parse(token_for(server, operator, "known-1"))
        changed = enrolment.Enrolment(
            server_url=wrong.server_url, token=wrong.token, ca_sha256=wrong.ca_sha256, root_sha256=thief.ceremony.root_sha256
        )  # fmt: skip
        assert known.error("enrol", token=enrolment.build(changed)) == ("rejected", "untrusted_root")
        assert trusted(known) == before
        # A device that the thief brings himself is his own: it runs what he likes, and nobody else's does.
        his = courier(server.url, tmp_path / "his")
        mine = enrolment.parse(token_for(server, operator, "his-1"))
        changed = enrolment.Enrolment(
            server_url=mine.server_url, token=mine.token, ca_sha256=mine.ca_sha256, root_sha256=thief.ceremony.root_sha256
        )  # fmt: skip
        his.ok("enrol", token=enrolment.build(changed))
        his.ok("sync", group="press")
        assert his.ok("manifest", model="gas", version="6.6.6", digest=thief.digest)
    # The thief has the root that the operator made, and everything of the server: he enrols, assigns, and can approve nothing.
    assert new.ok("enrol", token=given)["device_id"] == "new-1"
    new.ok("sync", group="press")
    assert new.error("manifest", model="gas", version="6.6.6", digest=thief.digest) == ("rejected", "not_in_catalog")


@pytest.fixture(scope="module")
def cli(server: ServerRig, operator: Operator, tmp_path_factory: pytest.TempPathFactory) -> CliHere:
    folder = tmp_path_factory.mktemp("operator-cli")
    environment = {
        "SKERRY_SERVER": server.url,
        "SKERRY_TOKEN": server.token,
        "SKERRY_CA": str(server.ca_file),
        "SKERRY_KEYS": str(operator.folder / "keys"),
    }
    return CliHere(folder, environment)


@pytest.mark.attack("homoglyph name")
def test_names_that_look_like_others_are_refused_wherever_one_is_made(
    server: ServerRig, operator: Operator, cli: CliHere, tmp_path: Path
) -> None:
    built = tmp_path / "bundle"
    models.build_bundle(built, "gas", "1.0.0")
    honest = json.loads((built / m.MANIFEST_FILE).read_bytes())
    for name in LOOK_ALIKES:
        value = {**honest, "model": name}
        refused = [
            server.ask("POST", "/api/v1/bundles", data=canonical.encode(value)),
            server.ask("POST", "/api/v1/enrolment-tokens", {"device_id": name, "group": "press"}),
            server.ask("POST", "/api/v1/enrolment-tokens", {"serial_prefix": name, "group": "press", "uses": 2}),
            server.ask("POST", "/api/v1/enrolment-tokens", {"device_id": "d-1", "group": name}),
            server.ask("POST", "/api/v1/tokens", {"name": name, "role": "viewer"}),
        ]
        assert [(found.status, name) for found in refused if found.status not in (400, 404, 422)] == []
        (built / m.MANIFEST_FILE).write_bytes(canonical.encode(value))
        for command in (
            ()
            if name not in LOOK_ALIKES[:1]
            else (
                ("push", built),
                ("approve", f"{name}@1.0.0"),
                ("floor", "set", name, "1.0.0", "--yes"),
            )
        ):
            done = cli(*command)
            assert done.code == USAGE, (command, done)
            assert "[a-z0-9]" in done.err or "name" in done.err, (command, done)
    for version in ("1.0.\u0661", "\uff11.0.0", "1.0.0\u200b"):
        found = server.ask("POST", "/api/v1/bundles", data=canonical.encode({**honest, "version": version}))
        assert (found.status, found.code) == (422, "malformed")
    listed = json.dumps(
        [server.good("GET", f"/api/v1/{what}?limit=1000") for what in ("bundles", "groups", "devices", "tokens")],
        ensure_ascii=False,
    )
    assert listed.isascii()


@pytest.mark.attack("homoglyph name")
def test_a_signer_or_submitter_whose_name_looks_like_another_is_not_signed(operator: Operator) -> None:
    """Of a catalog too: what an approver is shown are names of the grammar alone."""
    from skerry_cli import catalog
    from skerry_cli.errors import CliError

    addition = catalog.Addition(model="gas", version="1.0.0", digest="0" * 64, submitter="\u0430da")
    with pytest.raises(CliError, match="submitter"):
        operator._approver().change(catalog.Change(add=(addition,)), now=dt.datetime.now(dt.UTC))


@pytest.mark.attack("oversized manifest", "duplicate JSON key", "symlink")
def test_what_is_no_plain_bundle_is_refused_by_the_tool_and_by_the_server(
    server: ServerRig, cli: CliHere, tmp_path: Path
) -> None:
    built = tmp_path / "bundle"
    models.build_bundle(built, "plain", "1.0.0")
    manifest = (built / m.MANIFEST_FILE).read_bytes()
    before = server.good("GET", "/api/v1/bundles?limit=1000")["items"]

    large = canonical.encode({**json.loads(manifest), "pad": "x" * m.MAX_BYTES})
    doubled = manifest.replace(b'"version":"1.0.0"', b'"version":"0.9.0","version":"1.0.0"')
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    wrong = {large: "1048576", doubled: "canonical", deep: "deep"}
    for data, words in wrong.items():
        found = server.ask("POST", "/api/v1/bundles", data=data)
        assert (found.status, found.code) == (422, "malformed"), found.data
        assert words in found.json()["error"]["message"]
        (built / m.MANIFEST_FILE).write_bytes(data)
        done = cli("push", built)
        assert done.code == USAGE, done
        assert words in done.err or "recursion" in done.err, done
    far_too_large = server.ask("POST", "/api/v1/bundles", data=b"[" + b" " * 40_000_000)
    assert (far_too_large.status, far_too_large.code) == (413, "too_large")

    (built / m.MANIFEST_FILE).write_bytes(manifest)
    model = built / "model.onnx"
    outside = tmp_path / "model.onnx"
    model.rename(outside)
    model.symlink_to(outside)
    done = cli("push", built)
    assert done.code == REFUSED and "model.onnx" in done.err, done
    model.unlink()
    outside.rename(model)
    folder, linked = tmp_path / "bundle", tmp_path / "linked"
    (folder / "more").symlink_to(tmp_path)
    done = cli("push", folder)
    assert done.code == REFUSED and "more" in done.err, done
    assert not linked.exists()
    assert server.good("GET", "/api/v1/bundles?limit=1000")["items"] == before


@pytest.mark.attack("duplicate JSON key")
def test_a_request_that_two_readers_would_understand_differently_is_refused(
    server: ServerRig, operator: Operator, cli: CliHere, device: DeviceRig, tmp_path: Path
) -> None:
    wish = b'{"device_id":"a-1","group":"press","device_id":"b-1"}'
    found = server.ask("POST", "/api/v1/enrolment-tokens", data=wish, headers=AS_JSON)
    assert (found.status, found.code) == (400, "bad_request")
    assert "'device_id' stands twice" in found.json()["error"]["message"]
    nested = b'{"settings":{"window_s":5,"window_s":1}}'
    assert server.ask("PUT", "/api/v1/groups/press", data=nested, headers=AS_JSON).status == 400
    # Also from a device, though its signature covers the bytes.
    body = json.dumps({"csr": csr(device.key, device.id)}).encode()
    twice = body.replace(b"{", b'{"csr":"x",', 1)
    headers = {**AS_JSON, "Authorization": device.signed(device.claims("POST", "/device/v1/renew", twice))}
    found = server.ask("POST", "/device/v1/renew", data=twice, headers=headers, token="")
    assert (found.status, found.code) == (400, "bad_request")
    # Metadata that people signed, and what they are asked to sign.
    catalog = operator.ceremony.catalog.decode().replace('"signed"', '"signed":{},"signed"', 1)
    posted = {"role": "catalog", "metadata": catalog, "floors": operator.ceremony.floors.decode()}
    found = server.ask("POST", "/api/v1/repository/metadata", posted)
    assert (found.status, found.code) == (422, "malformed_metadata")
    assert "stands twice" in found.json()["error"]["message"]
    request = tmp_path / "request.json"
    done = cli("keys", "rotate", "--targets", "--out", request)
    assert done.code == 0, done
    text = request.read_text()
    request.write_text(text.replace('"documents"', '"documents": {}, "documents"', 1))
    done = cli("keys", "review", request)
    assert done.code == USAGE and "stands twice" in done.err, done
    request.write_text(text.replace('"version"', '"version": 9, "version"', 1))
    done = cli("keys", "review", request)
    assert done.code == USAGE and "stands twice" in done.err, done


class Behind:
    """The server as a device is told of it: behind the proxy."""

    def __init__(self, server: ServerRig, proxy: Proxy) -> None:
        self.url, self.good = proxy.url, server.good


@pytest.fixture(scope="module")
def agents_proxy(server: ServerRig) -> Iterator[Proxy]:
    """Between the agent and the server, as long as the agent runs."""
    found = Proxy(server)
    yield found
    found.close()


@pytest.fixture(scope="module")
def digests(operator: Operator) -> dict[str, str]:
    return {version: operator.publish("gas", version, seed=n) for n, version in enumerate(BUNDLES)}


@pytest.fixture(scope="module")
def agent(
    server: ServerRig,
    operator: Operator,
    agents_proxy: Proxy,
    digests: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Agent]:
    made = Agent(tmp_path_factory.mktemp("device") / "agent", Behind(server, agents_proxy), operator)  # type: ignore[arg-type]
    try:
        server.good("PUT", "/api/v1/groups/press", {"settings": SETTINGS})
        assign(server, digests["1.0.0"])
        made.start()
        made.wait_runs("1.0.0")
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
    server: ServerRig, agent: Agent, agents_proxy: Proxy, digests: dict[str, str], broker: paho.Client
) -> None:
    bells = (topics.bell(NAME), topics.group_bell(ids.group_name("press")))
    before = len([one for one in agents_proxy.seen if one.path == "/device/v1/self"])
    began = time.monotonic()
    for number in (1, 0, 7, 7, 7, 3, (1 << 53) - 1, *range(100, 300)):
        for topic in bells:
            broker.publish(topic, wire.encode(wire.Bell(version=number)), qos=1, retain=number == 299)
    for rubbish in (b"", b"\xff", msgspec.msgpack.encode({"schema": 1, "version": 1 << 63}), b"\0" * 70_000):
        say(broker, bells[0], rubbish)
    wait_for(
        lambda: len([one for one in agents_proxy.seen if one.path == "/device/v1/self"]) > before,
        why="a bell that was heard",
    )
    time.sleep(1.0)
    syncs = len([one for one in agents_proxy.seen if one.path == "/device/v1/self"]) - before
    assert syncs <= 4 + (time.monotonic() - began), "some four hundred bells"
    assert agent.runs("1.0.0")
    # The server's own bell is heard after all that.
    assign(server, digests["1.1.0"])
    agent.wait_runs("1.1.0")


@pytest.mark.attack("clock poisoning", "rollback of a model", "signed floors", "emergency return")
def test_wrong_times_an_expired_catalog_and_a_forced_floor_end_as_the_signatures_say(
    server: ServerRig,
    operator: Operator,
    agent: Agent,
    agents_proxy: Proxy,
    digests: dict[str, str],
    broker: paho.Client,
) -> None:
    # The approvers' last catalog ends soon, and nobody renews it.
    ends = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=5)
    operator._approver().change(catalog.Change(), now=ends - CATALOG_LIFE)

    # Times that anybody says, by MQTT and by HTTP: no device's time comes of them.
    bound = lower_bound_s(agent)
    assert abs(bound - time.time()) < 3600
    epoch = agent.status()["outbox"]["epoch"]
    for when in (float(YEAR_2100_S), 0.0, 1e300):
        say(broker, topics.ack(NAME), wire.encode(wire.Ack(epoch=epoch, upto=0, server_time=when)))
    for status in ("online", "offline"):
        say(broker, topics.SERVER_STATE, wire.encode(wire.ServerState(status=status, birth=(1 << 53) - 1)), retain=True)
    agents_proxy.date = "Fri, 01 Jan 2100 00:00:00 GMT"
    before = agent.status()["sync"]["at_ms"]
    agent.call("POST", "/skerry/v1/sync", {})
    wait_for(lambda: agent.status()["sync"]["at_ms"] > before, why="a sync")
    time.sleep(max(0.0, (ends - dt.datetime.now(dt.UTC)).total_seconds()) + 0.2)

    # What was confirmed once needs neither a catalog that holds nor a server whose clock is right.
    (alert,) = server.good("GET", "/api/v1/repository/alerts")["items"]
    assert (alert["code"], alert["role"]) == ("metadata_expired", "catalog")
    assign(server, digests["1.0.0"])
    agent.call("POST", "/skerry/v1/sync", {})
    agent.wait_runs("1.0.0")
    assert bound <= lower_bound_s(agent) < time.time() + 60
    agents_proxy.date = ""

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
    # Nor was it silenced by a server that is said to be gone: the real one says that it is there.
    wait_for(lambda: agent.status()["outbox"]["pending"] == 0, why=lambda: f"its word: {agent.status()['outbox']}")


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
