"""Whom a new device believes: the token, and nothing that a server says beyond it."""

import json

import pytest
from skerry_contract import enrolment

ZERO = "0" * 64


def test_enrolment_leaves_a_whole_identity(fleet, blank):
    answer = blank.ok("enrol", token=fleet.token())
    identity = blank.state_dir / "identity"
    assert json.loads((identity / "enrolled.json").read_text()) == answer
    assert answer == {
        "device_id": "press-7",
        "group": "line-1",
        "server_url": fleet.site.url,
        "repository_url": fleet.url,
        "mqtt": {"host": "127.0.0.1", "port": 8883},
    }
    assert (identity / "root.json").read_bytes() == fleet.ceremony.root
    assert (identity / "fleet-ca.pem").read_text() == fleet.authority.pem
    assert (identity / "device.key").stat().st_mode & 0o777 == 0o600
    assert identity.stat().st_mode & 0o777 == 0o700


def test_wrong_root_is_refused_before_the_token_is_spent(fleet, blank):
    assert blank.error("enrol", token=fleet.token(root_sha256=ZERO)) == ("rejected", "untrusted_root")
    assert "/device/v1/enrol" not in fleet.site.asked
    assert blank.files() == {}


@pytest.mark.attack("stolen server enrols a device")
def test_server_that_swaps_the_root_is_refused(fleet, blank, make_fleet):
    other = make_fleet("other")
    fleet.metadata_file("1.root.json").write_bytes(other.ceremony.root)
    assert blank.error("enrol", token=fleet.token()) == ("rejected", "untrusted_root")


def test_server_with_another_ca_gets_neither_token_nor_key(fleet, blank, make_fleet):
    impostor = make_fleet("impostor")
    token = fleet.token(server_url=impostor.site.url)
    assert blank.error("enrol", token=token) == ("rejected", "untrusted_server")
    assert impostor.site.asked == ["/device/v1/ca"]
    assert blank.files() == {}


def test_server_that_shows_our_ca_but_holds_another_key_gets_nothing(fleet, blank, make_fleet):
    impostor = make_fleet("impostor")
    impostor.site.shown_ca = fleet.authority.pem
    token = fleet.token(server_url=impostor.site.url)
    assert blank.error("enrol", token=token) == ("transient", "unreachable")
    assert impostor.site.asked == ["/device/v1/ca"]
    assert blank.files() == {}


@pytest.mark.attack("stolen server enrols a device")
def test_an_existing_root_is_never_replaced(fleet, device, make_fleet):
    before = device.files()
    other = make_fleet("other")
    assert device.error("enrol", token=other.token()) == ("rejected", "untrusted_root")
    assert other.site.asked == []
    assert device.files() == before


def test_enrolling_again_keeps_key_and_root(fleet, device):
    identity = device.state_dir / "identity"
    key, root = (identity / "device.key").read_bytes(), (identity / "root.json").read_bytes()
    device.ok("enrol", token=fleet.token())
    assert ((identity / "device.key").read_bytes(), (identity / "root.json").read_bytes()) == (key, root)


def test_enrolment_cut_after_the_answer_can_be_repeated(fleet, device):
    (device.state_dir / "identity" / "enrolled.json").unlink()
    assert device.ok("enrol", token=fleet.token())["device_id"] == "press-7"


def test_unknown_token_is_named_and_leaves_the_device_unenrolled(fleet, blank):
    assert blank.error("enrol", token=fleet.token(token="guess")) == ("rejected", "bad_enrolment_token")
    assert not (blank.state_dir / "identity" / "enrolled.json").exists()
    assert blank.error("sync", group="line-1") == ("degraded", "not_enrolled")


@pytest.mark.parametrize("text", ["", "abc", "skerry1.", "skerry1.e30", "skerry2.e30", "skerry1." + "A" * 5000])
def test_torn_token_is_refused_without_a_connection(fleet, blank, text):
    asked = len(fleet.site.asked)
    assert blank.error("enrol", token=text) == ("rejected", "bad_token")
    assert len(fleet.site.asked) == asked


def test_device_with_its_clock_at_1970_enrols_and_syncs(fleet, blank):
    fleet.repository.publish_group("line-1", fleet.document())
    assert blank.ok("enrol", token=fleet.token(), now_s=0)["device_id"] == "press-7"
    synced = blank.sync(now_s=0)
    assert synced["membership"]["group"] == "line-1"
    assert synced["signed_at"] > 0


def test_device_with_a_newer_root_in_its_token_finds_it(fleet, blank):
    from skerry_cli import keys

    second = keys.next_root(fleet.ceremony.root, signers=[fleet.signer("root")], now=fleet.clock())
    fleet.repository.install_root(second)
    import hashlib

    blank.ok("enrol", token=fleet.token(root_sha256=hashlib.sha256(second).hexdigest()))
    assert (blank.state_dir / "identity" / "root.json").read_bytes() == second


def test_certificate_for_another_name_or_key_is_refused(fleet, device, blank):
    token = enrolment.parse(fleet.token("press-8"))
    right = fleet.site.authority.issue_device

    def other_name(name, public, now):
        return right("press-9", public, now)

    fleet.site.authority.issue_device = other_name
    try:
        assert blank.error("enrol", token=enrolment.build(token)) == ("rejected", "malformed_answer")
    finally:
        fleet.site.authority.issue_device = right
    assert not (blank.state_dir / "identity" / "enrolled.json").exists()
