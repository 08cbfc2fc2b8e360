"""Canonical JSON: sorted keys, UTF-8, no insignificant space, no duplicate keys, no NaN.

One writer makes the bytes whose sha256 is an identity, and the reader refuses bytes that the writer would not have
written. So a document has one form, and a duplicate key, a second spelling of a number or a hidden space is an error.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from skerry_contract.errors import Malformed

_encoder = msgspec.json.Encoder(order="sorted")


def encode(value: Any) -> bytes:
    """Writes builtins (or msgspec structs) as canonical JSON."""
    return _encoder.encode(value)


def sha256(data: bytes) -> str:
    """The lower-case hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, *, what: str, max_bytes: int) -> dict[str, Any]:
    """Reads one canonical JSON object.

    Args:
        data: the bytes.
        what: the document's name, for the error.
        max_bytes: refuse anything longer, before parsing.

    Raises:
        Malformed: too long, too deep, not JSON, not an object, or not in canonical form.
    """
    if len(data) > max_bytes:
        raise Malformed(what, f"at most {max_bytes} bytes, got {len(data)}")
    try:
        value = msgspec.json.decode(data)
        canonical = isinstance(value, dict) and encode(value) == data
    except RecursionError:
        # msgspec counts its own recursion against the interpreter's limit: a nesting bomb ends here, not in the C stack.
        raise Malformed(what, "nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(what, f"wanted JSON: {error}") from None
    if not isinstance(value, dict):
        raise Malformed(what, f"wanted an object, got {type(value).__name__}")
    if not canonical:
        raise Malformed(what, "wanted canonical JSON: sorted unique keys, no space, shortest numbers")
    return value


def refuse_repeated_keys(data: bytes, *, what: str) -> Any:
    """Reads JSON that need not be canonical (TUF metadata, requests of people), in which no object names a key twice.

    Of two values of one key most readers take the last and some the first: a document that two readers understand differently is none.

    >>> refuse_repeated_keys(b'{"a": [{"b": 1}]}', what="x")
    {'a': [{'b': 1}]}

    Raises:
        Malformed: a key stands twice.
        ValueError, RecursionError: not JSON, as ``json.loads``.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise Malformed(what, f"the key {twice[:80]!r} stands twice in one object")
        return found

    return json.loads(data, object_pairs_hook=once)
