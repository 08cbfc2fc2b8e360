"""Deltas: whatever two files there are, the patch between them gives the second, and a damaged one gives nothing."""

from __future__ import annotations

import hashlib
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_runtime import delta
from skerry_runtime.delta import applying, container, making, parts
from skerry_runtime.delta.choosing import Choice
from skerry_runtime.delta.container import Coding, Packed, Role
from skerry_runtime.delta.elements import Method
from skerry_runtime.delta.packing import squeeze
from skerry_runtime.delta.parts import Part


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def apply(folder: Path, base: bytes, patch: bytes, target: bytes) -> bytes:
    (folder / "base").write_bytes(base)
    (folder / "patch").write_bytes(patch)
    delta.apply(folder / "base", folder / "patch", folder / "target", sha256=sha256(target), size=len(target))
    return (folder / "target").read_bytes()


def patch_of(base: bytes, target: bytes) -> bytes:
    return making.encode(base, target, parts.find(target)[1], parts.find(base)[1])[0]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A base and what became of it: parts moved, changed, left out and put in."""
    base = draw(st.binary(max_size=600))
    target = b""
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(base)))
        part = bytearray(base[start : start + draw(st.integers(0, 400))])
        if part and draw(st.booleans()):
            part[draw(st.integers(0, len(part) - 1))] ^= draw(st.integers(1, 255))
        target += bytes(part) + draw(st.binary(max_size=20))
    return base, target


@settings(max_examples=40, deadline=None)
@given(pairs())
def test_any_two_byte_strings_round_trip(tmp_path_factory: pytest.TempPathFactory, pair: tuple[bytes, bytes]) -> None:
    base, target = pair
    assert apply(tmp_path_factory.mktemp("delta"), base, patch_of(base, target), target) == target


def test_the_same_files_give_the_same_patch(tmp_path: Path) -> None:
    base, target = changed()
    (tmp_path / "base").write_bytes(base)
    (tmp_path / "target").write_bytes(target)
    for name in ("one", "two"):
        delta.make(tmp_path / "base", tmp_path / "target", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def changed() -> tuple[bytes, bytes]:
    rng = random.Random(5)
    base = rng.randbytes(30_000)
    return base, base[:9_000] + b"put in" + base[9_000:20_000] + rng.randbytes(300) + base[20_000:]


def test_what_is_copied_costs_next_to_nothing(tmp_path: Path) -> None:
    base, target = changed()
    patch = patch_of(base, target)
    assert len(patch) < 450
    assert apply(tmp_path, base, patch, target) == target


@pytest.mark.parametrize("start", range(0, 460, 20))
def test_a_damaged_patch_gives_no_file_and_no_other_error(tmp_path: Path, start: int) -> None:
    base, target = changed()
    whole = patch_of(base, target)
    for place in range(start, min(start + 20, len(whole))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(delta.DeltaError):
            apply(tmp_path, base, bytes(damaged), target)
        with pytest.raises(delta.DeltaError):
            apply(tmp_path, base, whole[:place], target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "patch"]


def test_a_patch_for_another_base_or_another_target_is_refused(tmp_path: Path) -> None:
    base, target = changed()
    patch = patch_of(base, target)
    with pytest.raises(delta.DeltaError, match="another base: its digest"):
        apply(tmp_path, base[::-1], patch, target)
    with pytest.raises(delta.DeltaError, match="another base: its size"):
        apply(tmp_path, base + b"x", patch, target)
    with pytest.raises(delta.DeltaError, match="bytes, not the"):
        apply(tmp_path, base, patch, target + b"x")
    with pytest.raises(delta.DeltaError, match="not the file that was signed"):
        apply(tmp_path, base, patch, target[::-1])
    with pytest.raises(delta.DeltaError, match="format this version does not know"):
        apply(tmp_path, base, b"SKDELTA2" + patch[8:], target)
    with pytest.raises(delta.DeltaError, match="no patch"):
        apply(tmp_path, base, b"x" * 500, target)


def test_an_older_target_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    base, target = changed()
    (tmp_path / "target").write_bytes(b"before")
    with pytest.raises(delta.DeltaError):
        apply(tmp_path, base, patch_of(base, target)[:-1], target)
    assert (tmp_path / "target").read_bytes() == b"before"
    # What a power cut left of an attempt.
    (tmp_path / ".target.patching").write_bytes(b"x" * 100_000)
    assert apply(tmp_path, base, patch_of(base, target), target) == target
    assert not (tmp_path / ".target.patching").exists()


def test_a_link_where_the_temporary_file_goes_is_not_followed(tmp_path: Path) -> None:
    base, target = changed()
    (tmp_path / "precious").write_bytes(b"precious")
    os.symlink(tmp_path / "precious", tmp_path / ".target.patching")
    with pytest.raises(OSError, match="symbolic link"):
        apply(tmp_path, base, patch_of(base, target), target)
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_steps_are_bounded_by_the_target() -> None:
    assert applying.steps_most(0) == 64
    assert applying.steps_most(1 << 20) == 64 + (1 << 16)
    assert applying.element_steps_most(1 << 20) == 256 + 2048


@pytest.mark.parametrize("what", ["steps", "steps of elements"])
def test_a_patch_of_too_many_small_steps_is_refused(tmp_path: Path, what: str) -> None:
    plan, size = making.Plan(), 1600
    one = Part(name="", start=0, size=1, width=1, floats=False)
    for i in range(size):
        if what == "steps":
            plan.literal(bytes([i % 7]))
        else:
            plan.elements(one, Choice(method=Method.INTEGERS_ALONE), np.array([i % 7], np.uint64), None, 0)
    patch = container.write(hashlib.sha256(b"").digest(), 0, size, plan.streams())
    with pytest.raises(delta.DeltaError, match="too many steps"):
        apply(tmp_path, b"", patch, bytes(i % 7 for i in range(size)))


@pytest.mark.parametrize(("base", "target"), [(b"", b""), (b"", b"x"), (b"x", b""), (b"x" * 40, b"x" * 40)])
def test_the_smallest_files_have_patches(tmp_path: Path, base: bytes, target: bytes) -> None:
    assert apply(tmp_path, base, patch_of(base, target), target) == target


def test_dictionaries_beyond_what_a_device_gives_are_refused(tmp_path: Path) -> None:
    large = bytes([container.lzma_properties(3, 0, 0, 22)[0], 22])
    packed = squeeze(b"x" * 100, 3, 0, 0, 22)
    streams = [
        Packed(role=role, coding=Coding.LZMA, size_bytes=100, data=packed, properties=large) for role in list(Role)[:2]
    ]
    patch = container.write(hashlib.sha256(b"").digest(), 0, 100, streams)
    with pytest.raises(delta.DeltaError, match="more memory"):
        apply(tmp_path, b"", patch, b"x" * 100)


def test_what_unpacks_to_more_than_it_says_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    packed = squeeze(b"\0" * (8 << 20), 0, 0, 0, 16)
    plan = making.Plan()
    plan.literal(b"\0" * 100)
    control, _, *_ = plan.streams()
    bomb = Packed(
        role=Role.LITERALS,
        coding=Coding.LZMA,
        size_bytes=100,
        data=packed,
        properties=container.lzma_properties(0, 0, 0, 16),
    )
    patch = container.write(hashlib.sha256(b"").digest(), 0, 100, [control, bomb])
    tracemalloc.start()
    try:
        with pytest.raises(delta.DeltaError, match="longer than what is used"):
            apply(tmp_path, b"", patch, b"\0" * 100)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
