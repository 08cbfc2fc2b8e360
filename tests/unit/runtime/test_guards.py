"""What a request's tensors may be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import manifest as mf
from skerry_runtime.guards import Guard, Violation


def tensor(name="x", datatype="FP32", shape=(-1, 3)):
    return mf.Tensor(name=name, datatype=datatype, shape=shape)


def feature(column, **changes):
    return mf.Feature(**{"name": f"f{column}", "input": "x", "column": column, **changes})


ALL = (feature(0), feature(1, nullable=True), feature(2, range=(-1.0, 1.0)))


def x(rows=2, dtype=np.float32):
    return np.zeros((rows, 3), dtype)


def test_what_fits_passes():
    guard = Guard([tensor()], ALL)
    assert guard.check({"x": x()}) is None
    assert guard.check({"x": np.asfortranarray(x(5))}) is None
    assert guard.check({"x": x(5)[::2]}) is None


@pytest.mark.parametrize("inputs", [[tensor()], [tensor(), tensor("y", "INT64", (2,))]], ids=["one", "two"])
@pytest.mark.parametrize(
    ("change", "field", "got", "wanted"),
    [
        ({"x": None}, "x", "no such input", "FP32 [-1, 3]"),
        ({"z": x()}, "z", "an unknown input", "one of x"),
        ({"x": x(dtype=np.float64)}, "x", "FP64", "FP32"),
        ({"x": x(dtype=">f4")}, "x", ">f4", "FP32"),
        ({"x": x()[0]}, "x", "shape [3]", "shape [-1, 3]"),
        ({"x": np.zeros((2, 4), np.float32)}, "x", "shape [2, 4]", "shape [-1, 3]"),
        ({"x": np.zeros((0, 3), np.float32)}, "x", "shape [0, 3]", "at least one element"),
        ({"x": [[0.0, 0.0, 0.0]]}, "x", "list", "an array of FP32"),
    ],
)
def test_what_does_not_fit_is_named(inputs, change, field, got, wanted):
    guard = Guard(inputs, ALL)
    given_inputs = {"x": x(), **({"y": np.zeros(2, np.int64)} if len(inputs) == 2 else {})}
    assert guard.check(given_inputs) is None
    request = {name: value for name, value in {**given_inputs, **change}.items() if value is not None}
    found = guard.check(request)
    assert found is not None
    assert (found.field, found.got) == (field, got)
    assert found.wanted.startswith(wanted)


def test_nan_is_refused_where_the_feature_is_not_nullable():
    guard = Guard([tensor()], ALL)
    for column, wrong in ((0, True), (1, False), (2, True)):
        array = x()
        array[1, column] = np.nan
        found = guard.check({"x": array})
        assert (found is not None) == wrong
        if found:
            assert found == Violation(f"x[1][{column}] (f{column})", "NaN", "a number", "null.rejected")


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=3, max_size=3))
def test_only_nan_is_null(values):
    # The quick check is a sum of squares: infinities and overflow must not look like NaN to it, nor hide one.
    guard = Guard([tensor()], [feature(0), feature(1), feature(2)])
    array = np.array([values], np.float32)
    assert (guard.check({"x": array}) is not None) == bool(np.isnan(array).any())


def test_a_watched_half_float_and_a_scalar_are_checked_too():
    guard = Guard([tensor(datatype="FP16")], [feature(0)])
    half = x(dtype=np.float16)
    assert guard.check({"x": half}) is None
    half[0, 0] = np.nan
    assert guard.check({"x": half}) is not None
    scalar = Guard([tensor(shape=())], [feature(0)])
    assert scalar.check({"x": np.array(1, np.float32)}) is None
    assert scalar.check({"x": np.array(np.nan, np.float32)}) is not None


def test_a_tensor_without_features_may_hold_nan():
    assert Guard([tensor()]).check({"x": np.full((1, 3), np.nan, np.float32)}) is None


def test_values_outside_the_range_are_counted_not_refused():
    array = np.array([[9, 0, -2], [9, 0, 0], [9, 0, 2]], np.float32)
    guard = Guard([tensor()], ALL)
    assert guard.check({"x": array}) is None
    assert guard.outside({"x": array}) == {"f2": 2}
    assert guard.outside({"x": x()}) == {}


def test_strict_ranges_refuse_them():
    guard = Guard([tensor()], ALL, strict_ranges=True)
    assert guard.check({"x": x()}) is None
    found = guard.check({"x": np.array([[0, 0, 5]], np.float32)})
    assert found == Violation("x[2] (f2)", "5.0", "-1.0 to 1.0", "outside.rejected")
    assert guard.check({"x": x(dtype=np.float64)}).got == "FP64"
