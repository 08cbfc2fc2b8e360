"""The lowest versions that may be activated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import floors
from skerry_contract.errors import ContractError, Malformed, UnsupportedVersion

VERSION = st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)).map(lambda v: ".".join(map(str, v)))


@given(st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True), VERSION, max_size=10))
def test_what_is_written_is_read_back(value):
    assert floors.parse(floors.encode(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    try:
        floors.parse(data)
    except ContractError:
        pass


@given(VERSION, VERSION)
def test_a_floor_allows_itself_and_what_is_above(a, b):
    key = tuple(map(int, a.split("."))) >= tuple(map(int, b.split(".")))
    assert floors.allows({"m": b}, "m", a) == key
    assert floors.allows({"other": b}, "m", a)


@pytest.mark.parametrize("data", [b"{}", b'{"floors":[],"schema":1}', b'{"floors":{"M":"1.0.0"},"schema":1}'])
def test_wrong_forms_are_named(data):
    with pytest.raises(Malformed):
        floors.parse(data)


def test_newer_schema_is_named():
    with pytest.raises(UnsupportedVersion):
        floors.parse(b'{"floors":{},"schema":2}')


@given(st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True), VERSION, max_size=5))
def test_forced_floors_are_read_back_and_a_reader_of_the_floors_alone_sees_those(value):
    data = floors.encode(value, value)
    assert (floors.parse(data), floors.parse_forced(data)) == (value, value)
    assert floors.encode(value, {}) == floors.encode(value)


@pytest.mark.parametrize(
    "data",
    [
        b'{"floors":{},"forced":{"gas":"1.0.0"},"schema":1}',
        b'{"floors":{"gas":"1.0.0"},"forced":{"gas":"1.0.1"},"schema":1}',
        b'{"floors":{"gas":"1.0.0"},"forced":{"gas":"x"},"schema":1}',
        b'{"floors":{"gas":"1.0.0"},"forced":["gas"],"schema":1}',
    ],
)
def test_a_forced_floor_above_the_floor_is_named(data):
    with pytest.raises(Malformed):
        floors.parse(data)
