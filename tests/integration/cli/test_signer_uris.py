"""Keys wherever they lie: files, the environment, PKCS#11 tokens; what is wrong with one is said in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_cli import key_files, signers
from skerry_cli.errors import RefusedForSafety, Usage

from tests.machines import Machine, Token

FAILED, USAGE, REFUSED = 1, 2, 3


@pytest.fixture
def ada(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(tmp_path / "ada", monkeypatch, capsys)


def no_secret(kind: str, whose: str) -> str:
    raise AssertionError(f"nobody may be asked for the {kind} of {whose}")


def opened(uri, key, folder, *, secret=no_secret, **environment):
    return signers.open_signer(uri, key, whose="ada", folder=folder, secret=secret, environment=environment)


@pytest.fixture
def pem(tmp_path: Path) -> tuple[CryptoSigner, Path]:
    signer = CryptoSigner.generate_ed25519()
    path = tmp_path / "odd name%20.pem"
    key_files.write_new(path, key_files.private_pem(signer, b"tide"), mode=0o600)
    return signer, path


def test_encrypted_file_asks_for_its_password_and_a_plain_one_does_not(pem, tmp_path) -> None:
    signer, path = pem
    asked = []

    def secret(kind, whose):
        asked.append((kind, whose))
        return "tide"

    made = opened("file2:odd%20name%2520.pem", signer.public_key, tmp_path, secret=secret).sign(b"x")
    signer.public_key.verify_signature(made, b"x")
    assert asked == [("password", "ada")]
    (tmp_path / "plain.pem").write_bytes(signer.private_bytes)
    with pytest.raises(Usage, match="others may read"):
        opened("file2:plain.pem", signer.public_key, tmp_path)
    (tmp_path / "plain.pem").chmod(0o600)
    opened("file2:plain.pem", signer.public_key, tmp_path).sign(b"x")
    with pytest.raises(Usage, match="password is wrong"):
        opened(f"file2:{path.name.replace('%', '%25')}", signer.public_key, tmp_path, secret=lambda *_: "ebb")


def test_key_in_the_environment_signs(pem, tmp_path) -> None:
    signer, path = pem
    text = path.read_text()
    opened("envvar:SIGNING", signer.public_key, tmp_path, secret=lambda *_: "tide", SIGNING=text).sign(b"x")
    with pytest.raises(Usage, match="has no SIGNING"):
        opened("envvar:SIGNING", signer.public_key, tmp_path)
    with pytest.raises(Usage, match="no private key in PEM"):
        opened("envvar:SIGNING", signer.public_key, tmp_path, SIGNING="hunter2")


def test_another_key_behind_the_uri_is_refused(pem, tmp_path) -> None:
    other = CryptoSigner.generate_ed25519().public_key
    with pytest.raises(RefusedForSafety, match="which the record names"):
        opened("file2:odd%20name%2520.pem", other, tmp_path, secret=lambda *_: "tide")


def test_what_another_key_signed_is_never_handed_on(pem) -> None:
    signer, _ = pem
    other = CryptoSigner.generate_ed25519().public_key
    wrong = signers.CheckedSigner(signer, other, "hsm:2", fault=signers.failed)
    with pytest.raises(RefusedForSafety, match="what signed is not key"):
        wrong.sign(b"x")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gnupg:ABC", "begins with file2:, envvar:, hsm:"),
        ("/home/ada/key.pem", "begins with file2:"),
        ("pkcs11:token=x", "begins with"),
        ("hsm:two", "hsm:NUMBER"),
        ("hsm:2?pin=1234", "hsm:NUMBER"),
        ("hsm:2?label=x", "has no PYKCS11LIB"),
        ("awskms:arn:aws:kms:x", "securesystemslib[awskms]"),
        ("gcpkms:projects/x", "securesystemslib[gcpkms]"),
        ("azurekms:https://x/keys/y/1", "securesystemslib[azurekms]"),
        ("hv:fleet/1", "securesystemslib[vault]"),
    ],
)
def test_each_wrong_or_lacking_scheme_says_what_is_wanted(pem, tmp_path, uri, said) -> None:
    with pytest.raises(Usage) as found:
        opened(uri, pem[0].public_key, tmp_path)
    assert said in found.value.message, found.value.message


@pytest.mark.filterwarnings("ignore::getpass.GetPassWarning")
def test_secrets_come_from_a_file_or_a_descriptor_and_never_from_the_command_line(ada: Machine, tmp_path) -> None:
    ada.environment.clear()
    nobody = ada("keys", "make", "ada")
    assert nobody.code == USAGE and "SKERRY_KEY_PASSWORD_FILE" in nobody.err
    assert not (ada.keys / "ada.pem").exists()
    secret = tmp_path / "secret"
    secret.write_text("spring tide\n")
    loose = ada("keys", "make", "ada", SKERRY_KEY_PASSWORD_FILE=str(secret))
    assert loose.code == USAGE and "others may read" in loose.err
    secret.chmod(0o600)
    ada.ok("keys", "make", "ada", SKERRY_KEY_PASSWORD_FILE=str(secret))
    assert key_files.load_signer(ada.keys / "ada.pem", b"spring tide")
    reading, writing = os.pipe()
    os.write(writing, b"neap tide")
    os.close(writing)
    ada.ok("keys", "make", "bea", SKERRY_KEY_PASSWORD_FILE=f"/dev/fd/{reading}")
    os.close(reading)
    assert key_files.load_signer(ada.keys / "bea.pem", b"neap tide")
    again = ada("keys", "make", "ada", "--no-password")
    assert again.code == USAGE and "nothing is written over" in again.err


def test_a_damaged_key_record_is_named(ada: Machine) -> None:
    ada.ok("keys", "make", "ada")
    path = ada.keys / "keys.json"
    value = json.loads(path.read_bytes())
    value["keys"][0]["keyid"] = "0" * 64
    for text, said in (
        ("{", "wanted a key record"),
        ('{"schema": 2}', "schema 2"),
        (json.dumps(value), "does not follow"),
    ):
        path.write_text(text)
        done = ada("keys", "show", "--json")
        assert done.code == USAGE and said in done.err, done


def test_a_token_makes_its_key_signs_with_it_and_never_gives_it_out(ada: Machine, tmp_path) -> None:
    token = Token(tmp_path / "token")
    ada.environment |= token.environment
    made = ada.apart("keys", "make", "ada", "--token", "hsm:3?label=fleet", "--json")
    assert made.code == 0, made
    assert made.json()["uri"] == "hsm:3?label=fleet" and made.json()["key"]["scheme"] == "ecdsa-sha2-nistp256"
    again = ada.apart("keys", "make", "bea", "--token", "hsm:3?label=fleet")
    assert again.code == USAGE and "holds a key 3 already" in again.err
    bea = tmp_path / "bea"
    used = ada.apart("keys", "use", "ada", "--uri", "hsm:3?label=fleet", "--dir", bea, "--json")
    assert used.json()["keyid"] == made.json()["keyid"]
    unknown = ada.apart("keys", "use", "x", "--uri", "hsm:9?label=fleet")
    assert unknown.code == USAGE and "could not find" in unknown.err
    wrong = ada.apart("keys", "make", "x", "--token", "hsm:4?label=fleet", SKERRY_PIN="000000")
    assert wrong.code == USAGE and "the PIN is wrong" in wrong.err
    absent = ada.apart("keys", "make", "x", "--token", "hsm:4?label=nobody")
    assert absent.code == FAILED and "no such token is plugged in" in absent.err, absent
    # The token itself says so: the private part is sensitive and was never extractable.
    code = (
        "import os, pkcs11\n"
        "token = pkcs11.lib(os.environ['PYKCS11LIB']).get_token(token_label='fleet')\n"
        "with token.open(user_pin=os.environ['SKERRY_PIN']) as s:\n"
        "    key = s.get_key(pkcs11.ObjectClass.PRIVATE_KEY, id=bytes([3]))\n"
        "    print(key[pkcs11.Attribute.SENSITIVE], key[pkcs11.Attribute.NEVER_EXTRACTABLE])\n"
        "    try:\n"
        "        print(bool(key[pkcs11.Attribute.VALUE]))\n"
        "    except pkcs11.exceptions.AttributeSensitive:\n"
        "        print('kept')\n"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **token.environment}, capture_output=True, text=True
    )
    assert asked.stdout.split() == ["True", "True", "kept"], asked


def test_one_holder_on_a_token_and_one_in_a_file_make_a_root_together(ada: Machine, tmp_path) -> None:
    token = Token(tmp_path / "token")
    ada.environment |= token.environment
    online = CryptoSigner.generate_ed25519().public_key
    (tmp_path / "online.pub.json").write_text(json.dumps({"keys": {online.keyid: online.to_dict()}}))
    answers = tmp_path / "answers.toml"
    answers.write_text(
        """organiser = "Ada"
online = "online.pub.json"
[holders]
root = ["root-1", "root-2"]
targets = ["targets"]
approver = ["ada", "robot"]
[thresholds]
root = 2
targets = 1
approver = 2
[keys.root-1]
token = "hsm:1?label=fleet"
[keys.root-2]
make = true
[keys.targets]
make = true
key_type = "ecdsa"
[keys.ada]
token = "hsm:2?label=fleet"
[keys.robot]
uri = "envvar:ROBOT_KEY"
"""
    )
    robot = CryptoSigner.generate_ecdsa().private_bytes.decode()
    done = ada.apart("keys", "ceremony", "--dir", ada.keys, "--answers", answers, "--json", ROBOT_KEY=robot)
    assert done.code == 0 and done.json()["finished"], done
    kept = {one["name"]: one["kept"] for one in json.loads((ada.keys / "ceremony.json").read_bytes())["keys"]}
    assert kept["root-1"] == kept["ada"] == "a PKCS#11 token" and kept["robot"] == "an environment variable"
    assert ada.ok("keys", "verify-record", "--json").json()["holds"]
    secrets = (token.pin.encode(), b"PRIVATE KEY", robot.splitlines()[1].encode())
    for path in ada.keys.rglob("*"):
        if path.is_file() and path.suffix != ".pem":
            assert not [secret for secret in secrets if secret in path.read_bytes()], path


def test_a_token_that_was_swapped_is_told_and_its_signature_is_not_used(ada: Machine, tmp_path) -> None:
    first, second = Token(tmp_path / "one"), Token(tmp_path / "two")
    online = CryptoSigner.generate_ed25519().public_key
    (tmp_path / "online.pub.json").write_text(json.dumps({"keys": {online.keyid: online.to_dict()}}))
    ada.ok("keys", "init", "--dir", tmp_path / "init", "--online", tmp_path / "online.pub.json")
    ada.environment |= first.environment
    assert ada.apart("keys", "make", "ada", "--token", "hsm:1?label=fleet").code == 0
    other = ada.apart(
        "keys", "make", "x", "--token", "hsm:1?label=fleet", "--dir", tmp_path / "x", **second.environment
    )
    assert other.code == 0
    ada.ok("keys", "join", tmp_path / "init", "--root-sha256", sha256_of_root(tmp_path / "init"))
    request = tmp_path / "next.json"
    ada.ok("keys", "rotate", "--add-root", ada.keys / "ada.pub.json", "--out", request)
    wanted = ada.ok("keys", "review", request, "--json").json()["sha256"]
    before = request.read_bytes()
    swapped = ada.apart("keys", "sign", request, "--as", "ada", "--yes", "--sha256", wanted, **second.environment)
    assert swapped.code == REFUSED and "what signed is not key" in swapped.err
    assert request.read_bytes() == before
    right = ada.apart("keys", "sign", request, "--as", "ada", "--yes", "--sha256", wanted, "--json")
    assert right.code == 0 and right.json()["documents"][0]["signed_by"] == ["ada"]


def sha256_of_root(folder: Path) -> str:
    return str(json.loads((folder / "ceremony.json").read_bytes())["root_sha256"])
