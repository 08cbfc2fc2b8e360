"""Encrypted bundles on the engineer's and the approver's machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_cli import bundle, sealing
from skerry_cli.bundle_source import FolderSource, RepositorySource, checked_bundle
from skerry_cli.commands import bundle as commands
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_contract import manifest as m
from skerry_contract import sealed

from tests.unit.cli.conftest import CREATED, spec

KEY = bytes(range(32))


@pytest.fixture
def built(source: Path, tmp_path: Path) -> bundle.Bundle:
    found = bundle.build_bundle(spec(), source=source, out=tmp_path / "out", created=CREATED, content_key=KEY)
    sealing.key_file(tmp_path / "out").write_bytes(sealed.encode_key_file(KEY))
    return found


class Shown:
    """A source that shows what it is given: a server, say, that lies."""

    def __init__(self, data: bytes, blobs: dict[str, bytes], key: bytes) -> None:
        self._data, self._blobs, self._key = data, blobs, key

    def manifest(self, digest: str) -> bytes:
        return self._data

    def blob(self, file: m.File) -> Iterator[bytes]:
        data = self._blobs[file.sha256]
        return iter([data[:7], data[7:]])

    def content_key(self, digest: str) -> bytes:
        return self._key


def blobs(built: bundle.Bundle) -> dict[str, bytes]:
    found = {}
    for file in built.manifest.files():
        with sealing.sealed_copy(built.folder / file.path, KEY, file) as stream:
            found[file.sha256] = stream.read()
    return found


def test_the_folder_stays_in_the_clear_and_the_manifest_names_what_leaves_it(
    built: bundle.Bundle, source: Path
) -> None:
    assert (built.folder / "model.onnx").read_bytes() == (source / "model.onnx").read_bytes()
    assert built.manifest.requires == ("encrypted",)
    assert built.manifest.encryption == m.Encryption(scheme=sealed.SCHEME, key_id=sealed.key_id(KEY))
    assert KEY.hex().encode() not in built.data
    for file in built.manifest.files():
        assert file.plain is not None
        assert file.plain.size == (source / file.path).stat().st_size
        assert file.sha256 != file.plain.sha256
    for sha256, data in blobs(built).items():
        assert len(data) == next(file.size for file in built.manifest.files() if file.sha256 == sha256)
        assert b"a model" not in data


def test_the_same_files_under_the_same_key_are_the_same_bundle(
    built: bundle.Bundle, source: Path, tmp_path: Path
) -> None:
    again = bundle.build_bundle(spec(), source=source, out=tmp_path / "again", created=CREATED, content_key=KEY)
    assert again.digest == built.digest
    other = bundle.build_bundle(spec(), source=source, out=tmp_path / "o", created=CREATED, content_key=bytes(32))
    assert {file.sha256 for file in other.manifest.files()}.isdisjoint(f.sha256 for f in built.manifest.files())


def test_an_approver_sees_what_is_in_an_encrypted_bundle(built: bundle.Bundle) -> None:
    shown = Shown(built.data, blobs(built), KEY)
    assert checked_bundle("gas", "1.0.0", built.digest, shown) == built.data
    assert checked_bundle("gas", "1.0.0", built.digest, FolderSource(built.folder)) == built.data


def test_ciphertext_that_opens_to_another_file_than_the_one_listed_is_not_signed(built: bundle.Bundle) -> None:
    """Whoever builds may lie: sha256 is of the ciphertext that comes, and plain of a model that was shown to others."""
    value = json.loads(built.data)
    file = value["variants"][0]["files"][0]
    stored = b"".join(sealed.seal(_io(b"evil!!!"), KEY, file["plain"]["sha256"], AESGCM))
    file["sha256"] = m.canonical.sha256(stored)
    data = m.canonical.encode(value)
    shown = Shown(data, {**blobs(built), file["sha256"]: stored}, KEY)
    with pytest.raises(RefusedForSafety, match="in it 7 bytes"):
        checked_bundle("gas", "1.0.0", m.digest(data), shown)


@pytest.mark.parametrize("harm", ["flip", "more", "less"])
def test_a_blob_that_was_changed_is_never_signed(built: bundle.Bundle, harm: str) -> None:
    changed = {
        sha256: {"flip": bytes([data[0] ^ 1]) + data[1:], "more": data + b"x", "less": data[:-1]}[harm]
        for sha256, data in blobs(built).items()
    }
    with pytest.raises(RefusedForSafety, match=r"model\.onnx|golden\.jsonl"):
        checked_bundle("gas", "1.0.0", built.digest, Shown(built.data, changed, KEY))


def test_another_key_and_none_are_refused(built: bundle.Bundle, tmp_path: Path) -> None:
    with pytest.raises(RefusedForSafety, match="not the content key"):
        checked_bundle("gas", "1.0.0", built.digest, Shown(built.data, blobs(built), bytes(32)))
    sealing.key_file(built.folder).unlink()
    with pytest.raises(Usage, match="no content key to look into it with"):
        checked_bundle("gas", "1.0.0", built.digest, FolderSource(built.folder))
    source = RepositorySource("https://127.0.0.1:9", lambda _: built.data, None)
    with pytest.raises(Usage, match="no content key to look into it with"):
        checked_bundle("gas", "1.0.0", built.digest, source)


def test_a_file_that_changed_after_the_build_is_not_sent(built: bundle.Bundle) -> None:
    file = built.manifest.files()[0]
    (built.folder / file.path).write_bytes(b"another")
    with pytest.raises(RefusedForSafety, match="not what the manifest lists"):
        sealing.sealed_copy(built.folder / file.path, KEY, file)
    with pytest.raises(RefusedForSafety, match="the manifest says"):
        bundle.check_files(built)


def test_a_key_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    key = sealing.make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert sealing.read_key(path) == key != sealing.make_key(tmp_path / "other.json")
    with pytest.raises(Usage, match="a content key is there"):
        sealing.make_key(path)
    assert sealing.read_key(path) == key


def test_build_encrypt_leaves_a_key_beside_the_folder_and_none_when_it_fails(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    (source / "spec.json").write_text(json.dumps(spec()))
    out = tmp_path / "made"
    commands.build(source / "spec.json", out, encrypt=True)
    made = bundle.read_bundle(out)
    assert sealing.key_for(made.manifest, out) == sealing.read_key(tmp_path / "made.content-key.json")
    assert "content key" in capsys.readouterr().out
    second = tmp_path / "second"
    commands.build(source / "spec.json", second, content_key=tmp_path / "made.content-key.json")
    assert bundle.read_bundle(second).manifest.files() == made.manifest.files()
    (source / "spec.json").write_text(json.dumps(spec(version="x")))
    with pytest.raises(Usage):
        commands.build(source / "spec.json", tmp_path / "third", encrypt=True)
    assert not (tmp_path / "third.content-key.json").exists()
    with pytest.raises(Usage, match="wanted --encrypt"):
        commands.build(source / "spec.json", tmp_path / "f", encrypt=True, content_key=tmp_path / "k")


def _io(data: bytes) -> Any:
    import io

    return io.BytesIO(data)
