"""The enrolment token carries the operator's trust, and nothing that is not one passes for it."""

from __future__ import annotations

import base64
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import canonical, enrolment
from skerry_contract.errors import ContractError, Malformed, UnsupportedVersion

from tests.golden import values as golden

GOOD = golden.TOKEN
FIELDS = {"u": GOOD.server_url, "t": GOOD.token, "ca": GOOD.ca_sha256, "root": GOOD.root_sha256}


def token(**fields: object) -> str:
    value = {name: part for name, part in (FIELDS | fields).items() if part is not None}
    return enrolment.PREFIX + base64.urlsafe_b64encode(canonical.encode(value)).rstrip(b"=").decode()


def test_a_token_is_read_back_with_white_space_around_it() -> None:
    assert enrolment.parse(f"\n {enrolment.build(GOOD)} \n") == GOOD


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "completed token"),
        ("only-the-servers-part", "completed token"),
        (token().removeprefix("skerry1."), "completed token"),
        (enrolment.PREFIX, "base64url"),
        (enrolment.PREFIX + "a b", "base64url"),
        (enrolment.PREFIX + "é", "base64url"),
        (token() + "=", "base64url"),
        (token()[:-3], "enrolment token"),
        (token(x=1), "texts"),
        (token(root=None), "texts"),
        (token(t=5), "texts"),
        (token(t=""), r"\$\.t"),
        (token(t="a b"), r"\$\.t"),
        (token(t="a\nb"), r"\$\.t"),
        (token(ca="9A" * 32), "ca"),
        (token(root="bc"), "root"),
        (token(u="http://fleet.example.org"), "server url"),
        (token(u="https://user:pw@fleet.example.org"), "server url"),
        (token(u="https://fleet.example.org/path"), "server url"),
        (token(u="https://fleet.example.org?x"), "server url"),
        (token(u="https://fleet.example.org:99999"), "server url"),
        (token(u="https://"), "server url"),
        (token(u="file:///etc/passwd"), "server url"),
        ("x" * 5000, "at most 4096"),
    ],
)
def test_what_is_no_completed_token_is_refused(text: str, named: str) -> None:
    with pytest.raises(Malformed, match=named):
        enrolment.parse(text)


def test_a_token_of_a_newer_form_is_told_from_a_broken_one() -> None:
    with pytest.raises(UnsupportedVersion):
        enrolment.parse("skerry2.abc")


def test_the_secret_shows_neither_in_the_value_nor_in_a_refusal() -> None:
    assert GOOD.token not in repr(GOOD)
    for bad in (token(ca="x"), token(root="x"), token(u="http://x"), token(x=1)):
        with pytest.raises(Malformed) as caught:
            enrolment.parse(bad)
        assert GOOD.token not in str(caught.value)


def test_what_a_reader_refuses_is_not_built() -> None:
    with pytest.raises(Malformed):
        enrolment.build(dataclasses.replace(GOOD, ca_sha256="x"))


@given(st.text(max_size=60) | st.text(max_size=60).map(enrolment.PREFIX.__add__))
def test_no_text_raises_anything_but_a_contract_error(text: str) -> None:
    with pytest.raises(ContractError):
        enrolment.parse(text)
