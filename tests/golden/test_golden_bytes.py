"""What the first release wrote is read to the same values and written to the same bytes."""

from __future__ import annotations

import zlib
from pathlib import Path

import msgspec
import pytest
from skerry_contract import canonical, manifest, wire
from skerry_runtime import delta
from skerry_runtime.delta.elements import Method

from tests.golden import patches, values
from tests.golden.formats import FORMATS, STRUCTS

V1 = Path(__file__).parent / "v1"


@pytest.mark.parametrize("name", FORMATS)
def test_shipped_bytes_are_read_to_the_same_value(name: str) -> None:
    assert FORMATS[name].read((V1 / name).read_bytes()) == FORMATS[name].value


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_value_is_written_to_the_shipped_bytes(name: str) -> None:
    assert FORMATS[name].write(FORMATS[name].value) == (V1 / name).read_bytes()


def test_a_shipped_batch_is_read() -> None:
    assert wire.decode_batch((V1 / "batch.bin").read_bytes()) == values.BATCH


def test_a_batch_of_today_unpacks_to_the_shipped_bytes() -> None:
    # Unpacked here by hand, so that a changed dictionary shows.
    for data in ((V1 / "batch.bin").read_bytes(), wire.encode_batch(values.BATCH)):
        unpacked = zlib.decompressobj(wbits=-15, zdict=wire._DICTIONARY).decompress(data)
        assert unpacked == (V1 / "batch-inflated.bin").read_bytes()


def test_the_preset_dictionary_never_changes() -> None:
    assert canonical.sha256(wire._DICTIONARY) == (V1 / "dictionary.sha256").read_text().strip()


def test_digests_of_records_never_change() -> None:
    lines = [f"{record.seq} {wire.digest(record).hex()}" for record in values.RECORDS]
    assert lines == (V1 / "record-digests.txt").read_text().splitlines()


def test_the_identity_of_a_bundle_never_changes() -> None:
    data = (V1 / "manifest.json").read_bytes()
    assert manifest.digest(data) == (V1 / "manifest.sha256").read_text().strip()


@pytest.mark.parametrize("name", patches.SHIPPED)
def test_a_shipped_patch_gives_the_same_file(tmp_path: Path, name: str) -> None:
    # The base is computed, so that only the patch is old. LZMA of another build may pack it otherwise: only reading is held.
    base, target, _ = patches.files(name)
    (tmp_path / "base").write_bytes(base)
    digest = canonical.sha256(target)
    delta.apply(tmp_path / "base", V1 / name, tmp_path / "made", sha256=digest, size=len(target))
    assert (tmp_path / "made").read_bytes() == target


def test_the_shipped_patches_have_every_method() -> None:
    assert {method for name in patches.SHIPPED for method, _, _ in patches.cases(name)} == set(Method)


def test_every_shipped_file_is_tested() -> None:
    others = {
        "batch.bin",
        "record-digests.txt",
        "hash64.json",
        "manifest.sha256",
        "dictionary.sha256",
        *patches.SHIPPED,
    }
    assert {path.name for path in V1.iterdir()} == set(FORMATS) | others


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_every_field_is_filled_in_a_golden_value(kind: type[msgspec.Struct]) -> None:
    found = list(_instances([form.value for form in FORMATS.values()], kind))
    empty = [
        field.name
        for field in msgspec.structs.fields(kind)
        if field.default is not msgspec.NODEFAULT
        and field.name not in ("schema", "extra")
        and all(getattr(value, field.name) == field.default for value in found)
    ]
    assert found
    assert not empty


def _instances(value: object, kind: type) -> list:
    found = [value] if isinstance(value, kind) else []
    if isinstance(value, msgspec.Struct):
        inner = [getattr(value, name) for name in value.__struct_fields__]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    else:
        inner = []
    for part in inner:
        found += _instances(part, kind)
    return found
