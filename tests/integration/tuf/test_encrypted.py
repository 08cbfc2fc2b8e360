"""The courier's part of encrypted bundles: the wrapped key that is kept, the token that opens it, a slot that somebody changed."""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID
from skerry_agent.courier import content_keys, download, encryption_key, keys, requests, sealed_delta, unsealing
from skerry_agent.errors import AgentError, Transient
from skerry_contract import ids, layout, sealed
from skerry_contract import manifest as m
from skerry_server.core import eligibility

from tests import models, strangers
from tests.machines import Token

KEY = secrets.token_bytes(32)
NOWHERE = "https://127.0.0.1:9"
"""No server: whatever opens here opens without one."""


def ec_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def an_authority() -> str:
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a fleet")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + dt.timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


class Card:
    """What lies on a device's card, with one encrypted bundle in a slot, whose wrapped key the server gave."""

    def __init__(self, folder: Path, point: bytes = b"") -> None:
        self.state = folder / "state"
        self.memory = folder / "memory"
        self.memory.mkdir(parents=True, mode=0o700)
        identity = self.state / "identity"
        keys.make_key(identity)
        (identity / "enrolled.json").write_text(json.dumps({"device_id": "cam-1", "group": "g"}))
        (identity / "fleet-ca.pem").write_text(an_authority())
        self.point = point or encryption_key.holder(identity, "file").point()
        self.plain = folder / "bundle"
        self.digest = models.build_bundle(self.plain, content_key=KEY, padding=200_000)
        self.manifest = m.parse((self.plain / m.MANIFEST_FILE).read_bytes())
        self.slot = self.state / "slots" / self.digest
        self.slot.mkdir(parents=True)
        for file in self.manifest.files():
            (self.slot / file.path).write_bytes(models.seal((self.plain / file.path).read_bytes(), KEY))
        shutil.copy(self.plain / m.MANIFEST_FILE, self.slot)
        self.give(KEY)

    @property
    def wrapped(self) -> Path:
        return self.state / "slots" / content_keys.KEYS / f"{self.digest}.json"

    def give(self, content_key: bytes, device: str = "cam-1", digest: str | None = None) -> None:
        """As a server does, from the public part alone."""
        point = self.point
        once = ec.generate_private_key(ec.SECP256R1())
        sender = ec_point(once)
        secret = once.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point))
        key, about = sealed.wrapping_key(
            secret, sender=sender, receiver=point, device=device, digest=digest or self.digest
        )
        wrapped = sealed.Wrapped(point=sender, box=sealed.wrap(content_key, key, about, AESGCM))
        self.wrapped.parent.mkdir(exist_ok=True)
        self.wrapped.write_text(json.dumps(sealed.encode_wrapped(wrapped)))

    def message(self, **changes: Any) -> dict[str, Any]:
        return {
            "state_dir": str(self.state), "server_url": NOWHERE, "now_s": 1e9, "encryption_key": "file",
            "digest": self.digest, "variant": "onnx-fp32", "folder": str(self.memory), **changes,
        }  # fmt: skip

    def open(self, **changes: Any) -> dict[str, Any]:
        return unsealing.unseal(requests.Unseal(**self.message(**changes)))

    def code(self, **changes: Any) -> str:
        with pytest.raises(AgentError) as failed:
            self.open(**changes)
        opened = self.memory / self.digest
        assert not (opened / m.MANIFEST_FILE).exists(), "what failed does not count as open"
        return failed.value.code

    def shows_no_model(self) -> bool:
        data = (self.plain / "model.onnx").read_bytes()[:64]
        return not any(data in path.read_bytes() for path in self.memory.rglob("*") if path.is_file())


@pytest.fixture
def card(tmp_path: Path) -> Card:
    return Card(tmp_path)


def test_a_kept_key_opens_the_slot_without_any_server_and_twice_is_once(card: Card) -> None:
    size = sum(file.content.size for file in card.manifest.files())
    assert card.open() == {"bytes": size}
    for file in card.manifest.files():
        assert (card.memory / card.digest / file.path).read_bytes() == (card.plain / file.path).read_bytes()
        assert (card.memory / card.digest / file.path).stat().st_mode & 0o077 == 0
    assert card.open() == {"bytes": 0}
    assert [path.name for path in card.memory.iterdir()] == [card.digest], "nothing is left beside it"


def carried(card: Card, folder: Path) -> str:
    """What is wrong with the key in a folder that was carried here; empty when it was taken."""
    asked = requests.Common(
        state_dir=str(card.state), server_url=NOWHERE, now_s=1e9, encryption_key="file", folder=str(folder)
    )
    return content_keys.bring(asked, card.manifest, card.digest)


def test_a_key_that_was_carried_here_opens_without_any_server(card: Card, tmp_path: Path) -> None:
    place = tmp_path / "stick" / layout.carried_key(card.digest, ids.device_id("cam-1"))
    place.parent.mkdir(parents=True)
    card.wrapped.rename(place)
    assert card.code() == "unreachable"
    said = carried(card, tmp_path / "elsewhere")
    assert "skerry export-update --device cam-1" in said
    asked = requests.Fetch(
        state_dir=str(card.state), server_url=NOWHERE, now_s=1e9, encryption_key="file", digest=card.digest,
        manifest=(card.plain / m.MANIFEST_FILE).read_text(), files=(), folder=str(tmp_path / "elsewhere"),
    )  # fmt: skip
    with pytest.raises(AgentError) as failed:
        download.fetch(asked, lambda _: None)
    assert (failed.value.code, failed.value.detail.endswith(said)) == ("unreachable", True), failed.value.detail
    assert card.code() == "unreachable"
    assert carried(card, tmp_path / "stick") == ""
    assert card.open()["bytes"] > 200_000
    place.unlink()
    assert carried(card, tmp_path / "stick") == "", "what is kept is not asked for again"


@pytest.mark.attack("foreign content key")
@pytest.mark.parametrize("harm", ["another device's", "another bundle's", "another key", "cut", "long", "deep", "link"])
def test_a_carried_key_that_is_not_this_devices_for_this_bundle_is_not_kept(
    card: Card, tmp_path: Path, harm: str
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "another device's": {"device": "cam-2"},
        "another bundle's": {"digest": "a" * 64},
        "another key": {"content_key": secrets.token_bytes(32)},
    }
    card.give(**{"content_key": KEY, **changes.get(harm, {})})
    place = tmp_path / "stick" / layout.carried_key(card.digest, ids.device_id("cam-1"))
    place.parent.mkdir(parents=True)
    card.wrapped.rename(place)
    data = place.read_bytes()
    if harm == "link":
        place.rename(tmp_path / "aside")
        place.symlink_to(tmp_path / "aside")
    elif harm in ("cut", "long", "deep"):
        place.write_bytes({"cut": data[:-20], "long": data + b" " * 4000, "deep": b"[" * 2000}[harm])
    assert "cannot be used" in carried(card, tmp_path / "stick")
    assert not card.wrapped.exists()
    assert card.code() == "unreachable"


@pytest.mark.parametrize("name", ["model.onnx", "golden.jsonl", "padding.bin"])
@pytest.mark.parametrize("harm", ["flip", "cut", "swap", "gone"])
def test_a_slot_that_was_changed_on_the_card_opens_nothing(card: Card, name: str, harm: str) -> None:
    path = card.slot / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    elif harm == "cut":
        del data[-20:]
    elif harm == "swap":
        data[:] = models.seal(b"another model", KEY)
    path.write_bytes(data)
    if harm == "gone":
        path.unlink()
    assert card.code() == ("size_mismatch" if harm == "gone" else "cannot_decrypt")


def test_a_manifest_that_was_changed_on_the_card_opens_nothing(card: Card) -> None:
    data = (card.slot / m.MANIFEST_FILE).read_bytes()
    (card.slot / m.MANIFEST_FILE).write_bytes(data.replace(b"Test Owner", b"Toast Owner"))
    assert card.code() == "hash_mismatch"


@pytest.mark.parametrize("harm", ["another device's", "another bundle's", "another content key", "rubbish", "gone"])
@pytest.mark.attack("foreign content key")
def test_a_wrapped_key_that_is_not_this_ones_is_asked_for_anew_and_opens_nothing(card: Card, harm: str) -> None:
    match harm:
        case "another device's":
            card.give(KEY, device="cam-2")
        case "another bundle's":
            card.give(KEY, digest="ab" * 32)
        case "another content key":
            card.give(bytes(32))
        case "rubbish":
            card.wrapped.write_bytes(b"\xff{")
        case _:
            card.wrapped.unlink()
    assert card.code() == "unreachable"
    assert card.shows_no_model()


def refusal(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "no"}}


@pytest.fixture
def known(card: Card, fleet: Any) -> Any:
    """The card's device, known to a server that has the content key, which the card has not."""
    card.wrapped.unlink()
    identity = card.state / "identity"
    (identity / "fleet-ca.pem").write_text(fleet.authority.pem)
    key = keys.load_key(identity)
    fleet.site.devices[keys.key_id(key)] = ("cam-1", key.public_key())
    fleet.site.content_keys[card.digest] = KEY
    return fleet.site


@pytest.mark.parametrize("code", ["bad_nonce", "bad_device_token"])
def test_a_server_that_was_restarted_between_nonce_and_request_is_asked_once_more(
    card: Card, known: Any, code: str
) -> None:
    known.key_answers = [(401, refusal(code))]
    assert card.open(server_url=known.url)["bytes"] > 0
    assert sum(path.startswith("/device/v1/keys/") for path in known.asked) == 2


@pytest.mark.parametrize(
    "answers",
    [
        [(401, refusal("bad_nonce"))] * 2,
        [(401, refusal("unknown_device"))],
        [(403, refusal("key_not_allowed"))],
        [(404, refusal("not_found"))],
        [(422, refusal("a_code_of_later"))],
        [(200, {})],
        [(200, {"wrapped": {"scheme": "x"}})],
    ],
    ids=["nonce twice", "unknown", "not allowed", "not there", "another code", "no key", "rubbish"],
)
def test_whatever_the_server_says_for_a_content_key_is_no_word_about_the_bundle(
    card: Card, known: Any, answers: list[tuple[int, Any]]
) -> None:
    known.key_answers = list(answers)
    with pytest.raises(Transient) as failed:
        card.open(server_url=known.url)
    assert failed.value.code == "key_not_given"
    assert not eligibility.is_verdict_on_bundle(failed.value.code)
    assert card.shows_no_model()
    assert card.open(server_url=known.url)["bytes"] > 0, "the next try finds a server that gives it"


def test_the_key_of_another_bundle_from_the_server_is_not_kept(card: Card, known: Any) -> None:
    known.content_keys[card.digest] = bytes(32)
    assert card.code(server_url=known.url) == "key_not_given"
    assert not card.wrapped.exists()


def test_a_key_that_is_kept_is_had_without_a_server_and_no_other_is(card: Card) -> None:
    request = requests.Unseal(**card.message())
    assert content_keys.kept(request, card.digest, sealed.key_id(KEY)) == KEY
    assert content_keys.kept(request, card.digest, sealed.key_id(bytes(32))) == b""
    assert content_keys.kept(request, "ab" * 32, sealed.key_id(KEY)) == b""
    card.give(KEY, device="cam-2")
    assert content_keys.kept(request, card.digest, sealed.key_id(KEY)) == b""


@pytest.mark.parametrize("how", ["link", "open to others", "not there"])
def test_a_delta_is_opened_in_no_folder_that_is_not_ours(card: Card, how: str) -> None:
    memory = card.memory
    if how == "link":
        memory = card.memory.with_name("link")
        memory.symlink_to(card.memory)
    elif how == "open to others":
        memory.chmod(0o755)
    else:
        memory = card.memory.with_name("nowhere")
    manifest, file = (card.plain / m.MANIFEST_FILE).read_bytes(), card.manifest.files()[0]
    told = {name: value for name, value in card.message().items() if name not in ("variant", "folder")}
    request = requests.Fetch(**told, manifest=manifest.decode(), files=(), opened=str(memory))
    patch = card.state / "patch"
    stored = sealed.seal_delta(
        io.BytesIO(b"patch"), KEY, base_key=KEY, base="ab" * 32, target=file.sha256, salt=bytes(32), new_cipher=AESGCM
    )
    patch.write_bytes(b"".join(stored))
    with pytest.raises(AgentError) as failed:
        sealed_delta.Sealed(request, KEY).apply(
            patch, patch, card.state / "made", base_key=KEY, base="ab" * 32, target=file.sha256
        )
    assert failed.value.code == "no_memory_folder"
    assert list(card.memory.iterdir()) == []


def test_no_room_in_memory_is_said_before_anything_is_opened(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def small(path: Any) -> Any:
        found = real(path)
        return os.statvfs_result((found[0], found[1], *(0,) * 8)) if str(path) == str(card.memory) else found

    monkeypatch.setattr(os, "statvfs", small)
    assert card.code() == "not_enough_memory"
    assert card.shows_no_model()


@pytest.mark.attack("symlink")
@pytest.mark.parametrize("way", strangers.WAYS)
def test_nothing_is_opened_into_a_folder_of_others_or_behind_a_link(card: Card, tmp_path: Path, way: str) -> None:
    theirs = strangers.take(tmp_path / "taken", way)
    assert card.code(folder=str(tmp_path / "taken")) == "no_memory_folder"
    assert list(theirs.iterdir()) == []


def test_a_damaged_key_file_is_named_and_not_replaced(card: Card) -> None:
    path = card.state / "identity" / encryption_key.KEY_FILE
    path.write_bytes(b"-----BEGIN nonsense")
    assert card.code() == "encryption_key_unusable"
    assert path.read_bytes() == b"-----BEGIN nonsense"


@pytest.mark.parametrize("changes", [{"variant": "other"}, {"digest": "ab" * 32}])
def test_what_is_not_here_is_refused(card: Card, changes: dict[str, str]) -> None:
    assert card.code(**changes) in ("bad_request", "malformed_manifest")


# --- a token ---------------------------------------------------------------------------------------------------------

_MAKE_KEY = """
import sys, pkcs11
from pkcs11.util.ec import encode_named_curve_parameters
module, pin = sys.argv[1:]
with pkcs11.lib(module).get_token(token_label="fleet").open(rw=True, user_pin=pin) as session:
    curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
    parameters.generate_keypair(store=True, label="models", capabilities=pkcs11.MechanismFlag.DERIVE)
"""
_SHOW_POINT = """
import sys, pathlib
from skerry_agent.courier import encryption_key
holder = encryption_key.holder(pathlib.Path("/nowhere"), sys.argv[1])
again = encryption_key.holder(pathlib.Path("/nowhere"), sys.argv[1])
assert holder.point() == again.point()
print(holder.point().hex())
"""


@dataclass(frozen=True)
class Models:
    """SoftHSM with a key for this. What is loaded with it runs in processes of its own: the library knows one folder of tokens."""

    token: Token
    uri: str

    def run(self, *command: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, **self.token.environment}
        return subprocess.run(
            [sys.executable, *command], input=data, env=environment, capture_output=True, check=False, timeout=60
        )

    def courier(self, card: Card, uri: str) -> dict[str, Any]:
        message = card.message(encryption_key=uri)
        done = self.run("-P", "-m", "skerry_agent.courier", "unseal", data=json.dumps(message).encode())
        assert done.returncode == 0, done.stderr
        assert self.token.pin.encode() not in done.stdout + done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def on_token(tmp_path: Path) -> Models:
    token = Token(tmp_path / "token")
    module = token.environment["PYKCS11LIB"]
    pin = tmp_path / "pin"
    pin.write_text(token.pin + "\n")
    found = Models(token, f"pkcs11:token=fleet;object=models?module-path={module}&pin-source={pin}")
    made = found.run("-c", _MAKE_KEY, module, token.pin)
    assert made.returncode == 0, made.stderr
    return found


def test_a_key_on_a_token_opens_what_its_card_alone_does_not(tmp_path: Path, on_token: Models) -> None:
    shown = on_token.run("-c", _SHOW_POINT, on_token.uri)
    assert shown.returncode == 0, shown.stderr
    card = Card(tmp_path / "device", bytes.fromhex(shown.stdout.decode()))
    assert not (card.state / "identity" / encryption_key.KEY_FILE).exists()
    assert on_token.courier(card, on_token.uri)["ok"]["bytes"] > 200_000
    shutil.rmtree(card.memory / card.digest)
    # The thief has the card, the signing key and the wrapped key, and no token: a key of his own opens nothing.
    assert card.code() == "unreachable"
    assert card.shows_no_model()


def test_a_token_that_cannot_be_used_is_named(tmp_path: Path, on_token: Models) -> None:
    card = Card(tmp_path / "device", ec_point(ec.generate_private_key(ec.SECP256R1())))
    for change, said in (
        (("object=models", "object=other"), "fleet/other"),
        (("token=fleet", "token=none"), "none/models"),
        (("object=models", "x=y"), "wanted object"),
        (("pin-source=", "pin-source=/nowhere"), "pin-source"),
        (("module-path=", "module-path=/nowhere"), "nowhere"),
    ):
        told = on_token.courier(card, on_token.uri.replace(*change))["error"]
        assert (told["kind"], told["code"]) == ("degraded", "encryption_key_unusable"), told
        assert said in told["detail"]
    (tmp_path / "pin").write_text("000000")
    told = on_token.courier(card, on_token.uri)["error"]
    assert told["code"] == "encryption_key_unusable"
    assert "PinIncorrect" in told["detail"]
    assert "000000" not in told["detail"]
