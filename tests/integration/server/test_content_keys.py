"""Content keys on a real server: what lies where, who is given one, and who is not."""

from __future__ import annotations

import base64
import json
import secrets
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_cli import sealing
from skerry_cli.bundle import read_bundle
from skerry_cli.errors import Failed, RefusedForSafety
from skerry_cli.publishing import push
from skerry_contract import manifest as m
from skerry_contract import sealed

from tests import models
from tests.rig_server import DeviceRig, Operator, ServerRig

KEY = secrets.token_bytes(32)


def build(folder: Path, version: str, key: bytes = KEY, **more: Any) -> str:
    digest = models.build_bundle(folder, "veiled", version, content_key=key, **more)
    sealing.key_file(folder).write_bytes(sealed.encode_key_file(key))
    return digest


@pytest.fixture(scope="module")
def approved(server: ServerRig, operator: Operator, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An encrypted bundle that was built, pushed, validated and approved, and that the group runs."""
    folder = tmp_path_factory.mktemp("veiled") / "bundle"
    digest = build(folder, "1.0.0", padding=300_000)
    said = push(operator.api, read_bundle(folder))
    assert (said.state, said.digest, said.sent_files) == ("validated", digest, 3)
    operator.approve("veiled", "1.0.0", digest)
    server.good("PUT", "/api/v1/groups/press/models/veiled", {"stable": digest})
    return digest, folder


def pem(key: ec.EllipticCurvePrivateKey) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def unwrap(answer: Any, key: ec.EllipticCurvePrivateKey, device: str, digest: str) -> bytes:
    wrapped = sealed.decode_wrapped(answer["wrapped"])
    sender = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), wrapped.point)
    receiver = key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    secret = key.exchange(ec.ECDH(), sender)
    wrapping, about = sealed.wrapping_key(secret, sender=wrapped.point, receiver=receiver, device=device, digest=digest)
    return sealed.unwrap(wrapped, wrapping, about, AESGCM)


@pytest.mark.attack("stolen repository")
def test_a_stolen_repository_or_database_shows_no_weights(server: ServerRig, approved: tuple[str, Path]) -> None:
    _, folder = approved
    pieces = [(folder / name).read_bytes() for name in ("model.onnx", "golden.jsonl", "padding.bin")]
    needles = [data[at : at + 24] for data in pieces for at in range(0, len(data) - 24, max(24, len(data) // 50))]
    # The manifest is public: names of tensors, ranges and reference counts stand in it.
    manifest = (folder / m.MANIFEST_FILE).read_bytes()
    needles = [needle for needle in needles if needle not in manifest]
    assert len(needles) > 100
    stolen = [path for path in (server.data / "repository").rglob("*") if path.is_file()]
    stolen += list(server.data.glob("*.db*"))
    assert len(stolen) > 10
    for path in stolen:
        data = path.read_bytes()
        assert not [needle for needle in needles if needle in data], path
        assert KEY not in data, path
        assert base64.b64encode(KEY) not in data, path
    assert not list((server.data / "validation").iterdir()), "what was laid out in the clear is gone"


@pytest.mark.attack("foreign content key")
def test_a_device_gets_the_key_of_what_its_group_runs_and_of_nothing_else(
    server: ServerRig, operator: Operator, approved: tuple[str, Path], device: DeviceRig, tmp_path: Path
) -> None:
    digest, _ = approved
    key = ec.generate_private_key(ec.SECP256R1())
    found = device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(key)})
    assert found.status == 200, found.data
    assert unwrap(found.json(), key, device.id, digest) == KEY
    assert KEY not in found.data and base64.b64encode(KEY) not in found.data

    other = build(tmp_path / "b", "1.1.0")
    push(operator.api, read_bundle(tmp_path / "b"))
    operator.approve("veiled", "1.1.0", other)
    refused = device.ask("POST", f"/device/v1/keys/{other}", {"encryption_key": pem(key)})
    assert (refused.status, refused.code) == (403, "key_not_allowed")
    server.good("PUT", f"/api/v1/devices/{device.id}/pins/veiled", {"digest": other, "reason": "try"})
    assert device.ask("POST", f"/device/v1/keys/{other}", {"encryption_key": pem(key)}).status == 200
    # The way back: what it had before, its pin notwithstanding.
    assert device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(key)}).status == 200
    given = server.good("GET", f"/api/v1/bundles/{digest}/releases?limit=1000")["items"]
    assert [(one["device"], one["times"]) for one in given if one["device"] == device.id] == [(device.id, 2)]


@pytest.mark.attack("foreign content key")
def test_a_thief_of_the_signing_key_cannot_put_an_encryption_key_of_his_own_in_its_place(
    server: ServerRig, approved: tuple[str, Path], device: DeviceRig
) -> None:
    digest, _ = approved
    own, thief = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    assert device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(own)}).status == 200
    refused = device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(thief)})
    assert (refused.status, refused.code) == (403, "encryption_key_differs")
    server.good("POST", f"/api/v1/devices/{device.id}/forget-key", {"reason": "a new board"})
    found = device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(thief)})
    assert unwrap(found.json(), thief, device.id, digest) == KEY


@pytest.mark.attack("foreign content key")
def test_a_key_that_a_person_carries_opens_on_its_device_alone(
    server: ServerRig, operator: Operator, approved: tuple[str, Path], device: DeviceRig, tmp_path: Path
) -> None:
    digest, _ = approved
    key = ec.generate_private_key(ec.SECP256R1())
    way = f"/api/v1/bundles/{digest}/key"
    unknown = server.ask("POST", f"{way}/{device.id}")
    assert (unknown.status, "encryption key" in unknown.data.decode()) == (404, True), "it has named none yet"
    device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(key)})
    found = server.ask("POST", f"{way}/{device.id}")
    assert found.status == 200, found.data
    assert unwrap(found.json(), key, device.id, digest) == KEY
    assert KEY not in found.data and base64.b64encode(KEY) not in found.data
    for holder, name in ((ec.generate_private_key(ec.SECP256R1()), device.id), (key, "another")):
        with pytest.raises(sealed.CannotOpen):
            unwrap(found.json(), holder, name, digest)

    other = build(tmp_path / "b", "1.7.0")
    push(operator.api, read_bundle(tmp_path / "b"))
    operator.approve("veiled", "1.7.0", other)
    refused = server.ask("POST", f"/api/v1/bundles/{other}/key/{device.id}")
    assert (refused.status, refused.code) == (403, "key_not_allowed")
    said = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    carried = [one for one in said if one["action"] == "content_key.carry"]
    assert [(one["subject"], one["after"]) for one in carried if device.id in str(one["after"])] == [
        (f"bundle:{digest}", {"device": device.id})
    ]
    server.good("POST", f"/api/v1/devices/{device.id}/revoke", {"reason": "stolen"})
    assert server.ask("POST", f"{way}/{device.id}").code == "revoked"
    assert server.ask("POST", f"{way}/nobody").status == 404


def test_the_key_that_came_with_the_enrolment_stays_and_a_new_enrolment_brings_another(
    server: ServerRig, approved: tuple[str, Path], tmp_path: Path
) -> None:
    digest, _ = approved
    first, second = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    one = DeviceRig(server, "veiled-1", tmp_path / "one")
    one.enrol(encryption_key=pem(first))
    assert (
        one.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(second)}).code == "encryption_key_differs"
    )
    again = DeviceRig(server, "veiled-1", tmp_path / "again")
    again.enrol(encryption_key=pem(second))
    found = again.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(second)})
    assert unwrap(found.json(), second, "veiled-1", digest) == KEY


def test_a_revoked_device_gets_no_key(server: ServerRig, approved: tuple[str, Path], device: DeviceRig) -> None:
    digest, _ = approved
    key = pem(ec.generate_private_key(ec.SECP256R1()))
    assert device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": key}).status == 200
    server.good("POST", f"/api/v1/devices/{device.id}/revoke", {"reason": "stolen"})
    assert device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": key}).status == 401


@pytest.mark.parametrize("wish", ["", "nonsense", "rsa"])
def test_what_is_no_p256_key_is_refused(
    server: ServerRig, approved: tuple[str, Path], device: DeviceRig, wish: str
) -> None:
    digest, _ = approved
    if wish == "rsa":
        from cryptography.hazmat.primitives.asymmetric import ed25519

        public = ed25519.Ed25519PrivateKey.generate().public_key()
        wish = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    refused = device.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": wish})
    assert (refused.status, refused.code) == (422, "bad_encryption_key")


def test_a_key_that_the_manifest_does_not_name_is_not_taken(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    digest = build(tmp_path / "b", "2.0.0")
    bundle = read_bundle(tmp_path / "b")
    server.good("POST", "/api/v1/bundles", data=bundle.data)
    refused = server.ask("PUT", f"/api/v1/bundles/{digest}/key", {"key": base64.b64encode(bytes(32)).decode()})
    assert (refused.status, refused.code) == (422, "wrong_content_key")
    for file in m.parse(bundle.data).files():
        data = models.seal((tmp_path / "b" / file.path).read_bytes(), KEY)
        server.good("PUT", f"/api/v1/blobs/{file.sha256}", data=data)
    early = server.ask("POST", f"/api/v1/bundles/{digest}/validate")
    assert (early.status, early.code) == (409, "content_key_missing")
    assert push(operator.api, bundle).state == "validated"


def test_a_bundle_whose_ciphertext_hides_something_else_is_rejected(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    """The engineer's tool lies: the file under the listed digest opens to another model than the one listed."""
    folder = tmp_path / "b"
    build(folder, "3.0.0")
    value = json.loads((folder / m.MANIFEST_FILE).read_bytes())
    for file in value["variants"][0]["files"]:
        if file["path"] == "model.onnx":
            file["plain"]["sha256"] = "0" * 64
    data = m.canonical.encode(value)
    digest = server.good("POST", "/api/v1/bundles", data=data)["digest"]
    for file in m.parse(data).files():
        stored = models.seal((folder / file.path).read_bytes(), KEY)
        server.good("PUT", f"/api/v1/blobs/{file.sha256}", data=stored)
    server.good("PUT", f"/api/v1/bundles/{digest}/key", {"key": base64.b64encode(KEY).decode()})
    found = server.good("POST", f"/api/v1/bundles/{digest}/validate")
    assert found["state"] == "rejected"
    assert found["reason"].startswith("cannot_decrypt")
    with pytest.raises(RefusedForSafety, match=r"model\.onnx: chunk 0"):
        operator.approve("veiled", "3.0.0", digest)


def test_an_approver_without_the_key_signs_nothing(server: ServerRig, operator: Operator, tmp_path: Path) -> None:
    digest = build(tmp_path / "b", "4.0.0")
    server.good("POST", "/api/v1/bundles", data=read_bundle(tmp_path / "b").data)
    with pytest.raises(Failed, match="has no content key"):
        operator.approve("veiled", "4.0.0", digest)


def test_people_who_had_the_key_stand_in_the_audit_and_a_viewer_never_does(
    server: ServerRig, approved: tuple[str, Path]
) -> None:
    digest, _ = approved
    viewer = server.good("POST", "/api/v1/tokens", {"name": "onlooker", "role": "viewer"})["token"]
    assert server.ask("GET", f"/api/v1/bundles/{digest}/key", token=viewer).status == 403
    assert base64.b64decode(server.good("GET", f"/api/v1/bundles/{digest}/key")["key"]) == KEY
    rows = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    assert [row for row in rows if row["action"] == "content_key.read" and row["subject"] == f"bundle:{digest}"]
    assert base64.b64encode(KEY).decode() not in json.dumps(rows)


def test_an_operators_token_is_refused_the_key_and_who_enrols_a_device_for_it_stands_in_the_records(
    server: ServerRig, approved: tuple[str, Path], tmp_path: Path
) -> None:
    """What the attacker table says of this role: no key for itself, and a device of its own in the group has every key of the group."""
    digest, _ = approved
    token = server.good("POST", "/api/v1/tokens", {"name": "hand", "role": "operator"})["token"]
    assert server.ask("GET", f"/api/v1/bundles/{digest}/key", token=token).status == 403
    wish = {"device_id": "of-his-own", "group": "press", "expires_s": 600}
    made = server.ask("POST", "/api/v1/enrolment-tokens", wish, token=token)
    thief, key = DeviceRig(server, "of-his-own", tmp_path), ec.generate_private_key(ec.SECP256R1())
    thief.enrol(made.json()["token"], encryption_key=pem(key))
    found = thief.ask("POST", f"/device/v1/keys/{digest}", {"encryption_key": pem(key)})
    assert unwrap(found.json(), key, thief.id, digest) == KEY
    rows = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    assert [row for row in rows if row["actor"] == "token:hand"], "who made the enrolment token"
    given = server.good("GET", f"/api/v1/bundles/{digest}/releases?limit=1000")["items"]
    assert thief.id in {one["device"] for one in given}


def test_a_version_in_the_clear_of_an_encrypted_model_is_refused_before_a_file_is_sent_unless_it_is_meant(
    server: ServerRig, operator: Operator, approved: tuple[str, Path], tmp_path: Path
) -> None:
    digest = models.build_bundle(tmp_path / "b", "veiled", "7.0.0", seed=77)
    bundle = read_bundle(tmp_path / "b")
    with pytest.raises(Failed, match=r"encrypted_before.*--encrypt"):
        push(operator.api, bundle)
    assert server.ask("GET", f"/api/v1/bundles/{digest}").status == 404, "nor is its version taken"
    weights = next(file for file in bundle.manifest.files() if file.path == "model.onnx")
    assert not list((server.data / "repository").rglob(weights.sha256))
    with pytest.raises(RefusedForSafety, match="in the clear"):
        push(operator.api, bundle, must_be_encrypted=frozenset({"*"}), clear=True)
    assert push(operator.api, bundle, clear=True).state == "validated"
    assert push(operator.api, bundle).sent_files == 0, "what is here already is not asked about again"


@pytest.mark.slow
def test_a_database_without_its_release_key_says_so_and_a_push_mends_it(tmp_path: Path) -> None:
    rig = ServerRig(tmp_path / "server").start()
    try:
        folder = tmp_path / "b"
        digest = build(folder, "1.0.0")
        operator = Operator(rig, tmp_path / "operator")
        push(operator.api, read_bundle(folder))
        rig.stop()
        (rig.data / "keys" / "release.key").write_bytes(bytes(32))
        rig.start()
        refused = rig.ask("GET", f"/api/v1/bundles/{digest}/key")
        assert (refused.status, refused.code) == (503, "content_key_unreadable")
        operator = Operator(rig, tmp_path / "operator-again")
        push(operator.api, read_bundle(folder))
        assert base64.b64decode(rig.good("GET", f"/api/v1/bundles/{digest}/key")["key"]) == KEY
        with sqlite3.connect(next(rig.data.glob("*.db"))) as db:
            assert KEY not in db.execute("SELECT box FROM content_keys").fetchone()[0]
    finally:
        rig.close()
