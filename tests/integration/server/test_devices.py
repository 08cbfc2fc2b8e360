"""Devices enter, prove who they are, and leave: over real HTTPS, with real keys."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.rig_server import Answer, DeviceRig, ServerRig, csr, key_id, private_pem


def new_token(server: ServerRig, **wish: Any) -> str:
    return str(server.good("POST", "/api/v1/enrolment-tokens", {"group": "press", "expires_s": 600, **wish})["token"])


def enrol(server: ServerRig, token: str, key: Any, name: str | None = None, **more: Any) -> Any:
    return server.ask("POST", "/device/v1/enrol", {"token": token, "csr": csr(key, name), **more}, token="")


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


# --- enrolment -----------------------------------------------------------------------------------------------------------


@pytest.mark.attack("foreign names in a CSR")
def test_the_certificate_carries_the_device_id_and_nothing_that_the_request_asked_for(server: ServerRig) -> None:
    key = p256()
    token = new_token(server, device_id="plain-1")
    wish = csr(key, "plain-1", ("_server", "other-device", "localhost"))
    found = server.good("POST", "/device/v1/enrol", {"token": token, "csr": wish}, token="")
    certificate = x509.load_pem_x509_certificate(found["certificate"].encode())
    assert [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["plain-1"]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("plain-1"), x509.UniformResourceIdentifier(f"urn:skerry:key:{key_id(key)}")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca is False
    authority = x509.load_pem_x509_certificate(found["ca"].encode())
    certificate.verify_directly_issued_by(authority)
    assert certificate.public_key() == key.public_key()
    assert found["group"] == "press"
    assert found["mqtt"] == server.mqtt
    assert found["repository_url"] == f"{server.url}/repository"


@pytest.mark.parametrize("name", ["_server", "someone-else", "*", "plain-2.evil", "PLAIN-2"])
@pytest.mark.attack("foreign names in a CSR")
def test_a_request_under_another_name_gets_no_certificate(server: ServerRig, name: str) -> None:
    found = enrol(server, new_token(server, device_id="plain-2"), p256(), name)
    assert (found.status, found.code) == (403, "wrong_device")
    assert server.ask("GET", "/api/v1/devices/plain-2").status == 404


def test_a_token_is_used_once_and_a_lost_answer_can_be_asked_for_again_with_the_same_key(server: ServerRig) -> None:
    token, key = new_token(server, device_id="once"), p256()
    assert enrol(server, token, key).status == 200
    again = enrol(server, token, key)
    assert again.status == 200
    assert again.json()["device_id"] == "once"
    thief = enrol(server, token, p256())
    assert (thief.status, thief.code) == (401, "bad_enrolment_token")
    held = server.good("GET", "/api/v1/devices/once")
    assert held["public_key_sha256"] == key_id(key)


def test_an_expired_or_invented_token_is_refused_alike(server: ServerRig) -> None:
    token = new_token(server, device_id="late", expires_s=0.2)
    time.sleep(0.4)
    answers = {enrol(server, text, p256()).data for text in (token, "ske_invented", token[:-1], token + "x")}
    assert len(answers) == 1
    assert json.loads(answers.pop())["error"]["code"] == "bad_enrolment_token"


def test_a_prefix_token_takes_new_ids_with_the_prefix_as_often_as_it_says(server: ServerRig) -> None:
    token = new_token(server, serial_prefix="line7-", uses=2)
    assert enrol(server, token, p256(), "line8-1").code == "wrong_device"
    assert enrol(server, token, p256()).code == "bad_request"
    assert enrol(server, token, p256(), "line7-1").status == 200
    assert enrol(server, token, p256(), "line7-1").code == "id_taken"
    assert enrol(server, token, p256(), "line7-2").status == 200
    assert enrol(server, token, p256(), "line7-3").code == "bad_enrolment_token"


def test_one_key_is_one_device(server: ServerRig) -> None:
    key = p256()
    assert enrol(server, new_token(server, device_id="twin-1"), key).status == 200
    assert enrol(server, new_token(server, device_id="twin-2"), key).code == "key_taken"


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)], ids=["p384", "rsa"]
)
def test_other_kinds_of_keys_are_refused(server: ServerRig, key: Any) -> None:
    name = [x509.NameAttribute(NameOID.COMMON_NAME, "odd")]
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(name)).sign(key, hashes.SHA256())
    pem = request.public_bytes(serialization.Encoding.PEM).decode()
    token = new_token(server, device_id="odd")
    assert server.ask("POST", "/device/v1/enrol", {"token": token, "csr": pem}, token="").code == "bad_csr"


def test_a_request_that_its_key_did_not_sign_is_refused(server: ServerRig) -> None:
    lines = csr(p256(), "forged").splitlines()
    der = bytearray(base64.b64decode("".join(lines[1:-1])))
    der[-4] ^= 1
    pem = "\n".join([lines[0], base64.encodebytes(bytes(der)).decode().strip(), lines[-1]])
    token = new_token(server, device_id="forged")
    for text in (pem, "", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----", "x" * 20_000):
        assert server.ask("POST", "/device/v1/enrol", {"token": token, "csr": text}, token="").code == "bad_csr"
    assert enrol(server, token, p256()).status == 200, "the token was not used up"


@pytest.mark.parametrize(
    "wish",
    [
        {"device_id": "a", "serial_prefix": "b"},
        {},
        {"device_id": "_server"},
        {"device_id": "UP"},
        {"device_id": "a", "uses": 2},
        {"device_id": "a", "expires_s": 0},
        {"device_id": "a", "expires_s": 1e9},
        {"device_id": "a", "group": "nowhere"},
        {"serial_prefix": ""},
        {"device_id": "a", "tags": {"x": "y" * 500}},
    ],
)
def test_a_token_that_cannot_be_meant_is_refused(server: ServerRig, wish: dict[str, Any]) -> None:
    found = server.ask("POST", "/api/v1/enrolment-tokens", {"group": "press", **wish})
    assert found.status in (404, 422), found.data


def test_a_newcomer_can_fetch_the_ca_that_its_token_names(server: ServerRig) -> None:
    found = server.ask("GET", "/device/v1/ca", token="")
    certificate = x509.load_pem_x509_certificate(found.data)
    told = server.good("GET", "/api/v1/info")
    assert certificate.fingerprint(hashes.SHA256()).hex() == told["ca_sha256"]
    assert found.data.decode() == told["ca_pem"]


# --- signed requests -------------------------------------------------------------------------------------------------------


def test_a_signed_request_tells_the_device_its_membership(server: ServerRig, device: DeviceRig) -> None:
    found = device.ask("GET", "/device/v1/self").json()
    alone = found.pop("alone")
    assert found == {"device_id": device.id, "group": "press", "tags": {}, "version": 1, "logs": None, "orders": {}}
    enrolled = [item for item in server.good("GET", "/api/v1/devices")["items"] if item["status"] == "enrolled"]
    assert alone == (len(enrolled) == 1)


def test_a_device_learns_that_it_is_not_the_only_one_any_more(server: ServerRig, device: DeviceRig) -> None:
    assert enrol(server, new_token(server, device_id="another"), ec.generate_private_key(ec.SECP256R1())).status == 200
    assert device.ask("GET", "/device/v1/self").json()["alone"] is False


def test_an_ed25519_device_signs_with_its_own_algorithm(server: ServerRig) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    assert enrol(server, new_token(server, device_id="eddy"), key).status == 200
    nonce = server.good("GET", "/device/v1/nonce", token="")["nonce"]
    now = int(time.time())
    body = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    claims = {
        "sub": "eddy",
        "htm": "GET",
        "htu": "/device/v1/self",
        "body": body,
        "nonce": nonce,
        "iat": now,
        "exp": now + 9,
    }
    token = jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": key_id(key)})
    found = server.ask("GET", "/device/v1/self", headers={"Authorization": f"Skerry-JWT {token}"}, token="")
    assert found.json()["device_id"] == "eddy"


@pytest.mark.parametrize(
    "changes",
    [
        {"htu": "/device/v1/renew"},
        {"htm": "POST"},
        {"sub": "someone-else"},
        {"sub": "_server"},
        {"body": "0" * 64},
        {"exp": int(time.time()) + 3600},
        {"iat": int(time.time()) - 9000, "exp": int(time.time()) - 8950},
        {"iat": int(time.time()) + 9000, "exp": int(time.time()) + 9050},
        {"exp": None},
        {"iat": None},
        {"nonce": "never-given"},
        {"nonce": None},
        {"nonce": ["x"]},
        {"body": None},
        {"exp": "soon"},
        {"exp": 1e400},
        {"iat": 10**400, "exp": 10**400},
        {"htu": ["/device/v1/self"]},
    ],
    ids="-".join,
)
@pytest.mark.attack("replay of a signed request")
def test_a_token_for_another_request_or_time_is_refused(device: DeviceRig, changes: dict[str, Any]) -> None:
    claims = device.claims("GET", "/device/v1/self", **changes)
    if changes.get("nonce", "") is None:
        claims.pop("nonce", None)
    found = device.ask("GET", "/device/v1/self", authorization=device.signed(claims))
    assert found.status == 401, found.data
    assert found.code in ("bad_device_token", "bad_nonce")


@pytest.mark.attack("replay of a signed request")
def test_a_replayed_token_is_refused(device: DeviceRig) -> None:
    signed = device.signed(device.claims("GET", "/device/v1/self"))
    assert device.ask("GET", "/device/v1/self", authorization=signed).status == 200
    again = device.ask("GET", "/device/v1/self", authorization=signed)
    assert (again.status, again.code) == (401, "bad_nonce")


def test_a_nonce_cannot_be_used_up_by_someone_without_the_key(device: DeviceRig) -> None:
    claims = device.claims("GET", "/device/v1/self")
    forged = device.signed(claims, key=p256())
    assert device.ask("GET", "/device/v1/self", authorization=forged).code == "bad_device_token"
    assert device.ask("GET", "/device/v1/self", authorization=device.signed(claims)).status == 200


def test_a_token_cannot_choose_its_algorithm(device: DeviceRig, server: ServerRig) -> None:
    claims = device.claims("GET", "/device/v1/self")
    headers = {"kid": key_id(device.key)}
    shared = jwt.encode(claims, "k" * 32, algorithm="HS256", headers=headers)
    unsigned = jwt.encode(claims, "", algorithm="none", headers=headers)
    # The public key used as a shared secret, which a confused verifier would accept.
    public = server.good("GET", f"/api/v1/devices/{device.id}")["public_key_sha256"]
    confused = jwt.encode(claims, public, algorithm="HS256", headers=headers)
    other = jwt.encode(claims, ed25519.Ed25519PrivateKey.generate(), algorithm="EdDSA", headers=headers)
    for token in (shared, unsigned, confused, other):
        assert device.ask("GET", "/device/v1/self", authorization=f"Skerry-JWT {token}").code == "bad_device_token"


def test_a_device_cannot_speak_with_anothers_key_id(device: DeviceRig, server: ServerRig, tmp_path: Path) -> None:
    other = DeviceRig(server, "victim", tmp_path)
    other.enrol()
    claims = device.claims("GET", "/device/v1/self", sub="victim")
    as_victim = device.signed(claims, kid=key_id(other.key))
    assert device.ask("GET", "/device/v1/self", authorization=as_victim).code == "bad_device_token"
    assert device.ask("GET", "/device/v1/self", authorization=device.signed(claims)).code == "bad_device_token"
    for kid in ("", "0" * 64, "' or 1=1 --"):
        found = device.ask("GET", "/device/v1/self", authorization=device.signed(claims, kid=kid))
        assert found.code == "unknown_device"


@pytest.mark.parametrize(
    "authorization",
    [
        "Skerry-JWT",
        "Skerry-JWT ",
        "Skerry-JWT a.b.c",
        "Bearer x",
        "Skerry-JWT " + "a" * 9000,
        "Skerry-JWT ..",
        "skerry-jwt x",
    ],
)
def test_a_header_that_is_no_token_is_refused(device: DeviceRig, authorization: str) -> None:
    assert device.ask("GET", "/device/v1/self", authorization=authorization).code == "bad_device_token"


def test_an_operators_token_opens_no_device_route_and_a_devices_no_operator_route(
    device: DeviceRig, server: ServerRig
) -> None:
    assert server.ask("GET", "/device/v1/self").code == "bad_device_token"
    signed = device.signed(device.claims("GET", "/api/v1/info"))
    assert device.ask("GET", "/api/v1/info", authorization=signed).code == "bad_token"


def test_renewal_replaces_the_key_that_signed_it(device: DeviceRig) -> None:
    new = p256()
    body = {"csr": csr(new, device.id)}
    before = device.server.good("GET", f"/api/v1/devices/{device.id}")
    renewed = device.ask("POST", "/device/v1/renew", body)
    assert renewed.status == 200, renewed.data
    assert x509.load_pem_x509_certificate(renewed.json()["certificate"].encode()).public_key() == new.public_key()
    assert device.ask("GET", "/device/v1/self").code == "unknown_device", "the old key ended"
    device.key = new
    assert device.ask("GET", "/device/v1/self").status == 200
    after = device.server.good("GET", f"/api/v1/devices/{device.id}")
    assert after["certificate_serial"] != before["certificate_serial"]
    stolen = csr(p256(), device.id)
    signed_for_another_body = device.signed(device.claims("POST", "/device/v1/renew", json.dumps(body).encode()))
    found = device.ask("POST", "/device/v1/renew", {"csr": stolen}, authorization=signed_for_another_body)
    assert found.code == "bad_device_token"


def test_a_certificate_that_ended_is_renewed_within_the_days_of_grace_and_later_only_on_an_operators_word(
    device: DeviceRig,
) -> None:
    server = device.server

    def ended(days_ago: float) -> None:
        ms = int((time.time() - days_ago * 86_400) * 1000)
        with contextlib.closing(sqlite3.connect(server.data / "server.db", timeout=10)) as database, database:
            database.execute("UPDATE devices SET certificate_expires_ms = ? WHERE id = ?", (ms, device.id))

    def renew(key: Any) -> Answer:
        return device.ask("POST", "/device/v1/renew", {"csr": csr(key, device.id)})

    def audited() -> list[dict[str, Any]]:
        rows = server.good("GET", "/api/v1/audit?limit=1000")["items"]
        return [r["after"] for r in rows if r["subject"] == f"device:{device.id}" and r["action"] == "device.renew"]

    ended(729)
    assert renew(device.key).status == 200
    assert audited()[-1]["by_order"] is False
    ended(731)
    found = renew(device.key)
    assert (found.status, found.code) == (403, "certificate_expired")
    assert f"skerry device renew {device.id}" in found.json()["error"]["message"]
    assert len(audited()) == 1
    # Another key signs for nobody, whatever an operator allows.
    # A word about bundles opens nothing, to this device or to its group.
    server.good("POST", f"/api/v1/devices/{device.id}/retry", {"reason": "try again"})
    server.good("POST", f"/api/v1/groups/{device.group}/retry", {"reason": "try again"})
    assert renew(device.key).status == 403
    server.good("POST", f"/api/v1/devices/{device.id}/renew", {"reason": "found"})
    thief = device.signed(device.claims("POST", "/device/v1/renew"), key=p256())
    assert device.ask("POST", "/device/v1/renew", {"csr": csr(p256())}, authorization=thief).status == 401

    def standing() -> dict[str, bool]:
        orders = server.good("GET", f"/api/v1/devices/{device.id}/why")["orders"]
        return {order["kind"]: order["obeyed_ms"] is not None for order in orders}

    assert standing() == {"retry": False, "renew": False}
    assert renew(device.key).status == 200
    assert audited()[-1]["by_order"] is True
    assert standing() == {"retry": False, "renew": True}
    ended(1)
    server.good("POST", f"/api/v1/devices/{device.id}/revoke", {"reason": "lost"})
    assert renew(device.key).code == "unknown_device"
    assert server.ask("POST", f"/api/v1/devices/{device.id}/retry", {"reason": "x"}).status == 409
    assert server.ask("POST", f"/api/v1/devices/{device.id}/renew", {"reason": "x"}).status == 409


def connects(device: DeviceRig) -> bool:
    """Whether the broker lets it in within a moment."""
    try:
        device.connect(timeout_s=4)
    except (AssertionError, OSError):
        return False
    device.disconnect()
    return True


@pytest.mark.parametrize("how", ["renewed", "enrolled again"])
def test_the_broker_refuses_the_certificate_of_a_key_that_was_replaced(
    device: DeviceRig, tmp_path: Path, how: str
) -> None:
    server = device.server
    device.connect()
    assert device.client is not None
    gone: list[bool] = []
    device.client.on_disconnect = lambda *_: gone.append(True)
    new = DeviceRig(server, device.id, tmp_path)
    if how == "renewed":
        answer = device.ask("POST", "/device/v1/renew", {"csr": csr(new.key, device.id)}).json()
        (new.folder / "device.pem").write_text(answer["certificate"])
        (new.folder / "ca.pem").write_text(answer["ca"])
        (new.folder / "device.key").write_bytes(private_pem(new.key))
    else:
        new.enrol()
    server.wait("the old session's end", lambda: gone)
    device.client.loop_stop()
    device.client = None
    assert connects(new)
    assert not connects(device), "its certificate has not expired, and its name is right"
    assert connects(new)


def test_a_renewal_with_the_same_key_ends_no_session(device: DeviceRig) -> None:
    device.connect()
    assert device.client is not None
    gone: list[bool] = []
    device.client.on_disconnect = lambda *_: gone.append(True)
    old = (device.folder / "device.pem").read_text()
    answer = device.ask("POST", "/device/v1/renew", {"csr": csr(device.key, device.id)}).json()
    time.sleep(1.5)
    assert not gone
    device.disconnect()
    assert connects(device)
    (device.folder / "device.pem").write_text(answer["certificate"])
    assert connects(device)
    assert answer["certificate"] != old


# --- membership, pins, revocation ------------------------------------------------------------------------------------------


def test_a_membership_change_shows_at_the_device_and_rings_its_bell(device: DeviceRig, operator: Any) -> None:
    server = device.server
    server.good("PUT", "/api/v1/groups/second", {"settings": {}})
    device.connect()
    server.good("PUT", f"/api/v1/devices/{device.id}/membership", {"group": "second", "tags": {"hall": "3"}})
    found = device.ask("GET", "/device/v1/self").json()
    assert (found["group"], found["tags"], found["version"]) == ("second", {"hall": "3"}, 2)
    server.wait("the device's bell", lambda: [v for topic, v in device.bells if topic.endswith(f"d/{device.id}/bell")])
    assert server.ask("PUT", f"/api/v1/devices/{device.id}/membership", {"group": "nowhere"}).status == 404


def test_a_revoked_device_is_cut_off_everywhere_and_for_good(device: DeviceRig) -> None:
    server = device.server
    device.connect()
    assert device.client is not None
    gone = []
    device.client.on_disconnect = lambda *_: gone.append(True)
    reason = {"reason": "stolen"}
    assert server.good("POST", f"/api/v1/devices/{device.id}/revoke", reason)["status"] == "revoked"
    assert device.ask("GET", "/device/v1/self").code == "unknown_device"
    assert device.ask("POST", "/device/v1/renew", {"csr": csr(p256(), device.id)}).code == "unknown_device"
    server.wait("the broker to cut it off", lambda: gone)
    device.client.loop_stop()
    device.client = None
    with pytest.raises((AssertionError, OSError)):
        device.connect(timeout_s=3)
    assert server.ask("POST", f"/api/v1/devices/{device.id}/revoke", reason).code == "revoked"
    wish = {"device_id": device.id, "group": "press"}
    assert server.ask("POST", "/api/v1/enrolment-tokens", wish).code == "revoked"
    rows = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    assert [r["reason"] for r in rows if r["action"] == "device.revoke" and r["subject"] == f"device:{device.id}"] == [
        "stolen"
    ]


def test_keys_on_disk_are_readable_by_their_owner_alone(server: ServerRig) -> None:
    for name in ("ca/ca.key", "ca/server.key", "ca/client.key", "keys/online.pem", "admin.token"):
        assert (server.data / name).stat().st_mode & 0o777 == 0o600, name
    assert server.data.stat().st_mode & 0o077 == 0
    text = b"".join(path.read_bytes() for path in server.data.glob("*.log"))
    assert server.token.encode() not in text
    assert private_pem(p256())[:20] not in text
