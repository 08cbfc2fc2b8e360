"""What is judged of a body before anything of it is decoded."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
from skerry_agent.worker import http1, intake, oip
from skerry_contract import manifest as mf
from skerry_runtime.errors import BadInput

ROWS = mf.Tensor(name="x", datatype="FP32", shape=(-1, 4))
TEXT = mf.Tensor(name="t", datatype="BYTES", shape=(-1, 3))
FREE = mf.Tensor(name="f", datatype="FP32", shape=(1, -1))


def takes(*tensors: mf.Tensor) -> intake.Takes:
    return intake.Takes(tensors, 2048)


def body(data: str, shape: object, *, name: str = "x", datatype: str = "FP32", more: str = "") -> bytes:
    tensor = f'{{"name":"{name}","datatype":"{datatype}","shape":{json.dumps(shape)},"data":{data}}}'
    return f'{{"inputs":[{tensor}]{more}}}'.encode()


def test_a_body_may_be_as_long_as_the_models_inputs_can_need() -> None:
    assert takes(ROWS).body_bytes == (4 << 20) + 2048 * 4 * 128
    assert takes(ROWS, TEXT).body_bytes == takes(FREE).body_bytes == 64 << 20
    rows = [[0.12345678901234567] * 4] * 2048
    assert len(json.dumps({"inputs": [{"name": "x", "data": rows}]}, indent=8)) < takes(ROWS).body_bytes


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (body("[" + "[0.1]," * 300_000 + "[0.1]]", [300_001, 1]), "x: wanted at most 2048 in one request, got 300001 rows"),
        (body("[1]", [1, 1 << 30]), "x: wanted at most 8192 in one request, got 1073741824 values"),
        (body("[" + "[]," * 300_000 + "[]]", [1, 4]), "x.data: wanted 4, as its shape says, got more elements"),
        (body("[" + ("[" * 100 + "]" * 100 + ",") * 1000 + "1]", [1, 4]), "x.data: wanted 4, as its shape says, got more elements"),
        (body("[" + "NaN," * 300_000 + "NaN]", [1, 4]), "x.data: wanted 4, as its shape says, got more elements"),
        (body("[1]", [-1, 4]), "x.shape: wanted at most 16 whole sizes >= 0, got [-1, 4]"),
        (body("[1]", [1] * 1000), "x.shape: wanted"),
        (body("[1,2,3,4]", [1, 4], more=',"parameters":{"a":[' + "[]," * 50_000 + "[]]}"), "parameters: wanted at most"),
        (body("[" + "1," * 50_000 + "1]", [50_001], name="other"), "other: wanted at most 2048 in one request, got 50001 rows"),
        (body("[" + "1," * 50_000 + "1]", [1, 4], name="other"), "other: wanted"),
        (body("[1", [1, 4]), "request: wanted JSON"),
    ],
)  # fmt: skip
def test_more_than_a_model_takes_is_refused_and_never_decoded(
    sent: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("values were decoded")

    monkeypatch.setattr(oip.tensors, "from_json", never)
    monkeypatch.setattr(oip.tensors, "from_binary", never)
    with pytest.raises(BadInput) as caught:
        oip.parse_request(sent, -1, takes(ROWS))
    assert str(caught.value).startswith(words)


def test_strings_are_counted_by_their_quotes_and_may_hold_whatever_json_is_made_of() -> None:
    kind = takes(TEXT)
    odd = ['a,[b],"c"', "\\", '\\"', "[[[[,,,,", "", "\n,"] * 1023
    found = oip.parse_request(body(json.dumps(odd), [2046, 3], name="t", datatype="BYTES"), -1, kind).inputs["t"]
    assert found.ravel().tolist() == odd
    for many in (["ab"] * 200_000, ["\\"] * 200_000, [[]] * 100_000, [1] * 200_000):
        with pytest.raises(BadInput, match="got more elements"):
            oip.parse_request(body(json.dumps(many), [1, 3], name="t", datatype="BYTES"), -1, kind)
    raw = b"\0\0\0\0" * 1_000_000
    head = json.dumps(
        {"inputs": [{"name": "t", "datatype": "BYTES", "shape": [1, 3], "parameters": {"binary_data_size": len(raw)}}]}
    ).encode()
    with pytest.raises(BadInput, match="more than 3 elements"):
        oip.parse_request(head + raw, len(head), kind)


def test_what_a_model_takes_is_read_whatever_way_it_is_written() -> None:
    rows = [[i * 0.1, -1e-3, 1e6, None] for i in range(2048)]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), json.dumps([v for row in rows for v in row])):
        for said in (text, text.replace("null", "NaN")):
            found = oip.parse_request(body(said, [2048, 4]), -1, takes(ROWS)).inputs["x"]
            assert found.shape == (2048, 4)
    free = oip.parse_request(body("[" + "0.5," * 499_999 + "0.5]", [1, 500_000], name="f"), -1, takes(FREE)).inputs["f"]
    assert free.sum() == 250_000


def packed(data: bytes, encoding: bytes) -> http1.Request:
    head = http1.Head(method="POST", path=b"/", keep_alive=True, encoding=encoding)
    return http1.Request(head, data, len(data))


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_a_body_is_inflated_no_further_than_it_may_be_long(encoding: bytes) -> None:
    pack = gzip.compress if encoding == b"gzip" else zlib.compress
    request = packed(pack(b"x" * 100_000), encoding)
    found = intake.plain(request, 100_000)
    assert (found.body, found.head.encoding, found.size) == (b"x" * 100_000, b"", request.size)
    with pytest.raises(http1.Refused) as caught:
        intake.plain(request, 99_999)
    assert caught.value.status == 413
    for wrong in (request.body[:-1], request.body[:20], b"none", b""):
        with pytest.raises(http1.Refused) as caught:
            intake.plain(packed(wrong, encoding), 100_000)
        assert caught.value.status == 400
    assert intake.small(request) is None
    few = intake.small(packed(pack(b"x" * intake.SMALL), encoding))
    assert few is not None
    assert len(few.body) == intake.SMALL
