"""The public ``model_signing`` tool accepts what we sign, and we accept what it signs."""

import hashlib
import json
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from skerry_contract import canonical
from skerry_runtime import signature

# It imports OpenSSL without declaring it (1.1.1); where that is absent there is no tool to ask.
pytest.importorskip("OpenSSL", reason="pyOpenSSL is not installed")
pytest.importorskip("model_signing", reason="model-signing is not installed")


def tool(*arguments):
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def signed(models, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    folder = tmp_path / "bundle"
    models.build_bundle(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in ("a/x.bin", "a-b/x.bin", "A.bin", "a.bin"):  # text order and path order differ
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        manifest["variants"][0]["files"].append({"path": name, "sha256": sha256, "size": len(name)})
    (folder / "manifest.json").write_bytes(canonical.encode(manifest))
    (folder / "model.sig").write_bytes(signature.sign_bundle(folder, private))
    return tmp_path


def verify(home, sig):
    return tool("verify", "key", home / "bundle", "--signature", sig, "--public_key", home / "key.pub")


def test_the_public_tool_accepts_our_signature(signed):
    found = verify(signed, signed / "bundle/model.sig")
    assert found.returncode == 0, found
    assert "Verification succeeded" in found.stdout


def test_the_public_tool_sees_a_changed_file_under_our_signature(signed):
    (signed / "bundle/a/x.bin").write_text("a/x.bix")
    assert verify(signed, signed / "bundle/model.sig").returncode != 0


def test_we_accept_the_public_tools_signature(signed):
    (signed / "bundle/model.sig").unlink()
    theirs = signed / "theirs.sig"
    made = tool("sign", "key", signed / "bundle", "--private_key", signed / "key.pem", "--signature", theirs)
    assert made.returncode == 0, made
    signature.verify_signature(signed / "bundle", theirs.read_bytes(), (signed / "key.pub").read_bytes())
