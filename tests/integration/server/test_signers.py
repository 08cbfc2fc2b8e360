"""The server's online key on a token, and bundles that must be signed before this server takes them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.signer import CryptoSigner
from skerry_runtime import signature
from skerry_server import online_keys, signers
from skerry_server.errors import BadSettings
from skerry_server.provenance import ModelSigners
from tuf.api.metadata import Metadata

from tests import models
from tests.integration.server.test_registry import manifest_of, upload
from tests.machines import Token
from tests.rig_server import Operator, ServerRig


def init(data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skerry_server", "init", "--data", str(data), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_online_key_of_a_new_server_lies_on_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = Token(tmp_path / "token")
    for name, value in token.environment.items():
        monkeypatch.setenv(name, value)
    makes_key = ["keys", "make", "online", "--token", "hsm:7?label=fleet", "--dir", str(tmp_path / "k"), "--json"]
    made = json.loads(subprocess.check_output([sys.executable, "-m", "skerry_cli", *makes_key]))
    data = tmp_path / "server"
    assert init(data, "--online-key", "hsm:7?label=fleet").returncode == 0
    assert not (data / "keys" / "online.pem").exists()
    rig = ServerRig(data).start()
    try:
        Operator(rig, tmp_path / "operator").install_trust()
        timestamp = Metadata.from_bytes(rig.ask("GET", "/repository/metadata/timestamp.json").data)
        assert list(timestamp.signatures) == [made["keyid"]]
        root = Metadata.from_bytes(rig.ask("GET", "/repository/metadata/1.root.json").data).signed
        root.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
    finally:
        rig.close()
    for path in (data / "keys").iterdir():
        assert b"PRIVATE" not in path.read_bytes() and token.pin.encode() not in path.read_bytes()
    monkeypatch.setenv("SKERRY_PIN", "000000")
    wrong = init(data)
    assert wrong.returncode == 1 and "PinIncorrect" in wrong.stderr


def test_a_second_online_key_may_lie_in_an_encrypted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "keys"
    first = online_keys.open_all(folder)[0].public_key.keyid
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "safe.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"tide"),
        )
    )
    with pytest.raises(ValueError, match="SKERRY_KEY_PASSWORD_FILE"):
        online_keys.add(folder, "file2:safe.pem")
    monkeypatch.setenv("SKERRY_KEY_PASSWORD", "tide")
    added = online_keys.add(folder, "file2:safe.pem").public_key.keyid
    assert [signer.public_key.keyid for signer in online_keys.open_all(folder)] == [first, added]
    assert online_keys.public(folder)["newest"] == added
    third = online_keys.add(folder).public_key.keyid
    assert [signer.public_key.keyid for signer in online_keys.open_all(folder)] == [first, added, third]
    with pytest.raises(ValueError, match="first online key already"):
        online_keys.begin_with(folder, "file2:safe.pem")
    # The file was swapped for another key since: told at the start, before anything is signed.
    (folder / "safe.pem").write_bytes(CryptoSigner.generate_ecdsa().private_bytes)
    with pytest.raises(ValueError, match=r"file2:safe\.pem"):
        online_keys.open_all(folder)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("online.pem", "begins with file2:"),
        ("envvar:NOTHING_HERE", "wanted a private key"),
        ("hsm:2?pin=1", "hsm:NUMBER"),
        ("hsm:2", "in PYKCS11LIB, got nothing"),
        ("awskms:arn", r"securesystemslib\[awskms\]"),
    ],
)
def test_a_uri_that_cannot_be_says_what_is_wanted(tmp_path: Path, uri: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        signers.import_key(uri, tmp_path, {})


def test_a_secret_that_nobody_gave_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SKERRY_PIN_FILE"):
        signers.secret("SKERRY_PIN", {})
    (tmp_path / "pin").write_text("271828\n")
    assert signers.secret("SKERRY_PIN", {"SKERRY_PIN_FILE": str(tmp_path / "pin")}) == "271828"


def p256(folder: Path, name: str) -> bytes:
    """A key pair: the private part in PEM, the public part in ``<folder>/<name>.pem``."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(public)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_a_server_that_asks_for_signed_or_encrypted_bundles_takes_no_other(tmp_path: Path) -> None:
    ci, stranger = p256(tmp_path, "ci"), p256(tmp_path, "stranger")
    (tmp_path / "second.pem").write_bytes((tmp_path / "ci.pem").read_bytes())
    rig = ServerRig(
        tmp_path / "server",
        {"POLICY_MODEL_SIGNERS": f"{tmp_path / 'second.pem'},{tmp_path / 'ci.pem'}", "POLICY_ENCRYPTED_MODELS": "oil"},
    )
    rig.start()
    try:
        folder = tmp_path / "b"
        digest = models.build_bundle(folder, "gas", "1.0.0")
        other = tmp_path / "other"
        models.build_bundle(other, "gas", "1.0.1", seed=3)

        def pushed(sig: bytes | None) -> dict:
            headers = {"X-Skerry-Signature": base64.b64encode(sig).decode()} if sig else {}
            assert rig.ask("POST", "/api/v1/bundles", data=manifest_of(folder), headers=headers).status == 200
            upload(rig, folder)
            return rig.good("POST", f"/api/v1/bundles/{digest}/validate?again=true")

        models.build_bundle(tmp_path / "oil", "oil", "1.0.0")
        clear = rig.ask("POST", "/api/v1/bundles?clear=true", data=manifest_of(tmp_path / "oil"))
        assert (clear.status, clear.code) == (422, "must_be_encrypted")

        bare = pushed(None)
        assert bare["state"] == "rejected" and bare["reason"].startswith("unsigned: ")
        assert rig.ask("GET", f"/api/v1/bundles/{digest}/signature").status == 404
        foreign = pushed(signature.sign_bundle(folder, stranger))
        assert foreign["state"] == "rejected" and foreign["reason"].startswith("untrusted_signature: ")
        moved = pushed(signature.sign_bundle(other, ci))
        assert moved["state"] == "rejected" and "untrusted_signature" in moved["reason"]
        good = signature.sign_bundle(folder, ci)
        assert pushed(good)["state"] == "validated"
        assert rig.good("GET", f"/api/v1/bundles/{digest}")["validation"]["signed_by"] == "second"
        assert rig.ask("GET", f"/api/v1/bundles/{digest}/signature").data == good
        # Once it is validated, nobody replaces the signature that it was validated with.
        pushed(signature.sign_bundle(folder, stranger))
        assert rig.ask("GET", f"/api/v1/bundles/{digest}/signature").data == good
    finally:
        rig.close()


def test_every_signers_file_that_holds_no_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "rsa.pem").write_text("no key")
    with pytest.raises(BadSettings) as found:
        ModelSigners.read(["rsa.pem", "nowhere.pem"], tmp_path)
    said = "\n".join(found.value.faults)
    assert "policy.model_signers: nowhere.pem" in said and "rsa.pem: wanted a public key" in said
