"""The one line that a new device is given."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import enrolment
from skerry_contract.errors import Malformed, UnsupportedVersion

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
SECRET = st.text([chr(c) for c in range(33, 127)], min_size=1, max_size=200)


def made(**more):
    right = {
        "server_url": "https://hall.example:8443",
        "token": "ske_x",
        "ca_sha256": "a" * 64,
        "root_sha256": "b" * 64,
    }
    return enrolment.Enrolment(**{**right, **more})


@given(
    token=SECRET, ca=HEX, root=HEX, port=st.integers(1, 65535), host=st.sampled_from(["a.example", "[::1]", "10.0.0.1"])
)
def test_what_is_built_is_read_back(token, ca, root, port, host):
    whole = made(server_url=f"https://{host}:{port}", token=token, ca_sha256=ca, root_sha256=root)
    text = enrolment.build(whole)
    assert text.startswith("skerry1.")
    assert enrolment.parse(f"  {text}\n") == whole


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused_by_name(text):
    for form in (text, enrolment.PREFIX + text):
        try:
            enrolment.parse(form)
        except (Malformed, UnsupportedVersion):
            pass


@given(st.binary(max_size=300))
def test_any_payload_is_read_or_refused_by_name(payload):
    text = enrolment.PREFIX + base64.urlsafe_b64encode(payload).rstrip(b"=").decode()
    with pytest.raises(Malformed):
        enrolment.parse(text)


def test_newer_form_is_told_apart_from_garbage():
    with pytest.raises(UnsupportedVersion):
        enrolment.parse("skerry2.abc")


@pytest.mark.parametrize(
    "url",
    [
        "http://hall.example",
        "https://",
        "https://user:pw@hall.example",
        "https://hall.example/path",
        "https://hall.example?x",
        "https://hall.example#x",
        "https://hall.example:99999",
        "https://hall example",
        "hall.example",
        "https://hall.example\\@evil.example",
        "https://hallé.example",
    ],
)
def test_only_a_plain_https_origin_is_taken(url):
    with pytest.raises(Malformed):
        enrolment.build(made(server_url=url))


def test_trailing_slash_is_dropped():
    assert enrolment.parse(enrolment.build(made(server_url="https://h/"))).server_url == "https://h"


@pytest.mark.parametrize("wrong", [{"ca_sha256": "A" * 64}, {"root_sha256": "b" * 63}, {"token": ""}, {"token": "a b"}])
def test_wrong_parts_are_refused(wrong):
    with pytest.raises(Malformed):
        enrolment.build(made(**wrong))


def test_further_keys_are_refused():
    value = {"u": "https://h", "t": "x", "ca": "a" * 64, "root": "b" * 64, "z": "1"}
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(Malformed):
        enrolment.parse(enrolment.PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode())


def test_the_secret_shows_neither_in_repr_nor_in_an_error():
    whole = made(token="very-secret")
    assert "very-secret" not in repr(whole)
    text = enrolment.build(whole)
    with pytest.raises(Malformed) as caught:
        enrolment.parse(text[:-3])
    assert "very-secret" not in str(caught.value)
