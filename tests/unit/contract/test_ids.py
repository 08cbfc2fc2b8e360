"""The grammar of identifiers and versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import ids
from skerry_contract.errors import Malformed

from tests.unit.contract import values

NAMED = [ids.device_id, ids.group_name, ids.model_name, ids.variant_id, ids.rollout_id]


@pytest.mark.parametrize("check", NAMED)
@given(name=values.names)
def test_names_of_the_grammar_pass_unchanged(check: object, name: str) -> None:
    assert check(name) == name  # type: ignore[operator]


@pytest.mark.parametrize("check", NAMED)
@pytest.mark.parametrize(
    "text",
    [
        "", "-a", "_server", "A", "a" * 64, "a_b", "a.b", "a/b", "..", "a b", "a\n", "\na", "a+", "a#", "a*", "a>", "é", "a\0",
        "\u0661", "$SYS", None, 7, b"a", ["a"],
    ],
)  # fmt: skip
def test_anything_else_is_refused(check: object, text: object) -> None:
    with pytest.raises(Malformed, match="wanted"):
        check(text)  # type: ignore[operator]


def test_the_servers_own_identity_cannot_be_a_device() -> None:
    with pytest.raises(Malformed):
        ids.device_id(ids.SERVER_IDENTITY)


def test_a_refusal_shows_the_value_but_not_a_megabyte_of_it() -> None:
    with pytest.raises(Malformed) as caught:
        ids.device_id("x" * 1_000_000)
    assert "xxx" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["a" * 63, "a" * 65, "A" * 64, "g" * 64, "", None, b"a" * 64, "a" * 64 + "\n"])
def test_digests_are_64_lower_case_hex_digits(text: object) -> None:
    with pytest.raises(Malformed, match="64 lower-case hex digits"):
        ids.bundle_digest(text)


@pytest.mark.parametrize("text", ["a" * 31, "a" * 33, "A" * 32, "", None, 5])
def test_epochs_are_32_lower_case_hex_digits(text: object) -> None:
    with pytest.raises(Malformed, match="32 lower-case hex digits"):
        ids.epoch(text)


def test_versions_sort_by_precedence_of_semver_clause_11() -> None:
    ascending = [
        "0.0.1", "0.1.0", "1.0.0-0", "1.0.0-1", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
        "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.9.9", "1.10.0", "2.0.0",
    ]  # fmt: skip
    keys = [ids.version_key(text) for text in ascending]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "1.0", "1.0.0.0", "v1.0.0", "01.0.0", "1.00.0", "1.0.0-", "1.0.0-01", "1.0.0-a..b", "1.0.0+build", "1.0.0-a+b",
        " 1.0.0", "1.0.0\n", "1.0.0-é", "-1.0.0", "1.0.0/..", "1.0.0-" + "a" * 200, "9999999999.0.0", None, 1.0,
        "1\u0660.0.0",  # Arabic-Indic zero: int() reads it, and 10.0.0 would have two spellings
        "1.0.0-1\u0661",
    ],
)  # fmt: skip
def test_what_is_no_version_is_refused(text: object) -> None:
    with pytest.raises(Malformed, match=r"MAJOR\.MINOR\.PATCH"):
        ids.version_key(text)


@given(st.text(max_size=20))
def test_two_texts_never_mean_the_same_version(text: str) -> None:
    try:
        major, minor, patch, tail = ids.version_key(text)
    except Malformed:
        return
    pre = ".".join(part if kind else str(number) for kind, number, part in tail if kind < 2)
    assert text == f"{major}.{minor}.{patch}" + (f"-{pre}" if pre else "")
