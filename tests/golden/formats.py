"""How every shipped format is written and read: file name -> (value, write, read)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import enrolment, floors, group, manifest, sealed, wire
from skerry_contract import window as w

from tests.golden import values


class Format(NamedTuple):
    """A value and its two directions."""

    value: Any
    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


def _wire(value: Any) -> Format:
    return Format(value, wire.encode, lambda data: wire.decode(type(value), data))


def _write_token(value: enrolment.Enrolment) -> bytes:
    return enrolment.build(value).encode()


def _read_floors(data: bytes) -> tuple[dict[str, str], dict[str, str]]:
    return floors.parse(data), floors.parse_forced(data)


def _sealed_file(data: bytes) -> Format:
    key, sha256 = values.CONTENT_KEYS[1], hashlib.sha256(data).hexdigest()
    return Format(
        data,
        lambda plain: b"".join(sealed.seal(io.BytesIO(plain), key, sha256, AESGCM)),
        lambda stored: b"".join(sealed.opened(io.BytesIO(stored), key, sha256, AESGCM)),
    )


def _sealed_delta(base_key: bytes) -> Format:
    key, given = values.CONTENT_KEYS[1], {"base_key": base_key, "base": "a1" * 32, "target": "b2" * 32}
    salt = bytes(range(100, 132))
    return Format(
        values.SEALED,
        lambda plain: b"".join(sealed.seal_delta(io.BytesIO(plain), key, **given, salt=salt, new_cipher=AESGCM)),
        lambda stored: b"".join(sealed.opened_delta(io.BytesIO(stored), key, **given, new_cipher=AESGCM)),
    )


FORMATS: dict[str, Format] = {
    "file.sealed": _sealed_file(values.SEALED),
    "delta.sealed": _sealed_delta(values.CONTENT_KEYS[0]),
    "delta-from-clear.sealed": _sealed_delta(b""),
    "manifest.json": Format(values.MANIFEST, manifest.encode, manifest.parse),
    "manifest-later.json": Format(values.LATER_MANIFEST, manifest.encode, manifest.parse),
    "manifest-encrypted.json": Format(values.ENCRYPTED_MANIFEST, manifest.encode, manifest.parse),
    "manifest-streams.json": Format(values.LATER_STREAMS, manifest.encode, manifest.parse),
    "window-later.bin": Format(values.LATER_WINDOW, wire.encode, wire.decode_window),
    "window-labels-later.bin": Format(values.LATER_LABELS, wire.encode, wire.decode_window),
    "manifest-after.json": Format(values.AFTER_MANIFEST, manifest.encode, manifest.parse),
    "group-windows.json": Format(values.WINDOWS_GROUP, group.encode, group.parse),
    "group-rules.json": Format(values.RULES_GROUP, group.encode, group.parse),
    "group-hours.json": Format(values.HOURS_GROUP, group.encode, group.parse),
    "group-later.json": Format(values.LATER_GROUP, group.encode, group.parse),
    "group.json": Format(values.GROUP, group.encode, group.parse),
    "floors.json": Format(values.FLOORS, floors.encode, floors.parse),
    "floors-forced.json": Format(values.FORCED_FLOORS, lambda pair: floors.encode(*pair), _read_floors),
    "enrolment-token.txt": Format(values.TOKEN, _write_token, lambda data: enrolment.parse(data.decode())),
    "window.bin": Format(values.WINDOW, wire.encode, wire.decode_window),
    "event.bin": _wire(values.EVENT),
    "sample.bin": _wire(values.SAMPLE),
    "tombstone.bin": _wire(values.TOMBSTONE),
    "state.bin": _wire(values.STATE),
    "state-later.bin": _wire(values.STATE_LATER),
    "state-fetching.bin": _wire(values.STATE_FETCHING),
    "will.bin": _wire(values.WILL),
    "ack.bin": _wire(values.ACK),
    "bell.bin": _wire(values.BELL),
    "server-state.bin": _wire(values.SERVER_STATE),
    # The records before compression: two builds of zlib may pack the same bytes differently.
    "batch-inflated.bin": _wire(values.BATCH),
}

# Every struct whose fields make up one of the formats: a new field must show in the golden value or say why not.
STRUCTS: tuple[type[msgspec.Struct], ...] = (
    manifest.Manifest,
    manifest.Variant,
    manifest.File,
    manifest.Encryption,
    manifest.Tensor,
    manifest.Feature,
    manifest.Streams,
    manifest.Explanations,
    manifest.Reference,
    group.GroupDocument,
    group.ModelPlan,
    group.Rollout,
    group.Settings,
    w.Window,
    w.Shadow,
    w.Labels,
    wire.Record,
    wire.Batch,
    wire.Event,
    wire.Sample,
    wire.Tombstone,
    wire.State,
    wire.Update,
    wire.Progress,
    wire.Ack,
    wire.Bell,
    wire.ServerState,
)
