"""What of a log is sent: whole lines, the newest, as many as fit."""

from __future__ import annotations

import gzip
import random

import pytest
from skerry_agent.courier.logs import MOST_BYTES, MOST_TEXT_BYTES, fitting


@pytest.mark.parametrize("noise", [False, True])
def test_too_much_is_cut_to_the_newest_whole_lines_that_fit(noise: bool) -> None:
    draw = random.Random(3)
    lines = [b"%d %s\n" % (n, draw.randbytes(400).hex().encode() if noise else b"x" * 800) for n in range(4000)]
    packed, sent = fitting(b"".join(lines))
    text = gzip.decompress(packed)
    assert len(text) == sent
    assert len(packed) <= MOST_BYTES
    assert sent <= MOST_TEXT_BYTES
    kept = text.splitlines(keepends=True)
    assert kept == lines[-len(kept) :]
    enough = MOST_BYTES if noise else MOST_TEXT_BYTES
    assert (len(packed) if noise else sent) > enough * 0.8, "not far less than would fit"


@pytest.mark.parametrize("text", [b"", b"one\n", b"\xff\x00 no text\n", b"a line without an end"])
def test_little_is_sent_as_it_is(text: bytes) -> None:
    assert gzip.decompress(fitting(text)[0]) == text


def test_one_line_that_is_too_long_leaves_nothing_and_ends() -> None:
    packed, sent = fitting(random.Random(1).randbytes(400_000).hex().encode())
    assert (gzip.decompress(packed), sent) == (b"", 0)
