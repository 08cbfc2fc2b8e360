"""What is said of a value that does not fit: where it stands, what was wanted, what came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from skerry_contract import manifest, misfit
from skerry_contract.errors import Malformed
from skerry_contract.group import Settings

from tests import models


class Inner(msgspec.Struct):
    how: Literal["drop", "hash"] = "drop"
    size: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    names: tuple[Annotated[str, msgspec.Meta(max_length=3)], ...] = ()
    by_name: dict[str, Literal["a", "b"]] = {}
    pair: tuple[int, float] = (1, 2.0)


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: Inner
    more: list[Inner] = []
    port: int | Literal["none"] = 1
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("given", "where", "words"),
    [
        ({"inner": {"how": "keep"}}, "inner.how", "wanted one of drop, hash, got 'keep'"),
        ({"inner": {"how": 5}}, "inner.how", "wanted one of drop, hash, got 5"),
        ({"inner": {"size": 9}}, "inner.size", "wanted a whole number from 1 to 5, got 9"),
        ({"inner": {"size": 1.5}}, "inner.size", "wanted a whole number from 1 to 5, got 1.5"),
        ({"inner": {"size": True}}, "inner.size", "wanted a whole number from 1 to 5, got true"),
        ({"inner": {"names": ["abc", "abcd"]}}, "inner.names[1]", "wanted text, at most 3 characters, got 'abcd'"),
        ({"inner": {"names": "abc"}}, "inner.names", "wanted a list, each of it text, at most 3 characters, got 'abc'"),
        ({"inner": {"by_name": {"x": "a", "y": "c"}}}, "inner.by_name.y", "wanted one of a, b, got 'c'"),
        ({"inner": {"by_name": {7: "a"}}}, "inner.by_name", "wanted keys that are text, got 7"),
        ({"inner": {"pair": [1, "x"]}}, "inner.pair[1]", "wanted a number, got 'x'"),
        ({"inner": {"pair": [1]}}, "inner.pair", "wanted a list of 2: a whole number, a number, got a list"),
        ({"inner": {}, "more": [{}, {"how": None}]}, "more[1].how", "wanted one of drop, hash, got null"),
        ({"inner": {}, "port": "some"}, "port", "wanted a whole number or none, got 'some'"),
        ({"inner": {}, "maybe": {"size": 0}}, "maybe.size", "wanted a whole number from 1 to 5, got 0"),
        ({"inner": {}, "colour": 1}, "", "wanted no field but inner, more, port, maybe, got 'colour'"),
        ({}, "", "wanted `inner`, got no such field"),
        ([], "", "wanted a table of inner, more, port, maybe, got a list"),
        ({"inner": {"how": "x" * 500}}, "inner.how", f"wanted one of drop, hash, got '{'x' * 76}..."),
    ],
)  # fmt: skip
def test_place_and_words_of_every_kind_of_misfit(given: Any, where: str, words: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(given, Outer)
    assert misfit.words(caught.value, Outer, given) == (where, words)


def said_of(value: dict[str, Any]) -> tuple[str, str] | None:
    try:
        msgspec.convert(value, manifest.Manifest)
    except msgspec.ValidationError as error:
        return misfit.words(error, manifest.Manifest, value)
    return None


def test_every_field_of_a_manifest_and_of_group_settings_says_what_it_wants(tmp_path: Path) -> None:
    """Whatever stands in a field that cannot be there, the words never fall back to msgspec's."""
    models.build_bundle(tmp_path)
    whole = json.loads((tmp_path / manifest.MANIFEST_FILE).read_bytes())
    for name in set(manifest.Manifest.__struct_fields__) - {"schema"}:
        told = [said_of({**whole, name: odd}) for odd in (object, [[[]]], {"x": {"y": []}}, -1.5, None)]
        assert any(told), f"{name}: something does not fit"
        for where, words in filter(None, told):
            assert where.split(".")[0].split("[")[0] == name
            assert words.startswith("wanted ") and ", got " in words
    for name in Settings.__struct_fields__:
        given = {name: object()}
        with pytest.raises(msgspec.ValidationError) as refused:
            msgspec.convert(given, Settings)
        assert misfit.words(refused.value, Settings, given)[0] == name


def test_a_manifest_names_the_choices_of_an_enumeration(tmp_path: Path) -> None:
    with pytest.raises(
        Malformed, match=r"^manifest at \$\.features\[0\]\.on_null: wanted one of .*impute.*, got 'keep'$"
    ):
        features = [{"name": "f", "input": "x", "column": 0, "on_null": "keep"}]
        models.build_bundle(tmp_path, changes={"features": features})
        manifest.parse((tmp_path / manifest.MANIFEST_FILE).read_bytes())
