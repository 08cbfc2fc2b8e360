"""Encrypted bundles: how a file looks encrypted, how its key is named, and how a content key is wrapped for one device.

A **content key** is 32 random bytes, made where the bundle is built. Each file is encrypted under a key of its own, made of the
content key and the file's plaintext digest, in chunks of 64 KiB (the STREAM construction: Hoang, Reyhanitabar, Rogaway, Vizár,
"Online authenticated-encryption and its nonce-reuse misuse-resistance", 2015, section 7): any chunk can be opened alone, and none can be changed, moved, left
out or added. A file key encrypts one plaintext only, so that the counter may be the nonce, and the same plaintext under the same content key
always gives the same bytes: two versions that share a content key share the files they have in common.

This module holds the bytes of the formats, of the standard library alone. The cipher is an argument: ``AESGCM`` of ``cryptography`` is one.
Keys are made, kept and released elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import msgspec

from skerry_contract import canonical, ids
from skerry_contract.errors import Malformed, UnsupportedVersion

SCHEME = "aes-256-gcm-64k"
KEY_BYTES = 32
TAG_BYTES = 16
CHUNK_BYTES = 1 << 16
"""Plaintext of each chunk but the last, which has 0 to so many."""
MAGIC = b"SKRYENC1"
DELTA_MAGIC = b"SKRYDLT2"
LEAKY_DELTA_MAGIC = b"SKRYDLT1"
"""Of deltas under the target's content key alone: they gave the base away to whoever had that key. Nobody reads them any more."""
WRAPPED_MAX_BYTES = 2048
POINT_BYTES = 65
"""An uncompressed point of P-256."""
_WRAPPED_SCHEME = "p256-hkdf-sha256-a256gcm"


class Cipher(Protocol):
    """AES-256-GCM under one key."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes:
        """Ciphertext and tag."""

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes:
        """The plaintext; raises anything when the tag is wrong."""


NewCipher = Callable[[bytes], Cipher]


class CannotOpen(Exception):
    """The ciphertext is not what this key made: another key, changed, cut short or too long."""


def sealed_size(plain_size: int) -> int:
    """Bytes of a file of so many bytes once it is encrypted.

    >>> [sealed_size(n) for n in (0, 1, 65536, 65537)]
    [24, 25, 65560, 65577]
    """
    chunks = max(1, -(-plain_size // CHUNK_BYTES))
    return len(MAGIC) + plain_size + chunks * TAG_BYTES


def key_id(content_key: bytes) -> str:
    """What a manifest says of its content key; the key cannot be guessed from it.

    Raises:
        Malformed: no content key.
    """
    if len(content_key) != KEY_BYTES:
        raise Malformed("content key", f"wanted {KEY_BYTES} bytes, got {len(content_key)}")
    return hashlib.sha256(b"skerry content key 1\0" + content_key).hexdigest()


def seal(source: BinaryIO, content_key: bytes, plain_sha256: str, new_cipher: NewCipher) -> Iterator[bytes]:
    """The encrypted file in pieces. The caller vouches for ``plain_sha256``: under another, files would share a nonce."""
    yield MAGIC
    yield from _seal(source, new_cipher(_file_key(content_key, plain_sha256)), MAGIC)


def opened(source: BinaryIO, content_key: bytes, plain_sha256: str, new_cipher: NewCipher) -> Iterator[bytes]:
    """The plaintext in pieces, each authenticated before it comes; memory is bounded by two chunks.

    That the whole is the right file is known when it ends without ``CannotOpen`` *and* its digest is compared by the caller.

    Raises:
        CannotOpen: see there.
    """
    if _read(source, len(MAGIC)) != MAGIC:
        raise CannotOpen("it does not begin as an encrypted file")
    yield from _opened(source, new_cipher(_file_key(content_key, plain_sha256)), MAGIC)


def seal_delta(
    source: BinaryIO,
    content_key: bytes,
    *,
    base_key: bytes,
    base: str,
    target: str,
    salt: bytes,
    new_cipher: NewCipher,
) -> Iterator[bytes]:
    """The encrypted delta in pieces, under the content keys of both its files.

    A delta is a difference: with either of its files it gives the other away. So whoever has one of two content keys, as a thief of an
    older version has, must not open it; who may apply it has both.

    Args:
        content_key: of the target.
        base_key: of the base; empty where that is in the clear, and thereby nobody's secret.
        base, target: sha256 that the delta is named by: of the ciphertext where a file has one.
        salt: 32 random bytes, new ones each time: a delta may be made anew with other bytes under its name.
    """
    if len(salt) != KEY_BYTES:
        raise Malformed("delta's salt", f"wanted {KEY_BYTES} bytes, got {len(salt)}")
    yield DELTA_MAGIC + salt
    yield from _seal(source, new_cipher(_delta_key(base_key, content_key, base, target, salt)), DELTA_MAGIC)


def opened_delta(
    source: BinaryIO, content_key: bytes, *, base_key: bytes, base: str, target: str, new_cipher: NewCipher
) -> Iterator[bytes]:
    """The delta in pieces, as ``opened``; the keys as in ``seal_delta``. Raises ``CannotOpen``."""
    head = _read(source, len(DELTA_MAGIC) + KEY_BYTES)
    if len(head) != len(DELTA_MAGIC) + KEY_BYTES or not head.startswith(DELTA_MAGIC):
        raise CannotOpen("it does not begin as an encrypted delta")
    cipher = new_cipher(_delta_key(base_key, content_key, base, target, head[len(DELTA_MAGIC) :]))
    yield from _opened(source, cipher, DELTA_MAGIC)


def _seal(source: BinaryIO, cipher: Cipher, about: bytes) -> Iterator[bytes]:
    number, piece = 0, _read(source, CHUNK_BYTES)
    while True:
        following = _read(source, CHUNK_BYTES) if len(piece) == CHUNK_BYTES else b""
        yield cipher.encrypt(_nonce(number, last=not following), piece, about)
        if not following:
            return
        number, piece = number + 1, following


def _opened(source: BinaryIO, cipher: Cipher, about: bytes) -> Iterator[bytes]:
    size = CHUNK_BYTES + TAG_BYTES
    number, piece = 0, _read(source, size)
    while True:
        following = _read(source, size) if len(piece) == size else b""
        try:
            plain = cipher.decrypt(_nonce(number, last=not following), piece, about)
        except Exception:
            raise CannotOpen(f"chunk {number} was made with another key, or changed since") from None
        if number and not plain:
            raise CannotOpen(f"chunk {number} is empty")
        yield plain
        if not following:
            return
        number, piece = number + 1, following


class Wrapped(msgspec.Struct, frozen=True, kw_only=True):
    """A content key that one device can open.

    Attributes:
        point: of the sender's key of one use, P-256, uncompressed; box: the content key, AES-256-GCM.
    """

    point: bytes
    box: bytes


def wrapping_key(secret: bytes, *, sender: bytes, receiver: bytes, device: str, digest: str) -> tuple[bytes, bytes]:
    """(key, associated data) that wrap a content key, of an ECDH secret on P-256; used once, with a nonce of zeros.

    Args:
        secret: the shared x coordinate, 32 bytes; sender, receiver: uncompressed points.
        device, digest: whom and which bundle the key is for; a key wrapped for another does not open.
    """
    about = f"skerry key wrap 1\0{ids.device_id(device)}\0{ids.bundle_digest(digest)}".encode()
    return _hkdf(secret, salt=sender + receiver, info=about), about


def wrap(content_key: bytes, key: bytes, about: bytes, new_cipher: NewCipher) -> bytes:
    """``Wrapped.box``."""
    return new_cipher(key).encrypt(bytes(12), content_key, about)


def unwrap(wrapped: Wrapped, key: bytes, about: bytes, new_cipher: NewCipher) -> bytes:
    """The content key. Raises ``CannotOpen``: it was wrapped for another key, device or bundle."""
    try:
        found = new_cipher(key).decrypt(bytes(12), wrapped.box, about)
    except Exception:
        raise CannotOpen("the content key is wrapped for another key, device or bundle") from None
    if len(found) != KEY_BYTES:
        raise CannotOpen(f"the wrapped key has {len(found)} bytes, wanted {KEY_BYTES}")
    return found


def encode_wrapped(wrapped: Wrapped) -> dict[str, str]:
    """As it goes over the wire and lies on the device."""
    return {
        "scheme": _WRAPPED_SCHEME,
        "point": base64.b64encode(wrapped.point).decode(),
        "box": base64.b64encode(wrapped.box).decode(),
    }


def decode_wrapped(value: object) -> Wrapped:
    """Reads a wrapped key; fields that are not known are left alone.

    Raises:
        Malformed: and the message holds nothing secret. UnsupportedVersion: another way of wrapping.
    """
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("scheme", "point", "box")):
        raise Malformed("wrapped key", "wanted the texts scheme, point, box")
    if value["scheme"] != _WRAPPED_SCHEME:
        raise Malformed("wrapped key", f"wanted {_WRAPPED_SCHEME}, got {value['scheme'][:60]!r}", where="$.scheme")
    try:
        point, box = (base64.b64decode(value[name], validate=True) for name in ("point", "box"))
    except (binascii.Error, ValueError):
        raise Malformed("wrapped key", "wanted base64") from None
    if len(point) != POINT_BYTES or point[0] != 4 or len(box) != KEY_BYTES + TAG_BYTES:
        raise Malformed(
            "wrapped key", f"wanted {POINT_BYTES} and {KEY_BYTES + TAG_BYTES} bytes, got {len(point)} and {len(box)}"
        )
    return Wrapped(point=point, box=box)


def encode_key_file(content_key: bytes) -> bytes:
    """The file that a content key lies in where bundles are built: a secret."""
    value = {"schema": 1, "key": base64.b64encode(content_key).decode(), "key_id": key_id(content_key)}
    return canonical.encode(value)


def decode_key_file(data: bytes) -> bytes:
    """The content key of such a file. Raises ``Malformed``, ``UnsupportedVersion``; the message holds nothing secret."""
    value = canonical.decode(data, what="content key file", max_bytes=4096)
    if isinstance(value.get("schema"), int) and value["schema"] > 1:
        raise UnsupportedVersion("content key file", value["schema"], 1)
    try:
        found = base64.b64decode(value["key"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise Malformed("content key file", "wanted base64", where="$.key") from None
    if value.get("schema") != 1 or value.get("key_id") != key_id(found):
        raise Malformed("content key file", "wanted schema 1 and the id of its key", where="$.key_id")
    return found


def _file_key(content_key: bytes, plain_sha256: str) -> bytes:
    key_id(content_key)
    return _hkdf(content_key, salt=b"", info=b"skerry file 1\0" + bytes.fromhex(ids.sha256_hex(plain_sha256)))


def _delta_key(base_key: bytes, content_key: bytes, base: str, target: str, salt: bytes) -> bytes:
    for key in (base_key, content_key) if base_key else (content_key,):
        key_id(key)
    names = bytes.fromhex(ids.sha256_hex(base)) + bytes.fromhex(ids.sha256_hex(target))
    return _hkdf(base_key + content_key, salt=salt, info=b"skerry delta 2\0" + names)


def _hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with sha256, one block: 32 bytes."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def _read(source: BinaryIO, size: int) -> bytes:
    """``size`` bytes, less only at the end."""
    data = source.read(size)
    while 0 < len(data) < size and (more := source.read(size - len(data))):
        data += more
    return data
