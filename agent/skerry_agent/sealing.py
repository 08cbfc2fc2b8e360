"""What is encrypted on disk where ``telemetry.encrypt`` is set: samples, with AES-256-GCM; and the device's telemetry key.

The cipher is the one of OpenSSL's libcrypto, which the interpreter has loaded for TLS already: the supervisor shall not load
a library of 10 MB for it. The key lies beside the identity (``telemetry.key``, 0600), so it protects what leaves the disk
without it (a copied database, an image of a part), not a stolen device. ``docs/explanation/security-model.md`` says more.

A sealed record is ``MAGIC``, 12 random bytes of nonce, the ciphertext, 16 bytes of tag. No MessagePack map begins so.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import secrets
from pathlib import Path
from typing import Any

from skerry_agent import durable
from skerry_agent.errors import Degraded

MAGIC = b"SKRYSEAL1"
_KEY_BYTES, _NONCE_BYTES, _TAG_BYTES = 32, 12, 16
_GET_TAG, _SET_TAG = 0x10, 0x11
_ABOUT = b"skerry-sample"


class CannotOpen(Exception):
    """It was sealed with another key, or changed since."""


def telemetry_key(folder: Path) -> bytes:
    """The device's key for samples and for hashes of personal data; made when there is none.

    Raises:
        Degraded: ``identity_damaged`` when the file cannot be read, or is no key.
    """
    path = folder / "telemetry.key"
    try:
        if not path.exists():
            durable.write(path, secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise Degraded(
            "identity_damaged", f"{path}: {error.strerror}", advice="give the agent its folder back"
        ) from None
    if len(key) != _KEY_BYTES:
        detail = f"{path}: wanted {_KEY_BYTES} bytes, got {len(key)}"
        raise Degraded("identity_damaged", detail, advice="remove the file; samples that wait are lost")
    return key


class Sealer:
    """Encrypts and decrypts records. Not thread-safe.

    Raises:
        Degraded: ``no_cipher`` when this interpreter has no libcrypto to share.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"wanted {_KEY_BYTES} bytes, got {len(key)}")
        self._key = key
        self._lib = _libcrypto()

    def seal(self, plain: bytes) -> bytes:
        """The record as it may lie on disk."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed, tag = self._run(nonce, plain, None)
        return MAGIC + nonce + sealed + tag

    def open(self, sealed: bytes) -> bytes:
        """What was sealed.

        Raises:
            CannotOpen: another key, or other bytes.
        """
        at = len(MAGIC)
        if not is_sealed(sealed) or len(sealed) < at + _NONCE_BYTES + _TAG_BYTES:
            raise CannotOpen("not a sealed record")
        nonce, body = sealed[at : at + _NONCE_BYTES], sealed[at + _NONCE_BYTES : -_TAG_BYTES]
        return self._run(nonce, body, sealed[-_TAG_BYTES:])[0]

    def _run(self, nonce: bytes, data: bytes, tag: bytes | None) -> tuple[bytes, bytes]:
        lib, encrypting = self._lib, tag is None
        context = lib.EVP_CIPHER_CTX_new()
        if not context:
            raise MemoryError("EVP_CIPHER_CTX_new")
        try:
            done, out = ctypes.c_int(0), ctypes.create_string_buffer(len(data) + _TAG_BYTES)
            _must(lib.EVP_CipherInit_ex(context, lib.EVP_aes_256_gcm(), None, self._key, nonce, int(encrypting)))
            _must(lib.EVP_CipherUpdate(context, None, ctypes.byref(done), _ABOUT, len(_ABOUT)))
            _must(lib.EVP_CipherUpdate(context, out, ctypes.byref(done), data, len(data)))
            n = done.value
            if tag is not None:
                _must(
                    lib.EVP_CIPHER_CTX_ctrl(context, _SET_TAG, _TAG_BYTES, ctypes.create_string_buffer(tag, _TAG_BYTES))
                )
            rest = ctypes.create_string_buffer(_TAG_BYTES)
            if lib.EVP_CipherFinal_ex(context, rest, ctypes.byref(done)) != 1:
                raise CannotOpen("sealed with another key, or changed since")
            made = ctypes.create_string_buffer(_TAG_BYTES)
            if encrypting:
                _must(lib.EVP_CIPHER_CTX_ctrl(context, _GET_TAG, _TAG_BYTES, made))
            return out.raw[:n], made.raw
        finally:
            lib.EVP_CIPHER_CTX_free(context)


def is_sealed(record: bytes) -> bool:
    """Whether a record is one of ours."""
    return record.startswith(MAGIC)


def _must(result: int) -> None:
    if result != 1:
        raise OSError("libcrypto refused AES-256-GCM")


def _libcrypto() -> Any:
    # The one that is loaded for TLS, by its name; importing ssl makes sure that it is.
    import ssl  # noqa: F401

    names: list[str | None] = [
        _loaded(),
        "libcrypto.so.3",
        "libcrypto.so.1.1",
        ctypes.util.find_library("crypto"),
        None,
    ]
    for name in names:
        if name == "":
            continue
        try:
            lib: Any = ctypes.CDLL(name)
            _declare(lib)
            return lib
        except (OSError, AttributeError):
            continue
    raise Degraded(
        "no_cipher", "telemetry.encrypt wants OpenSSL's libcrypto", advice="install libssl, or unset telemetry.encrypt"
    )


def _loaded() -> str:
    """The libcrypto that this process has mapped; empty when there is none."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return next((line.split()[-1] for line in maps if "/libcrypto" in line), "")
    except OSError:
        return ""


def _declare(lib: Any) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("EVP_CIPHER_CTX_new", pointer, []),
        ("EVP_CIPHER_CTX_free", None, [pointer]),
        ("EVP_aes_256_gcm", pointer, []),
        ("EVP_CipherInit_ex", number, [pointer, pointer, pointer, ctypes.c_char_p, ctypes.c_char_p, number]),
        ("EVP_CipherUpdate", number, [pointer, pointer, pointer, ctypes.c_char_p, number]),
        ("EVP_CipherFinal_ex", number, [pointer, pointer, pointer]),
        ("EVP_CIPHER_CTX_ctrl", number, [pointer, number, number, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
