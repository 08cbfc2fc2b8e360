"""Every method for the elements of a tensor gives them back to the bit, whatever they are."""

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
from skerry_runtime.delta import container, low_rank
from skerry_runtime.delta.choosing import Choice, Chooser, scalings
from skerry_runtime.delta.elements import (
    FLOATS,
    OF_FLOATS,
    ONE_WIDTH,
    PRODUCTS,
    WIDTHS,
    Method,
    Scaling,
    Sizes,
    from_planes,
    ordered,
    planes,
    to_bytes,
    to_integers,
    unordered,
    unzigzag,
    zigzag,
)
from skerry_runtime.delta.making import Plan
from skerry_runtime.delta.parts import Part

CASES = [
    (method, width)
    for method in Method
    for width in WIDTHS
    if not (method in OF_FLOATS and width not in FLOATS) and width == ONE_WIDTH.get(method, width)
]


def choice_of(method: Method, part: Part, base: np.ndarray, target: np.ndarray) -> Choice:
    rows = part.shape[0]
    if method == Method.RESCALED:
        return Choice(method=method, scaling=list(scalings(part, target, base))[-1])
    if method == Method.FLOAT_DIFFERENCE_SCALED:
        return Choice(method=method, sizes=Sizes.fitted(base, target, part.width, rows))
    if method in PRODUCTS:
        rng = np.random.default_rng(0)
        left, right = rng.integers(-99, 99, (rows, 3)), rng.integers(-99, 99, (3, len(base) // rows))
        product = low_rank.LowRank(left=left.astype(float), right=right.astype(float), exponent=-20)
        return Choice(method=method, sizes=Sizes.fitted(base, target, 4, rows), product=product)
    return Choice(method=method, low=3)


def patch_of(part: Part, choice: Choice, base: np.ndarray, target: np.ndarray, whole: bytes) -> bytes:
    plan = Plan()
    plan.elements(part, choice, target, base, 0)
    return container.write(hashlib.sha256(whole).digest(), len(whole), part.size, plan.streams())


def applied(folder: Path, base: bytes, patch: bytes, target: bytes) -> bytes:
    (folder / "base").write_bytes(base)
    (folder / "patch").write_bytes(patch)
    digest = hashlib.sha256(target).hexdigest()
    delta.apply(folder / "base", folder / "patch", folder / "target", sha256=digest, size=len(target))
    return (folder / "target").read_bytes()


@pytest.mark.parametrize("tag", [0, 0x3D])
@pytest.mark.parametrize(("method", "width"), CASES)
def test_a_method_gives_back_any_bits(tmp_path: Path, method: Method, width: int, tag: int) -> None:
    rng = np.random.default_rng(width)
    rows, columns = 30, 57
    n = rows * columns
    # Half of them close to the base, half anything: infinities, what is no number, and both zeros among them.
    base = rng.integers(0, 1 << (8 * width - 1), n, np.uint64) * np.uint64(2) + rng.integers(0, 2, n, np.uint64)
    near = (base + rng.integers(0, 9, n, np.uint64)) & np.uint64((1 << 8 * width) - 1)
    target = np.where(rng.random(n) < 0.5, near, rng.permutation(base))
    part = Part(
        name="w", start=0, size=n * (width + (tag != 0)), width=width, floats=True, shape=(rows, columns), tag=tag
    )

    def laid(values: np.ndarray) -> bytes:
        lines = np.frombuffer(to_bytes(values, width), np.uint8).reshape(n, width)
        return np.concatenate([np.full((n, int(tag != 0)), tag, np.uint8), lines], axis=1).tobytes()

    patch = patch_of(part, choice_of(method, part, base, target), base, target, laid(base))
    assert applied(tmp_path, laid(base), patch, laid(target)) == laid(target)


@pytest.mark.parametrize("width", WIDTHS)
@given(data=st.data())
def test_orders_and_signs_are_undone(width: int, data: st.DataObject) -> None:
    numbers = st.lists(st.integers(0, (1 << 8 * width) - 1), min_size=1, max_size=50)
    values = np.array(data.draw(numbers), np.uint64)
    mask = np.uint64((1 << 8 * width) - 1)
    assert (unordered(ordered(values, width), width) == values).all()
    assert (unzigzag(zigzag(values, width)) & mask == values).all()
    assert (from_planes(planes(values, width), width) == values).all()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CASES), st.integers(0, 2**32), st.integers(1, 3))
def test_a_damaged_patch_of_elements_gives_no_file_and_no_other_error(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Method, int], seed: int, damages: int
) -> None:
    method, width = case
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 1 << (8 * width - 1), 400, np.uint64)
    target = (base + rng.integers(0, 99, 400, np.uint64)) & np.uint64((1 << 8 * width) - 1)
    part = Part(name="w", start=0, size=400 * width, width=width, floats=True, shape=(20, 20))
    patch = bytearray(patch_of(part, choice_of(method, part, base, target), base, target, to_bytes(base, width)))
    whole = bytes(patch)
    # Half of the damages where the steps are.
    for _ in range(damages):
        patch[int(rng.integers(40, 100 if rng.random() < 0.5 else len(patch))) % len(patch)] ^= int(
            rng.integers(1, 256)
        )
    folder = tmp_path_factory.mktemp("delta")
    if bytes(patch) != whole:
        try:
            assert applied(folder, to_bytes(base, width), bytes(patch), to_bytes(target, width)) == to_bytes(
                target, width
            )
        except delta.DeltaError:
            assert sorted(os.listdir(folder)) == ["base", "patch"]


def float_part(values: np.ndarray) -> Part:
    return Part(name="w", start=0, size=values.nbytes, width=4, floats=True, shape=values.shape)


def cheapest(base: np.ndarray, target: np.ndarray) -> Choice:
    return Chooser().best(float_part(target), to_integers(target.tobytes(), 4), to_integers(base.tobytes(), 4))


def test_a_merged_adapter_is_its_two_matrices() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 0.05, (256, 256)).astype(np.float32)
    adapter = rng.normal(0, 0.01, (256, 4)) @ rng.normal(0, 0.1, (4, 256))
    choice = cheapest(base, (base + adapter).astype(np.float32))
    assert choice.method in PRODUCTS
    assert choice.product is not None
    assert choice.product.left.shape == (256, 4)
    # By far fewer bytes than the same noise without a structure takes.
    noise = rng.permutation(adapter.ravel()).reshape(adapter.shape)
    other = cheapest(base, (base + noise).astype(np.float32))
    assert choice.cost_bytes < 0.75 * other.cost_bytes


def test_a_product_leans_to_where_less_is_left_beside_it() -> None:
    rng = np.random.default_rng(8)
    base = rng.normal(0, 0.05, (256, 256)).astype(np.float32)
    learnt = rng.normal(0, 1e-4, (256, 16)) @ rng.normal(0, 1, (16, 256))
    # Some rows moved by much that no product says, some by little.
    noise = rng.normal(0, 1e-4, base.shape) * (4.0 ** (np.arange(256) % 3 - 1))[:, None]
    target = (base + learnt + noise).astype(np.float32)
    part, old, new = float_part(target), to_integers(base.tobytes(), 4), to_integers(target.tobytes(), 4)
    tried = {choice.method: choice for choice in Chooser().tried(part, new, old)}
    leaning = tried[Method.LOW_RANK_LEANING]
    assert leaning.sizes is not None
    assert low_rank.leanings(leaning.sizes.rows).tolist() == [i % 3 - 1 for i in range(256)]
    assert leaning.cost_bytes < 0.99 * tried[Method.LOW_RANK].cost_bytes


def test_small_noise_on_floats_costs_what_it_holds() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(0, 0.05, 100_000).astype(np.float32)
    target = base + rng.normal(0, 1e-4, base.shape).astype(np.float32)
    choice = cheapest(base, target)
    assert choice.method == Method.FLOAT_DIFFERENCE
    # Entropy of the noise in units of the last place of each float, and no more than a fiftieth above it.
    places = np.spacing(np.abs(base).astype(np.float64).astype(np.float32)).astype(np.float64)
    entropy = np.log2(1e-4 / places * np.sqrt(2 * np.pi * np.e)).mean() * len(base) / 8
    assert 0.97 * entropy < choice.cost_bytes < 1.02 * entropy


def test_rescaled_weights_are_predicted_by_the_ratio_of_scales_of_each_channel() -> None:
    rng = np.random.default_rng(5)
    weights = rng.normal(0, 1, (64, 500))
    old, new = rng.uniform(0.04, 0.08, (2, 64, 1))
    base = np.clip(np.rint(weights / old), -128, 127).astype(np.int8)
    target = np.clip(np.rint(weights / new), -128, 127).astype(np.int8)
    part = Part(name="w", start=0, size=base.size, width=1, floats=False, shape=base.shape)
    choice = Chooser().best(part, to_integers(target.tobytes(), 1), to_integers(base.tobytes(), 1))
    assert choice.method == Method.RESCALED
    assert choice.scaling is not None
    # To a hundredth of the ratio of scales, from the rounded weights alone.
    assert np.abs(choice.scaling.ratios / 65536 / (old / new).ravel() - 1).max() < 0.01
    others = Chooser().tried(part, to_integers(target.tobytes(), 1), to_integers(base.tobytes(), 1))
    assert choice.cost_bytes < 0.65 * min(other.cost_bytes for other in others if other.method != Method.RESCALED)


def test_a_prediction_of_int8_stays_within_int8(tmp_path: Path) -> None:
    base = np.arange(256, dtype=np.uint64)
    target = base[::-1].copy()
    part = Part(name="w", start=0, size=256, width=1, floats=False, shape=(2, 128))
    scaling = Scaling(ratios=np.array([64 << 16, -(64 << 16)]), inner=128, offset=-255)
    patch = patch_of(part, Choice(method=Method.RESCALED, scaling=scaling), base, target, to_bytes(base, 1))
    assert applied(tmp_path, to_bytes(base, 1), patch, to_bytes(target, 1)) == to_bytes(target, 1)


def test_applying_keeps_little_of_a_large_tensor_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(0, 0.05, (1024, 512)).astype(np.float32)
    target = base + rng.normal(0, 1e-4, base.shape).astype(np.float32)
    (tmp_path / "base").write_bytes(base.tobytes())
    part = float_part(target)
    old, new = to_integers(base.tobytes(), 4), to_integers(target.tobytes(), 4)
    choices = [choice_of(method, part, old, new) for method in (*PRODUCTS, Method.BYTE_PLANES_XOR)]
    patches = [patch_of(part, choice, old, new, base.tobytes()) for choice in choices]
    digest = hashlib.sha256(target.tobytes()).hexdigest()
    del old, new
    for patch in patches:
        (tmp_path / "patch").write_bytes(patch)
        tracemalloc.start()
        try:
            delta.apply(tmp_path / "base", tmp_path / "patch", tmp_path / "target", sha256=digest, size=target.nbytes)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # The tensor has 2 MB; 8 MB beside it are allowed.
        assert peak < 4 << 20
