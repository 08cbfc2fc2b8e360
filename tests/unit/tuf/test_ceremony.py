"""The operator's keys: made once, kept private, never written over."""

import datetime as dt
import hashlib
import json
import stat

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_cli import key_files, keys
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_contract import layout
from tuf.api.metadata import Metadata, Root

NOW = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)


@pytest.fixture
def online():
    key = CryptoSigner.generate_ed25519().public_key
    return {key.keyid: key}


def hold(folder, online, **more):
    return keys.hold_ceremony(folder, **{"online_keys": online, "password": None, "now": NOW, **more})


def test_documents_are_those_of_the_design(tmp_path, online):
    made = hold(tmp_path / "keys", online, approvers=("ada", "bea"), threshold=2)
    root = Metadata.from_bytes(made.root).signed
    targets = Metadata.from_bytes(made.targets).signed
    catalog = Metadata.from_bytes(made.catalog).signed
    assert made.root_sha256 == hashlib.sha256(made.root).hexdigest()
    assert root.expires - NOW == dt.timedelta(days=365)
    assert targets.expires - NOW == dt.timedelta(days=365)
    assert catalog.expires - NOW == dt.timedelta(days=180)
    assert root.roles["snapshot"].keyids == root.roles["timestamp"].keyids == list(online)
    roles = targets.delegations.roles
    assert list(roles) == [layout.CATALOG_ROLE, layout.FLEET_ROLE]
    assert (roles["catalog"].terminating, roles["catalog"].threshold) == (True, 2)
    assert roles["catalog"].paths == list(layout.CATALOG_PATHS)
    assert (roles["fleet"].terminating, roles["fleet"].keyids) == (False, list(online))
    assert not set(roles["catalog"].keyids) & set(online)
    assert made.floors == b'{"floors":{},"schema":1}'
    root.verify_delegate(
        Root.type, Metadata.from_bytes(made.root).signed_bytes, Metadata.from_bytes(made.root).signatures
    )


def test_private_keys_are_private_encrypted_and_open_with_their_password_only(tmp_path, online):
    made = hold(tmp_path / "keys", online, password=b"tide", approvers=("ada",))
    path = made.key_path("ada")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"ENCRYPTED" in path.read_bytes()
    keyid = key_files.load_signer(path, b"tide").public_key.keyid
    assert made.holder(keyid) == "ada"
    for wrong in (None, b"ebb"):
        with pytest.raises(Usage):
            key_files.load_signer(path, wrong)
    with pytest.raises(Usage, match="empty"):
        hold(tmp_path / "other", online, password=b"")


def test_nothing_private_is_in_what_is_posted_or_recorded(tmp_path, online):
    made = hold(tmp_path / "keys", online)
    public = made.root + made.targets + made.catalog + json.dumps(made.record).encode()
    assert b"PRIVATE" not in public


def test_a_folder_in_use_is_never_written_to(tmp_path, online):
    made = hold(tmp_path / "keys", online)
    with pytest.raises(Usage, match="not empty"):
        hold(tmp_path / "keys", online)
    assert keys.read_ceremony(tmp_path / "keys").root == made.root


def test_ceremony_that_was_cut_short_is_not_read(tmp_path, online):
    hold(tmp_path / "keys", online)
    (tmp_path / "keys" / keys.RECORD_FILE).unlink()
    with pytest.raises(Usage, match="finished ceremony"):
        keys.read_ceremony(tmp_path / "keys")


def test_root_that_is_not_the_recorded_one_is_refused(tmp_path, online):
    hold(tmp_path / "keys", online)
    other = hold(tmp_path / "other", online)
    (tmp_path / "keys" / keys.ROOT_FILE).write_bytes(other.root)
    with pytest.raises(RefusedForSafety, match="sha256"):
        keys.read_ceremony(tmp_path / "keys")


@pytest.mark.parametrize(
    "wish",
    [
        {"threshold": 2},
        {"threshold": 0},
        {"approvers": ("ada", "ada")},
        {"approvers": ("root",)},
        {"approvers": ("../ada",)},
        {"approvers": ()},
        {"online_keys": {}},
    ],
)
def test_wishes_that_cannot_be_leave_no_file(tmp_path, online, wish):
    with pytest.raises(Usage):
        hold(tmp_path / "keys", online, **wish)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("make", [CryptoSigner.generate_ed25519, CryptoSigner.generate_ecdsa])
def test_online_keys_are_read_in_every_form_a_server_gives_them(make):
    key = make().public_key
    body = key.to_dict()
    for form in (body, {"keyid": key.keyid, **body}, {key.keyid: body}, {"keys": {key.keyid: body}}):
        assert key_files.read_online_keys(json.dumps(form)) == {key.keyid: key}


def test_online_key_under_anothers_id_is_refused():
    key, other = CryptoSigner.generate_ed25519().public_key, CryptoSigner.generate_ed25519().public_key
    with pytest.raises(Usage, match="does not follow"):
        key_files.read_online_keys(json.dumps({other.keyid: key.to_dict()}))
    for text in ("", "[]", "{}", '{"keys": {}}', '{"keyval": 1}', '{"x": 1}'):
        with pytest.raises(Usage):
            key_files.read_online_keys(text)


def test_next_root_needs_old_and_new_holders(tmp_path, online):
    made = hold(tmp_path / "keys", online)
    old = key_files.load_signer(made.key_path("root"), None)
    new = CryptoSigner.generate_ed25519()
    wish = {"now": NOW, "root_keys": {new.public_key.keyid: new.public_key}}
    for signers in ([old], [new]):
        with pytest.raises(RefusedForSafety):
            keys.next_root(made.root, signers=signers, **wish)
    second = Metadata.from_bytes(keys.next_root(made.root, signers=[old, new], **wish)).signed
    assert (second.version, second.roles["root"].keyids) == (2, [new.public_key.keyid])
    assert old.public_key.keyid not in second.keys


def test_next_targets_is_signed_by_those_root_names(tmp_path, online):
    made = hold(tmp_path / "keys", online)
    wish = {"root": made.root, "now": NOW + dt.timedelta(days=300)}
    with pytest.raises(RefusedForSafety):
        keys.next_targets(made.targets, signers=[key_files.load_signer(made.key_path("approver"), None)], **wish)
    data = keys.next_targets(made.targets, signers=[key_files.load_signer(made.key_path("targets"), None)], **wish)
    new = Metadata.from_bytes(data).signed
    assert (new.version, new.expires - NOW) == (2, dt.timedelta(days=665))
    assert new.delegations.to_dict() == Metadata.from_bytes(made.targets).signed.delegations.to_dict()


def test_ecdsa_ceremony_works_too(tmp_path, online):
    made = hold(tmp_path / "keys", online, key_type="ecdsa")
    assert key_files.load_signer(made.key_path("root"), None).public_key.keytype == "ecdsa"
