"""Model signatures: what is signed is what lies there, by this key, whole."""

import base64
import hashlib
import json

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from skerry_runtime import signature
from skerry_runtime.errors import Rejected


def private_pem(key, password=None):
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def public_pem(key):
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def key():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def folder(models, tmp_path):
    models.build_bundle(tmp_path / "b")
    return tmp_path / "b"


def resign(sig_bytes, key, change):
    """The signature of somebody who has the key and signs another statement."""
    outer = json.loads(sig_bytes)
    statement = json.loads(base64.b64decode(outer["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    kind = outer["dsseEnvelope"]["payloadType"].encode()
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    made = key.sign(pae, ec.ECDSA(hashes.SHA256()))
    outer["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    outer["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(made).decode()
    return json.dumps(outer).encode()


def refusal(folder, sig_bytes, pem):
    with pytest.raises(Rejected) as caught:
        signature.verify_signature(folder, sig_bytes, pem)
    return caught.value


def test_an_encrypted_bundle_is_signed_for_what_is_in_its_files(models, tmp_path, key):
    models.build_bundle(tmp_path / "b", content_key=bytes(32))
    made = signature.sign_bundle(tmp_path / "b", private_pem(key))
    signature.verify_signature(tmp_path / "b", made, public_pem(key))
    manifest = (tmp_path / "b" / "manifest.json").read_bytes()
    signature.covers_manifest(made, public_pem(key), manifest)
    covered = signature.verify_statement(made, public_pem(key))
    assert covered["model.onnx"] == hashlib.sha256((tmp_path / "b" / "model.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize("password", [None, b"secret"])
def test_what_is_signed_verifies_and_may_lie_in_the_folder(folder, key, password):
    made = signature.sign_bundle(folder, private_pem(key, password), password)
    (folder / "model.sig").write_bytes(made)
    signature.verify_signature(folder, made, public_pem(key))
    covered = signature.verify_statement(made, public_pem(key))
    assert set(covered) == {"golden.jsonl", "manifest.json", "model.onnx"}


def test_an_unknown_key_is_refused_and_named(folder, key):
    made = signature.sign_bundle(folder, private_pem(key))
    fault = refusal(folder, made, public_pem(ec.generate_private_key(ec.SECP256R1())))
    assert fault.code == "bad_signature"
    assert "another key" in fault.detail


def test_another_bundle_under_a_good_signature_is_refused(models, folder, key, tmp_path):
    made = signature.sign_bundle(folder, private_pem(key))
    models.build_bundle(tmp_path / "other", version="1.0.1")
    fault = refusal(tmp_path / "other", made, public_pem(key))
    assert (fault.code, fault.detail.split(":")[0]) == ("bad_signature", "manifest.json")


def test_every_flipped_bit_of_what_is_signed_breaks_it(folder, key):
    made = signature.sign_bundle(folder, private_pem(key))
    outer = json.loads(made)
    payload = bytearray(base64.b64decode(outer["dsseEnvelope"]["payload"]))
    for at in range(0, len(payload), 97):
        changed = bytearray(payload)
        changed[at] ^= 1
        outer["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()
        assert refusal(folder, json.dumps(outer).encode(), public_pem(key)).code == "bad_signature"


def drop(statement):
    statement["predicate"]["resources"].pop()


def double(statement):
    statement["predicate"]["resources"].append(statement["predicate"]["resources"][0])


def weaker_hash(statement):
    statement["predicate"]["resources"][0]["algorithm"] = "md5"


def links(statement):
    statement["predicate"]["serialization"]["allow_symlinks"] = True


def other_subject(statement):
    statement["subject"][0]["digest"]["sha256"] = "0" * 64


def other_predicate(statement):
    statement["predicateType"] = "https://slsa.dev/provenance/v1"


def no_hex(statement):
    statement["predicate"]["resources"][0]["digest"] = "zz"


@pytest.mark.parametrize("change", [drop, double, weaker_hash, links, other_subject, other_predicate, no_hex])
def test_a_statement_that_does_not_hold_together_is_refused_though_signed(folder, key, change):
    made = resign(signature.sign_bundle(folder, private_pem(key)), key, change)
    assert refusal(folder, made, public_pem(key)).code == "bad_signature"


@pytest.mark.parametrize("sig_bytes", [b"", b"{}", b"[]", b"\xff" * 50, b"[" * 100_000, b'{"mediaType":1}'])
def test_bytes_that_are_no_signature_are_refused(folder, key, sig_bytes):
    assert refusal(folder, sig_bytes, public_pem(key)).code == "bad_signature"


def test_a_second_signature_is_not_overlooked(folder, key):
    outer = json.loads(signature.sign_bundle(folder, private_pem(key)))
    outer["dsseEnvelope"]["signatures"] *= 2
    assert refusal(folder, json.dumps(outer).encode(), public_pem(key)).code == "bad_signature"


def test_a_broken_bundle_is_not_signed(folder, key):
    (folder / "extra").write_text("x")
    with pytest.raises(Rejected, match="file_unlisted"):
        signature.sign_bundle(folder, private_pem(key))


def test_other_kinds_of_keys_are_refused_with_what_is_wanted(folder, key):
    for other in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        with pytest.raises(ValueError, match="wanted an ECDSA key on P-256"):
            signature.sign_bundle(folder, private_pem(other))
        with pytest.raises(ValueError, match="wanted an ECDSA key on P-256"):
            signature.verify_statement(b"{}", public_pem(other))
    with pytest.raises(ValueError, match="signing key"):
        signature.sign_bundle(folder, private_pem(key, b"secret"), b"wrong")
    with pytest.raises(ValueError, match="signing key"):
        signature.sign_bundle(folder, private_pem(key, b"secret"))
