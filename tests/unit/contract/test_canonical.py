"""Canonical JSON: a document has one form, and the reader refuses every other."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import canonical
from skerry_contract.errors import ContractError, Malformed

from tests.unit.contract import values

LIMIT = 1 << 20


def decode(data: bytes) -> dict:
    return canonical.decode(data, what="document", max_bytes=LIMIT)


@given(values.json_objects)
def test_what_is_written_is_read_back(value: dict) -> None:
    found = decode(canonical.encode(value))
    assert found == value
    assert canonical.encode(found) == canonical.encode(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_to_the_last_bit(value: float) -> None:
    found = decode(canonical.encode({"x": value}))["x"]
    assert math.copysign(1, found) == math.copysign(1, value)
    assert found == value


@given(values.json_objects)
def test_it_is_json_as_others_read_it(value: dict) -> None:
    assert json.loads(canonical.encode(value)) == value


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2}',
        b'{"b":1,"a":1}',
        b'{ "a":1}',
        b'{"a":1} ',
        b'{"a":1}\n',
        b'{"a": 1}',
        b'{"a":1.50}',
        b'{"a":1e5}',
        b'{"a":1E+2}',
        b'{"a":0.1e1}',
        b'{"a":1e-400}',
        b'{"a":"\\u0041"}',
        b'{"a":"\\/"}',
        b'{"a":"\\u00e9"}',
        b'{"\\u0061":1}',
        b'{"a":{"c":1,"b":1}}',
    ],
)
def test_another_spelling_of_the_same_document_is_refused(data: bytes) -> None:
    json.loads(data)  # it is JSON, only not ours
    with pytest.raises(Malformed, match="canonical"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nul",
        b"{}{}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e400}',
        b'{"a":01}',
        b'{"a":+1}',
        b"\xef\xbb\xbf{}",
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xed\xa0\x80"}',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":"\n"}',
        "{}".encode("utf-16"),
    ],
)
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed, match="JSON"):
        decode(data)


@pytest.mark.parametrize("data", [b"[]", b'"a"', b"1", b"null", b"true"])
def test_only_an_object_is_a_document(data: bytes) -> None:
    with pytest.raises(Malformed, match="wanted an object"):
        decode(data)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_no_depth_of_nesting_brings_the_reader_down(opening: bytes, closing: bytes) -> None:
    # Every depth about the interpreter's limit, so that neither the reader nor the comparison with the canonical form breaks.
    refused = []
    for depth in [*range(1, 1500, 7), *range(900, 1100), 10_000, 100_000]:
        data = b'{"a":' + opening * depth + b"1" + closing * depth + b"}"
        try:
            decode(data)
        except Malformed:
            refused.append(depth)
    assert 100_000 in refused
    assert 1 not in refused


def test_an_unclosed_bomb_is_refused() -> None:
    with pytest.raises(Malformed):
        decode(b'{"a":' + b"[" * 1_000_000)


def test_length_is_checked_before_anything_is_parsed() -> None:
    with pytest.raises(Malformed, match=r"at most 10 bytes, got 11"):
        canonical.decode(b"x" * 11, what="document", max_bytes=10)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_contract_error(data: bytes) -> None:
    try:
        decode(data)
    except ContractError:
        pass


def test_the_digest_is_plain_sha256() -> None:
    assert canonical.sha256(b"{}") == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
