"""``model.sig`` of a bundle that the tool built and signed, checked by the public ``model_signing`` command without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines import Machine, Token

SPEC = {
    "model": "gas",
    "version": "1.0.0",
    "owner": {"name": "A", "contact": "a@example.org"},
    "licence": "Apache-2.0",
    "variants": [
        {
            "id": "onnx-int8",
            "runtime": "onnx",
            "model": "model.onnx",
            "files": ["model.onnx", "golden.jsonl"],
            "golden": {"cases": "golden.jsonl"},
            "needs": {"rss_mb": 10, "disk_mb": 1},
        }
    ],
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    "reference": {"n": 0},
}


def alone() -> list[str]:
    """What cuts a command off every network, where this user may."""
    program = shutil.which("unshare")
    if program is None:
        return []
    ways = ([program, "--net"], [program, "--net", "--map-root-user"])
    return next((way for way in ways if subprocess.run([*way, "true"], capture_output=True).returncode == 0), [])


def public_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("model_signing")
    assert program.exists(), "model-signing is in tests/requirements.txt"
    command = [*alone(), str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "NO_PROXY": "*"})


@pytest.fixture
def ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(tmp_path / "ci", monkeypatch, capsys)


@pytest.fixture
def bundle(ci: Machine, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.onnx").write_bytes(b"a model" * 1000)
    (source / "golden.jsonl").write_bytes(b'{"inputs": [], "outputs": []}\n')
    (source / "spec.json").write_text(json.dumps(SPEC))
    ci.ok("bundle", "build", source / "spec.json", "--out", tmp_path / "bundle")
    return tmp_path / "bundle"


def public_key(machine: Machine, name: str) -> Path:
    path = machine.folder / f"{name}.pem"
    path.write_text(machine.ok("keys", "pem", name).out)
    return path


def check(bundle: Path, key: Path) -> subprocess.CompletedProcess[str]:
    return public_command("verify", "key", bundle, "--signature", bundle / "model.sig", "--public_key", key)


def require_it_holds(machine: Machine, bundle: Path, key: Path) -> None:
    good = check(bundle, key)
    assert good.returncode == 0 and "Verification succeeded" in good.stdout, good
    machine.ok("bundle", "verify", bundle, "--key", key)


def require_a_changed_byte_shows(machine: Machine, bundle: Path, key: Path) -> None:
    path = bundle / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert check(bundle, key).returncode != 0
    assert machine("bundle", "verify", bundle, "--key", key).code != 0
    path.write_bytes(whole)


def test_signature_by_an_encrypted_file_holds_offline_and_changes_show(ci: Machine, bundle: Path) -> None:
    ci.ok("keys", "make", "ci", "--key-type", "ecdsa")
    ci.ok("bundle", "sign", bundle, "--as", "ci")
    key = public_key(ci, "ci")
    require_it_holds(ci, bundle, key)
    require_a_changed_byte_shows(ci, bundle, key)
    ci.ok("bundle", "verify", bundle, "--key", ci.keys / "ci.pub.json")
    ci.ok("keys", "make", "other", "--key-type", "ecdsa")
    assert check(bundle, public_key(ci, "other")).returncode != 0
    (bundle / "extra.bin").write_bytes(b"x")
    assert check(bundle, key).returncode != 0, "a file that was not signed passes"


def test_signature_by_a_token_holds_offline_and_a_changed_byte_shows(ci: Machine, bundle: Path, tmp_path: Path) -> None:
    ci.environment |= Token(tmp_path / "token").environment
    assert ci.apart("keys", "make", "ci", "--token", "hsm:1?label=fleet").code == 0
    signed = ci.apart("bundle", "sign", bundle, "--as", "ci")
    assert signed.code == 0, signed
    key = public_key(ci, "ci")
    require_it_holds(ci, bundle, key)
    require_a_changed_byte_shows(ci, bundle, key)


def test_key_that_model_signing_does_not_know_is_refused(ci: Machine, bundle: Path) -> None:
    ci.ok("keys", "make", "ada")
    done = ci("bundle", "sign", bundle, "--as", "ada")
    assert done.code == 2 and "P-256" in done.err
    assert not (bundle / "model.sig").exists()
    assert ci("bundle", "sign", bundle).code == 2
