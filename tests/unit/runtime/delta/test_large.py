"""Deltas of files that are too large to sort every place of: by blocks, and by elements where they are nothing but weights."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_runtime import delta
from skerry_runtime.delta import making, parts, weights
from skerry_runtime.delta.blocks import Blocks
from skerry_runtime.delta.matching import Matches


@pytest.fixture(autouse=True)
def all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skerry_runtime.delta.making._SORTED_MOST", 0)


def patch_of(folder: Path, base: bytes, target: bytes) -> int:
    """Bytes of the patch, which was applied."""
    (folder / "base").write_bytes(base)
    (folder / "patch").write_bytes(making.encode(base, target, parts.find(target)[1], parts.find(base)[1])[0])
    sha256 = hashlib.sha256(target).hexdigest()
    delta.apply(folder / "base", folder / "patch", folder / "target", sha256=sha256, size=len(target))
    return (folder / "patch").stat().st_size


def test_what_moved_was_changed_and_was_put_in_costs_what_is_new(tmp_path: Path) -> None:
    base = os.urandom(60_000)
    changed = bytearray(base)
    for at in range(1000, len(base), 3000):
        changed[at] ^= 1
    target = bytes(changed[30_000:]) + os.urandom(500) + bytes(changed[:30_000])
    assert patch_of(tmp_path, base, target) < 500 + 1000


def test_lists_that_grow_cost_what_grew(tmp_path: Path) -> None:
    """As an ensemble of trees lies in ONNX: list after list, each a little longer than before."""
    lists = [[os.urandom(300) for _ in range(105)] for _ in range(6)]
    base, target = (b"".join(one for entries in lists for one in entries[:count]) for count in (100, 105))
    assert patch_of(tmp_path, base, target) < 6 * 5 * 300 + 600


def test_what_repeats_without_end_is_looked_up_in_bounded_memory() -> None:
    base = bytes(60_000) + os.urandom(1000) + b"abc" * 20_000
    found = Blocks(np.frombuffer(base, np.uint8), np.frombuffer(base, np.uint8), [(0, len(base))])
    told = list(found.within(0, len(base)))
    assert [(one.at, one.base) for one in told] == [(0, 0)]
    assert len(found._at) < len(base) / 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30))
def test_what_it_finds_stands_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 3 if seed % 2 else 256, int(rng.integers(0, 4000)), np.uint8)
    cuts = [sorted(rng.integers(0, len(base) + 1, 2).tolist()) for _ in range(4)]
    target = np.concatenate([base[a:b] for a, b in cuts] + [rng.integers(0, 256, 50).astype(np.uint8)])
    end = 0
    for one in Blocks(base, target, [(0, len(target))]).within(0, len(target)):
        assert one.at >= end and one.base >= 0 and one.base + one.size <= len(base)
        end = one.at + one.size
        assert np.mean(base[one.base : one.base + one.size] == target[one.at : end]) > 0.5
    assert end <= len(target)


def test_a_block_is_found_wherever_it_went() -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(0, 128, 5000).astype(np.uint8)
    for start in range(64):
        # What lies around it stands nowhere in the base.
        other = rng.integers(128, 256, 37).astype(np.uint8)
        target = np.concatenate([other, base[start : start + 24], other])
        (found,) = Blocks(base, target, [(0, len(target))]).within(0, len(target))
        assert (found.at, found.base, found.size) == (37, start, 24)


def test_few_bytes_of_memory_are_taken_for_each_place() -> None:
    base = np.frombuffer(os.urandom(1 << 20), np.uint8)
    tracemalloc.start()
    try:
        Blocks(base, base, [(0, len(base))])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Sorting takes 160.
    assert peak < 24 * 2 * len(base)


def test_of_a_base_that_is_larger_than_its_blocks_no_hash_of_every_place_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("skerry_runtime.delta.blocks._STEPS_MOST", 1 << 12)
    monkeypatch.setattr("skerry_runtime.delta.blocks._ASKED", 1 << 14)
    base = np.frombuffer(os.urandom(1 << 22), np.uint8)
    tracemalloc.start()
    try:
        Blocks(base, base[:0], [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(base)


def moved(kind: str) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(5)
    old = rng.normal(size=33_000) * (30 if kind == "int8" else 0.05)
    new = old + rng.normal(size=len(old)) * (0.4 if kind == "int8" else 2e-4)
    if kind == "int8":
        old, new = np.round(old.clip(-127, 127)), np.round(new.clip(-127, 127))
    if kind == "bfloat16":
        old, new = (one.astype("float32").view("uint32") >> 16 for one in (old, new))
        kind = "uint16"
    return old.astype(kind).tobytes(), new.astype(kind).tobytes()


@pytest.mark.parametrize(("kind", "most"), [("float32", 0.7), ("float16", 0.5), ("bfloat16", 0.3), ("int8", 0.3)])
def test_weights_beside_their_graph_are_given_by_differences(tmp_path: Path, kind: str, most: float) -> None:
    old, new = moved(kind)
    if kind == "int8":
        old, new = old * 2, new * 2
    assert patch_of(tmp_path, old, new) < most * len(new)
    if kind != "int8":
        # One element longer: nobody can say any more what stood where.
        assert weights.segments(*(np.frombuffer(data, np.uint8) for data in (old, new + new[:4]))) == []


def test_weights_of_which_few_moved_are_copied_but_for_those(tmp_path: Path) -> None:
    old, new = moved("float32")
    assert patch_of(tmp_path, old, old[: -(1 << 14)] + new[-(1 << 14) :]) < 1 << 15


@pytest.mark.parametrize("what", ["noise", "text", "program"])
def test_what_is_no_weights_is_not_taken_for_them(what: str) -> None:
    data = {
        "noise": os.urandom(100_000),
        "text": b"the quick brown fox jumps over the lazy dog\n" * 3000,
        "program": Path("/proc/self/exe").read_bytes()[:200_000],
    }[what]
    other = bytearray(data)
    other[::7] = bytes(len(other[::7]))
    assert weights.segments(np.frombuffer(data, np.uint8), np.frombuffer(bytes(other), np.uint8)) == []


def test_sorting_is_left_where_it_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skerry_runtime.delta.making._SORTED_MOST", 100)
    data = np.zeros(50, np.uint8)
    assert type(making._matches(data, data, [(0, 50)], [(0, 50)])) is Matches
    assert type(making._matches(data, data, [(0, 50)], [(0, 51)])) is Blocks
