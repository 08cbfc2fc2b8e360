"""Encrypted files and wrapped keys: any change is found, no two plaintexts share a nonce, sizes are known beforehand."""

from __future__ import annotations

import hashlib
import io

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_contract import sealed
from skerry_contract.errors import ContractError, Malformed

KEY = bytes(range(32))
CHUNK = sealed.CHUNK_BYTES
STORED = CHUNK + sealed.TAG_BYTES


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seal(data: bytes, key: bytes = KEY) -> bytes:
    return b"".join(sealed.seal(io.BytesIO(data), key, sha256(data), AESGCM))


def opened(data: bytes, plain_sha256: str, key: bytes = KEY) -> bytes:
    return b"".join(sealed.opened(io.BytesIO(data), key, plain_sha256, AESGCM))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
def test_a_file_comes_back_and_its_encrypted_size_was_known(size: int) -> None:
    data = bytes(i * 31 % 251 for i in range(size))
    stored = seal(data)
    assert len(stored) == sealed.sealed_size(size)
    assert opened(stored, sha256(data)) == data
    assert seal(data) == stored, "the same file under the same key is the same blob"


class Dribble(io.RawIOBase):
    """Gives a few bytes at a time, as a socket does."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 1013))


def test_a_source_that_gives_few_bytes_at_a_time_changes_nothing() -> None:
    data = b"x" * (CHUNK + 5)
    assert b"".join(sealed.seal(Dribble(data), KEY, sha256(data), AESGCM)) == seal(data)
    assert b"".join(sealed.opened(Dribble(seal(data)), KEY, sha256(data), AESGCM)) == data


@pytest.mark.parametrize(
    "harm",
    [
        lambda b: b[:-1],
        lambda b: b + b"\0",
        lambda b: b[: len(b) - 7 - sealed.TAG_BYTES],
        lambda b: b[: 8 + STORED],
        lambda b: b[:8] + b[8 + STORED : 8 + 2 * STORED] + b[8 : 8 + STORED] + b[8 + 2 * STORED :],
        lambda b: b[:8] + b[8 + STORED :],
        lambda b: b[: 8 + STORED] + b[8 : 8 + STORED] + b[8 + STORED :],
        lambda b: b"SKRYENC2" + b[8:],
        lambda b: b[:8],
        lambda b: b"",
    ],
    ids=["a byte short", "a byte more", "last chunk gone", "cut at a chunk", "chunks swapped", "first gone", "one twice",
         "newer form", "only the mark", "empty"],
)  # fmt: skip
def test_a_file_that_was_cut_moved_or_added_to_does_not_open(harm: object) -> None:
    data = b"weights" * 20_000
    with pytest.raises(sealed.CannotOpen):
        opened(harm(seal(data)), sha256(data))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 8 + 2 * STORED + 30), st.integers(1, 255))
def test_no_byte_can_be_changed(at: int, by: int) -> None:
    data = b"y" * (2 * CHUNK + 15)
    stored = bytearray(seal(data))
    stored[at % len(stored)] ^= by
    with pytest.raises(sealed.CannotOpen):
        opened(bytes(stored), sha256(data))


def test_another_key_or_another_file_name_of_content_does_not_open_it() -> None:
    data = b"z" * 100
    with pytest.raises(sealed.CannotOpen):
        opened(seal(data), sha256(data), key=bytes(32))
    with pytest.raises(sealed.CannotOpen):
        opened(seal(data), sha256(b"other"))


def test_two_files_under_one_content_key_share_no_keystream() -> None:
    a, b = bytes(1000), bytes(999) + b"\x01"
    one, other = seal(a)[8:900], seal(b)[8:900]
    same = sum(x == y for x, y in zip(one, other, strict=True))
    assert same < 40, "bytes of two independent streams agree in one of 256 places"


def test_the_file_key_is_hkdf_as_others_compute_it() -> None:
    # A second reading of RFC 5869: cryptography's.
    data = b"a model"
    info = b"skerry file 1\0" + hashlib.sha256(data).digest()
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(KEY)
    assert AESGCM(key).decrypt(bytes(11) + b"\x01", seal(data)[8:], b"SKRYENC1") == data


def test_a_wrapped_key_opens_for_its_device_and_bundle_alone() -> None:
    places = {"sender": b"\x04" + b"s" * 64, "receiver": b"\x04" + b"r" * 64}
    key, about = sealed.wrapping_key(b"e" * 32, device="cam-1", digest="ab" * 32, **places)
    box = sealed.wrap(KEY, key, about, AESGCM)
    wrapped = sealed.decode_wrapped(sealed.encode_wrapped(sealed.Wrapped(point=places["sender"], box=box)))
    assert sealed.unwrap(wrapped, key, about, AESGCM) == KEY
    for change in ({"device": "cam-2"}, {"digest": "cd" * 32}, {"receiver": b"\x04" + b"x" * 64}):
        other = {"device": "cam-1", "digest": "ab" * 32, **places, **change}
        with pytest.raises(sealed.CannotOpen):
            sealed.unwrap(wrapped, *sealed.wrapping_key(b"e" * 32, **other), AESGCM)


@pytest.mark.parametrize(
    "value",
    [None, {}, {"scheme": "p256-hkdf-sha256-a256gcm", "point": "", "box": ""}, {"scheme": "x", "point": "", "box": ""},
     {"scheme": "p256-hkdf-sha256-a256gcm", "point": "?", "box": "?"}],
)  # fmt: skip
def test_what_is_no_wrapped_key_is_refused(value: object) -> None:
    with pytest.raises(Malformed):
        sealed.decode_wrapped(value)


def test_a_key_file_is_read_back_and_a_damaged_one_is_not() -> None:
    data = sealed.encode_key_file(KEY)
    assert sealed.decode_key_file(data) == KEY
    for harm in (data.replace(b"AAEC", b"BAEC"), data[:-1], data.replace(b'"schema":1', b'"schema":2'), b"{}"):
        with pytest.raises(ContractError) as refused:
            sealed.decode_key_file(harm)
        assert "AAEC" not in str(refused.value)


NAMES = {"base": "ab" * 32, "target": "cd" * 32}


BASE_KEY = bytes(range(32, 64))


def seal_delta(data: bytes, salt: bytes = bytes(32), base_key: bytes = BASE_KEY) -> bytes:
    return b"".join(sealed.seal_delta(io.BytesIO(data), KEY, base_key=base_key, **NAMES, salt=salt, new_cipher=AESGCM))


def opened_delta(data: bytes, key: bytes = KEY, base_key: bytes = BASE_KEY, **names: str) -> bytes:
    wanted = {**NAMES, **names}
    return b"".join(sealed.opened_delta(io.BytesIO(data), key, base_key=base_key, **wanted, new_cipher=AESGCM))


def test_a_delta_opens_between_its_two_files_alone_and_is_never_the_same_twice() -> None:
    data = b"patch" * 30_000
    stored = seal_delta(data)
    assert opened_delta(stored) == data
    other = seal_delta(data, salt=b"\x01" * 32)
    assert opened_delta(other) == data
    assert sum(a == b for a, b in zip(stored[40:1040], other[40:1040], strict=True)) < 40
    for change in ({"base": "ef" * 32}, {"target": "ef" * 32}, {"key": bytes(32)}, {"base_key": bytes(32)}):
        with pytest.raises(sealed.CannotOpen):
            opened_delta(stored, **change)
    for harmed in (
        stored[:-1],
        stored + b"x",
        stored[:39],
        b"",
        b"SKRYENC1" + stored[8:],
        b"SKRYDLT1" + stored[8:],
        stored[:8] + b"\x01" + stored[9:],
    ):
        with pytest.raises(sealed.CannotOpen):
            opened_delta(harmed)
    with pytest.raises(Malformed):
        seal_delta(data, salt=b"short")


@pytest.mark.attack("leaked content key")
@pytest.mark.parametrize("keys", [(KEY, b""), (KEY, KEY), (BASE_KEY, b""), (BASE_KEY, BASE_KEY), (BASE_KEY, KEY)])
def test_one_content_key_of_two_opens_no_delta(keys: tuple[bytes, bytes]) -> None:
    # A delta is a difference: whoever has one of its files and opens it has the other.
    with pytest.raises(sealed.CannotOpen):
        opened_delta(seal_delta(b"patch" * 100), key=keys[0], base_key=keys[1])


def test_a_delta_from_a_file_in_the_clear_wants_the_key_of_its_target_alone() -> None:
    stored = seal_delta(b"patch" * 100, base_key=b"")
    assert opened_delta(stored, base_key=b"") == b"patch" * 100
    with pytest.raises(sealed.CannotOpen):
        opened_delta(stored, base_key=KEY)


def test_the_delta_key_is_hkdf_of_both_content_keys_as_others_compute_it() -> None:
    info = b"skerry delta 2\0" + b"\xab" * 32 + b"\xcd" * 32
    for base_key in (BASE_KEY, b""):
        key = HKDF(algorithm=hashes.SHA256(), length=32, salt=b"s" * 32, info=info).derive(base_key + KEY)
        stored = seal_delta(b"a patch", salt=b"s" * 32, base_key=base_key)
        assert stored[:40] == b"SKRYDLT2" + b"s" * 32
        assert AESGCM(key).decrypt(bytes(11) + b"\x01", stored[40:], b"SKRYDLT2") == b"a patch"


@pytest.mark.parametrize("size", [1, 31, 33, 64])
def test_what_is_no_content_key_seals_no_delta(size: int) -> None:
    with pytest.raises(Malformed):
        seal_delta(b"patch", base_key=bytes(size))
