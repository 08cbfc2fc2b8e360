"""What policies make of strange values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import manifest as mf
from skerry_contract.window import GUARD_KINDS
from skerry_runtime.errors import BadInput, Rejected
from skerry_runtime.guards import Guard
from skerry_runtime.policies import KIND, NO_AGES, Ages, Policies


def feature(column=0, **changes):
    return mf.Feature(**{"name": f"f{column}", "input": "x", "column": column, **changes})


def policies(*features, datatype="FP32", shape=(-1, 3)):
    inputs = (mf.Tensor(name="x", datatype=datatype, shape=shape),)
    return Policies(inputs, features, Guard(inputs, features).check)


def judge(array, *features, ages=NO_AGES, **tensor):
    return policies(*features, **tensor).judge({"x": np.asarray(array)}, ages)


def f32(*rows):
    return np.array(rows, np.float32)


def kinds(judged):
    return {name for name in GUARD_KINDS if judged.kinds & KIND[name]}


NAN = float("nan")
RANGE = {"range": (-1.0, 1.0)}


def test_what_is_well_passes_as_it_is():
    array = f32([0, 0, 0], [1, -1, 0])
    judged = judge(array, feature(0, on_null="impute", impute=0.5), feature(1, **RANGE, on_outside="reject"))
    assert judged.inputs["x"] is array
    assert (judged.kinds, judged.fallback) == (0, None)


def test_a_null_is_imputed_where_it_stands_and_what_was_sent_stays():
    array = f32([NAN, 1, NAN], [2, NAN, 3])
    array.flags.writeable = False
    judged = judge(array, feature(0, on_null="impute", impute=0.5), feature(1, on_null="impute", impute=-1.0))
    np.testing.assert_array_equal(judged.inputs["x"], f32([0.5, 1, NAN], [2, -1, 3]))
    assert np.isnan(array[0, 0])
    assert kinds(judged) == {"null.imputed"}


@pytest.mark.parametrize(("wrong", "shown"), [(1.5, "1.5"), (-2.0, "-2.0"), (float("inf"), "inf")])
def test_a_value_outside_its_range_does_what_the_policy_says(wrong, shown):
    array = f32([0, 0, 0], [0, wrong, 0])
    with pytest.raises(BadInput) as refused:
        judge(array, feature(1, **RANGE, on_outside="reject"))
    assert str(refused.value) == f"x[1][1] (f1): wanted -1 to 1, got {shown}"
    assert refused.value.violation.kind == "outside.rejected"
    imputed = judge(array, feature(1, **RANGE, on_outside="impute", impute=0.25))
    assert imputed.inputs["x"][1, 1] == 0.25
    assert kinds(imputed) == {"outside.imputed"}
    fallback = judge(array, feature(1, **RANGE, on_outside="fallback"))
    assert fallback.fallback.field == "x[1][1] (f1)"
    assert kinds(fallback) == {"outside.fallback"}
    assert judge(array, feature(1, **RANGE, on_outside="count")) == ({"x": array}, 0, None)


def test_a_null_is_outside_of_no_range():
    judged = judge(f32([0, NAN, 0]), feature(1, **RANGE, nullable=True, on_outside="reject"))
    assert kinds(judged) == set()


@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize(("policy", "refused"), [("reject", True), ("count", False), ("", None)])
def test_a_policy_on_nulls_beats_nullable(policy, refused, nullable):
    rules = policies(feature(0, nullable=nullable, on_null=policy), feature(1, **RANGE, on_outside="reject"))
    array = f32([NAN, 0, 0])
    if refused or (refused is None and not nullable):
        with pytest.raises(BadInput, match=r"x\[0\]\[0\] \(f0\)") as found:
            rules.judge({"x": array})
        assert found.value.violation.kind == "null.rejected"
    else:
        assert rules.judge({"x": array}).inputs["x"] is array


def test_reject_beats_fallback_and_fallback_beats_impute():
    array = f32([NAN, 5, 5])
    impute = feature(0, on_null="impute", impute=0.0)
    fallback = feature(1, **RANGE, on_outside="fallback")
    reject = feature(2, **RANGE, on_outside="reject")
    with pytest.raises(BadInput, match=r"x\[0\]\[2\]"):
        judge(array, impute, fallback, reject)
    judged = judge(array, impute, fallback)
    assert judged.inputs["x"] is array
    assert kinds(judged) == {"outside.fallback"}


@pytest.mark.parametrize(
    ("ages", "stale"),
    [
        (Ages(), False),
        (Ages(60_000.0), False),
        (Ages(60_000.5), True),
        (Ages(0.0, {"x": 90_000.0}), True),
        (Ages(90_000.0, {"x": 1.0}), False),
        (Ages(0.0, {"x": (99e9, 61_000.0, 0.0)}), True),
        (Ages(99e9, {"x": (99e9, 59_000.0, 0.0)}), False),
        (Ages(99e9, {"y": 0.0}), True),
    ],
)
def test_a_value_is_stale_when_it_is_older_than_its_time_to_live(ages, stale):
    one = feature(1, ttl_s=60.0)
    assert kinds(judge(f32([0, 0, 0]), one, ages=ages)) == ({"stale.counted"} if stale else set())
    replaced = feature(1, ttl_s=60.0, on_stale="impute", impute=7.0)
    judged = judge(f32([0, 1, 2], [3, 4, 5]), replaced, ages=ages)
    assert judged.inputs["x"].tolist() == ([[0, 7, 2], [3, 7, 5]] if stale else [[0, 1, 2], [3, 4, 5]])
    assert kinds(judged) == ({"stale.imputed"} if stale else set())
    refusing = feature(1, ttl_s=60.0, on_stale="reject")
    if stale:
        with pytest.raises(BadInput, match=r"x\[1\] \(f1\): wanted at most 60 s, got a value .* s old"):
            judge(f32([0, 0, 0]), refusing, ages=ages)
    else:
        judge(f32([0, 0, 0]), refusing, ages=ages)


def test_the_oldest_age_is_what_freshness_counts():
    assert Ages().oldest_ms() == -1
    assert Ages(0.0).oldest_ms() == 0
    assert Ages(3.2, {"x": (1.0, 9.5), "y": 4.0}).oldest_ms() == 10


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_the_quick_look_overlooks_nothing(rows):
    array = np.array(rows, np.float32)
    rules = policies(
        feature(0, on_null="impute", impute=0.0), feature(2, **RANGE, on_null="count", on_outside="impute", impute=0.5)
    )
    judged = rules.judge({"x": array})
    wanted = array.copy()
    wanted[np.isnan(array[:, 0]), 0] = 0.0
    # Compared in float64, as windows are counted.
    outside = (array[:, 2].astype(np.float64) < -1.0) | (array[:, 2].astype(np.float64) > 1.0)
    wanted[outside, 2] = 0.5
    np.testing.assert_array_equal(judged.inputs["x"], wanted)
    nulls = {"null.imputed"} if np.isnan(array[:, 0]).any() else set()
    assert kinds(judged) == nulls | ({"outside.imputed"} if outside.any() else set())


@pytest.mark.parametrize("shape", [(), (-1,), (-1, -1), (-1, 2, 3)])
def test_tensors_of_other_shapes_are_judged_too(shape):
    sizes = [2 if d == -1 else d for d in shape]
    array = np.zeros(sizes, np.float32)
    array[(0,) * len(sizes)] = 9.0
    judged = judge(array, feature(0, **RANGE, on_outside="impute", impute=0.5), shape=shape)
    assert judged.inputs["x"].ravel()[0] == 0.5
    assert judged.inputs["x"].ravel()[1:].tolist() == [0.0] * (array.size - 1)


def test_a_column_that_a_tensor_of_varying_width_lacks_is_named():
    with pytest.raises(BadInput, match=r"x: wanted a column 2 \(f2\), got shape \[1, 2\]"):
        judge(np.zeros((1, 2), np.float32), feature(2, on_null="impute", impute=0.0), shape=(-1, -1))


def test_whole_numbers_have_ranges_and_no_nulls():
    array = np.array([[1, 2, 300]], np.int32)
    judged = judge(
        array, feature(2, range=(0.0, 255.0), on_null="reject", on_outside="impute", impute=255.0), datatype="INT32"
    )
    assert judged.inputs["x"].tolist() == [[1, 2, 255]]
    assert judged.inputs["x"].dtype == np.int32


@pytest.mark.parametrize(
    ("rule", "tensor", "words"),
    [
        ({"on_outside": "reject"}, {}, "f0: on_outside reject wants a range"),
        ({"on_stale": "reject"}, {}, "f0: on_stale reject wants a ttl_s above 0"),
        ({"on_null": "impute", "impute": 0.5}, {"datatype": "INT32"}, "f0: INT32 cannot hold impute 0.5"),
        ({"on_null": "impute", "impute": 300.0}, {"datatype": "UINT8"}, "f0: UINT8 cannot hold impute 300"),
        ({"on_null": "impute", "impute": 1e6}, {"datatype": "FP16"}, r"f0: FP16 cannot hold impute 1e\+06"),
        ({"on_null": "reject"}, {"datatype": "BYTES"}, "f0: a policy wants numbers, x is BYTES"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused_at_load(rule, tensor, words):
    with pytest.raises(Rejected, match=words) as refused:
        policies(feature(0, **rule), **tensor)
    assert refused.value.code == "malformed_manifest"
