"""The entropy coder: what is written is read back, in any order of tables, and close to what it should cost."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_runtime.delta import DeltaError
from skerry_runtime.delta.coder import Decoder, Encoder, Meter, Table
from skerry_runtime.delta.container import Span


def source(folder: Path, data: bytes, name: str) -> Span:
    (folder / name).write_bytes(data)
    return Span(os.open(folder / name, os.O_RDONLY), 0, len(data), name)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 700)), min_size=1, max_size=8), st.integers(0, 2**32))
def test_symbols_of_several_tables_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = ((3, 256), (1, 7))
    given = [(which, rng.integers(0, shapes[which][0], n), rng.integers(0, shapes[which][1], n) % rng.integers(1, 300))
             for which, n in calls]  # fmt: skip
    encoder, tables = Encoder(), [Table(*shape) for shape in shapes]
    for which, contexts, symbols in given:
        encoder.symbols(tables[which], contexts, symbols)
    words, bits = encoder.finish()
    folder = tmp_path_factory.mktemp("coder")
    words_source = source(folder, words, "words")
    decoder, tables = Decoder(words_source, source(folder, bits, "bits")), [Table(*shape) for shape in shapes]
    for which, contexts, symbols in given:
        assert decoder.symbols(tables[which], contexts, None).tolist() == symbols.tolist()
    decoder.finish()
    words_source.finish()


def test_numbers_of_bits_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    widths = rng.integers(0, 61, 500)
    values = rng.integers(0, 2**63, 500, np.uint64) & ((np.uint64(1) << widths.astype(np.uint64)) - np.uint64(1))
    encoder = Encoder()
    encoder.bits(widths, values)
    words, bits = encoder.finish()
    assert words == b""
    assert len(bits) == -(-int(widths.sum()) // 8)
    decoder = Decoder(source(tmp_path, words, "words"), source(tmp_path, bits, "bits"))
    assert decoder.bits(widths, None).tolist() == values.tolist()


def test_a_skewed_source_costs_little_more_than_its_entropy() -> None:
    rng = np.random.default_rng(2)
    p = np.array([0.9, 0.05, 0.03, 0.02])
    symbols = rng.choice(4, 100_000, p=p)
    encoder, meter = Encoder(), Meter()
    for coder in (encoder, meter):
        table, at = Table(1, 256), 0
        while at < len(symbols):
            n = table.chunk()
            part = symbols[at : at + n]
            coder.symbols(table, np.zeros(len(part), np.int64), part)
            at += n
    size = len(encoder.finish()[0])
    entropy = -(p * np.log2(p)).sum() * len(symbols) / 8
    assert size < 1.03 * entropy + 8 * 64
    assert abs(meter.bits_taken / 8 - size) < 0.01 * size + 8 * 64


def test_words_that_end_elsewhere_than_they_began_are_refused(tmp_path: Path) -> None:
    encoder, contexts = Encoder(), np.zeros(100, np.int64)
    encoder.symbols(Table(1, 3), contexts, np.arange(100) % 3)
    words = bytearray(encoder.finish()[0])
    words[10] ^= 1
    decoder = Decoder(source(tmp_path, bytes(words), "words"), source(tmp_path, b"", "bits"))
    with pytest.raises(DeltaError):
        decoder.symbols(Table(1, 3), contexts, None)
        decoder.finish()
