"""Which content coding a request accepts."""

from __future__ import annotations

import gzip

import pytest
from skerry_agent.worker import coding, http1


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (b"", b""), (b"identity", b""), (b"br", b""), (b"gzip", b"gzip"), (b"GZIP", b"gzip"), (b"deflate", b"deflate"),
        (b"deflate, gzip", b"gzip"), (b"gzip, deflate, br, zstd", b"gzip"), (b"gzip;q=0.5, deflate;q=0.6", b"deflate"),
        (b"gzip;q=0", b""), (b"gzip;q=0, *", b"deflate"), (b"*", b"gzip"), (b"*;q=0", b""), (b"gzip ; q=0.5", b"gzip"),
        (b"identity, gzip;q=0.5", b""), (b"identity;q=0.2, gzip;q=0.5", b"gzip"), (b"gzip;q=x", b""), (b"gzip;q=nan", b""),
        (b"gzip;q=7", b""), (b",,;;=", b""),
    ],
)  # fmt: skip
def test_the_coding_with_the_greatest_weight_is_taken(value: bytes, wanted: bytes) -> None:
    assert coding.accepted(value) == wanted
    block = b"GET / HTTP/1.1\r\nHost: a\r\nAccept-Encoding: " + value + b"\r\n\r\n"
    assert http1.parse_head(block).accepts == wanted


def test_only_length_and_coding_of_a_packed_reply_differ() -> None:
    body = b"Content-Length: 7 " * 1000
    reply = http1.reply(200, body, extra=b"Skerry-Prediction-Id: a\r\n", close=True)
    head, _, packed = coding.packed(reply, b"gzip").partition(b"\r\n\r\n")
    assert gzip.decompress(packed) == body
    assert head == (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nContent-Encoding: gzip\r\n"
        b"Skerry-Prediction-Id: a\r\nConnection: close" % len(packed)
    )
