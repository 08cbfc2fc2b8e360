"""What a server signs whose clock is wrong: devices with a right one go on, and what they take for proven stays near the truth."""

import datetime as dt
import json

import pytest
from skerry_cli import keys
from skerry_contract import layout
from skerry_server import online_keys
from skerry_server.core import expiry
from skerry_server.repository import Repository
from tuf.api.metadata import Metadata

from tests.integration.tuf.conftest import DeviceHere

DAY_S = 86_400.0


@pytest.fixture
def device_here(fleet, device):
    return DeviceHere(fleet, device.state_dir)


class Wrong:
    """A server over the fleet's repository whose clock is off by ``off``; ``gone_s`` is what truly went by since the test began."""

    def __init__(self, fleet, signers=None):
        self.fleet, self.signers = fleet, signers or fleet.online
        self.began = fleet.clock()
        self.off = dt.timedelta()
        self.gone_s = 0.0
        self.restart()

    def restart(self):
        began_s = self.gone_s
        self.repository = Repository(self.fleet.path, self.signers, self.clock, lambda: self.gone_s - began_s)
        self.repository.refresh_expiring()

    def clock(self):
        return self.now() + self.off

    def now(self):
        return self.began + dt.timedelta(seconds=self.gone_s)

    def spend(self, days, step_s=DAY_S / 4):
        for _ in range(round(days * DAY_S / step_s)):
            self.gone_s += step_s
            self.repository.refresh_expiring()
            yield

    def signed(self):
        signed = Metadata.from_bytes((self.fleet.path / "metadata" / "timestamp.json").read_bytes()).signed
        return signed.unrecognized_fields[layout.SIGNED_AT_FIELD], signed.expires

    def ahead_days(self):
        return (self.signed()[0] - self.now().timestamp()) / DAY_S

    def alerts(self):
        roles = {role: (held["version"], held["expires_ms"]) for role, held in self.repository.status().items()}
        now_ms = int(self.clock().timestamp() * 1000)
        return expiry.alerts(roles, {}, now_ms, clock_behind=self.repository.clock_behind)


@pytest.mark.attack("clock poisoning")
def test_a_server_whose_clock_is_behind_stops_no_device(fleet, device_here):
    server = Wrong(fleet)
    server.off = dt.timedelta(days=-4000)
    for generation in range(1, 4):
        for _ in server.spend(1):
            assert server.signed()[1] > server.now()
        assert abs(server.ahead_days()) < 0.1
        server.repository.publish_group("line-1", fleet.document(generation))
        synced = device_here.sync(now_s=server.now().timestamp())
        assert json.loads(synced["group_document"])["generation"] == generation
        if generation == 2:
            server.restart()
    alerts = server.alerts()
    assert "clock_behind" in {alert.code for alert in alerts if alert.role == "timestamp"}
    assert "signed_time_ahead" not in {alert.code for alert in alerts}
    assert not [alert for alert in alerts if "new-online-key" in alert.do]
    server.off = dt.timedelta()
    for _ in server.spend(1):
        pass
    assert (server.repository.clock_behind, server.alerts()) == (False, ())
    assert abs(server.ahead_days()) < 0.6


def test_a_server_whose_clock_is_behind_may_be_started_again_and_again(fleet):
    server = Wrong(fleet)
    server.off = dt.timedelta(days=-30)
    for day in range(3):
        for _ in server.spend(1, step_s=7200.0):
            assert server.signed()[1] > server.now(), day
        server.restart()


@pytest.mark.attack("clock poisoning")
def test_a_clock_that_runs_ahead_after_months_is_believed_no_further_than_at_once(fleet):
    server = Wrong(fleet)
    for _ in server.spend(100, step_s=10 * DAY_S):
        pass
    assert abs(server.ahead_days()) < 0.1
    server.off = dt.timedelta(days=400)
    server.repository.refresh_expiring()
    assert 0 < server.ahead_days() < 7.1
    server.off = dt.timedelta()
    for _ in server.spend(9):
        pass
    assert server.ahead_days() < 0.1, "it waited for the clock, which is where it was"
    assert server.alerts() == ()


@pytest.mark.attack("clock poisoning")
def test_a_server_whose_clock_is_ahead_goes_no_further_for_being_started_again_and_again(fleet, device_here):
    server = Wrong(fleet)
    server.off = dt.timedelta(days=400)
    for _ in range(30):
        server.gone_s += 60.0
        server.restart()
    # What went by, twice: once measured, once as the clock had it.
    assert 0 < server.ahead_days() < 7.1
    for _ in server.spend(1):
        pass
    assert server.ahead_days() < 8.1
    server.off = dt.timedelta()
    server.restart()
    server.repository.publish_group("line-1", fleet.document(2))
    synced = device_here.sync(now_s=server.now().timestamp())
    assert json.loads(synced["group_document"])["generation"] == 2 and synced["catalog_error"] is None


@pytest.mark.attack("clock poisoning")
def test_the_first_time_of_a_new_online_key_is_bounded_by_when_its_root_was_signed(fleet, device_here):
    new = online_keys.add(fleet.folder / "keys")
    named = {new.public_key.keyid: new.public_key}
    now = fleet.clock()
    root = keys.next_root(fleet.ceremony.root, signers=[fleet.signer("root")], now=now, online_keys=named)
    targets = keys.next_targets(
        fleet.ceremony.targets, root=root, signers=[fleet.signer("targets")], now=now, online_keys=named
    )
    server = Wrong(fleet, online_keys.open_all(fleet.folder / "keys"))
    server.off = dt.timedelta(days=300)
    server.repository.install(root=root, targets=targets)
    assert 0 < server.ahead_days() < 7.1
    server.off = dt.timedelta()
    server.repository.publish_group("line-1", fleet.document(2))
    synced = device_here.sync(now_s=server.now().timestamp())
    assert json.loads(synced["group_document"])["generation"] == 2
    assert synced["signed_by"] == [new.public_key.keyid]


def test_the_first_time_of_a_fleet_is_bounded_by_its_ceremony(fleet, tmp_path):
    made = fleet.ceremony
    server = Wrong(fleet)
    server.off = dt.timedelta(days=120)
    first = Repository(tmp_path / "first", fleet.online, server.clock)
    first.install_root(made.root)
    first.install_targets(made.targets)
    first.install_catalog(made.catalog, made.floors, lambda _: None)
    timestamp = Metadata.from_bytes((tmp_path / "first" / "metadata" / "timestamp.json").read_bytes()).signed
    said_s = timestamp.unrecognized_fields[layout.SIGNED_AT_FIELD]
    assert 0 < said_s - server.now().timestamp() < 7.1 * DAY_S
