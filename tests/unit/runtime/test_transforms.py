"""Declarative steps: same numbers for a row wherever it stands, and refused at load when they cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skerry_contract import manifest as mf
from skerry_runtime.errors import Rejected
from skerry_runtime.tensors import Spec
from skerry_runtime.transforms import compile_steps

WIDTH = 3
FLOATS = st.floats(-1e6, 1e6, width=32)
BATCH = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(WIDTH)), elements=FLOATS)


def step(op, output="", **params):
    return mf.Transform(op=op, input="x", output=output, params=params)


def compiled(*steps, datatype="FP32", shape=(-1, WIDTH)):
    return compile_steps(steps, [Spec("x", datatype, shape)])


def run(array, *steps, **spec):
    return compiled(*steps, **spec).run({"x": array})["x"]


ROWWISE = {
    "scale": step("scale", mean=[1.0, -2.0, 0.5], scale=[2.0, 0.25, 100.0]),
    "clip": step("clip", low=-1.0, high=[1.0, 2.0, 3.0]),
    "impute": step("impute", value=[1.0, 2.0, 3.0]),
    "log1p": step("log1p"),
    "select": step("select", columns=[2, 0]),
    "softmax": step("softmax"),
    "argmax": step("argmax"),
    "labels": step("labels", labels=["a", "b", "c"]),
    "threshold": step("threshold", value=0.5, column=1),
    "cast": step("cast", datatype="INT8"),
}


@pytest.mark.parametrize("op", ROWWISE)
@given(array=BATCH)
def test_a_row_gives_the_same_in_any_batch_and_the_input_stays(op, array):
    steps = compiled(ROWWISE[op])
    before = array.copy()
    whole = steps.run({"x": array})["x"]
    rows = [steps.run({"x": array[i : i + 1]})["x"] for i in range(len(array))]
    np.testing.assert_array_equal(whole, np.concatenate(rows))
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("op", ROWWISE)
@given(array=BATCH)
def test_the_declared_datatype_and_shape_are_the_real_ones(op, array):
    steps = compiled(ROWWISE[op])
    found, spec = steps.run({"x": array})["x"], steps.after["x"]
    from skerry_runtime.tensors import DTYPES

    assert found.dtype == DTYPES[spec.datatype]
    assert spec.takes(found.shape)


@given(BATCH)
def test_scale_is_what_a_standard_scaler_does(array):
    mean, scale = np.array([1.0, -2.0, 0.5], np.float32), np.array([2.0, 0.25, 100.0], np.float32)
    np.testing.assert_array_equal(run(array, ROWWISE["scale"]), (array - mean) / scale)


@given(BATCH)
def test_clip_keeps_to_its_range_and_is_idempotent(array):
    once = run(array, ROWWISE["clip"])
    assert (once >= -1).all()
    assert (once <= np.array([1, 2, 3], np.float32)).all()
    np.testing.assert_array_equal(run(once, ROWWISE["clip"]), once)


@given(hnp.arrays(np.float32, (4, WIDTH), elements=st.one_of(FLOATS, st.just(np.float32(np.nan)))))
def test_impute_replaces_nan_and_nothing_else(array):
    found = run(array, ROWWISE["impute"])
    assert not np.isnan(found).any()
    same = ~np.isnan(array)
    np.testing.assert_array_equal(found[same], array[same])


@given(BATCH)
def test_softmax_gives_probabilities_in_the_same_order(array):
    found = run(array, step("softmax"))
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-5)
    assert ((found >= 0) & (found <= 1)).all()
    best = np.take_along_axis(found, array.argmax(-1)[:, None], -1)[:, 0]
    np.testing.assert_array_equal(best, found.max(-1))


@given(BATCH)
def test_labels_name_the_argmax(array):
    names = np.array(["a", "b", "c"], object)
    np.testing.assert_array_equal(run(array, ROWWISE["labels"]), names[run(array, step("argmax"))])


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT32", "INT64", "UINT64"])
@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_a_cast_to_whole_numbers_saturates(datatype, value):
    found = int(run(np.array([[value]]), step("cast", datatype=datatype), datatype="FP64", shape=(-1, 1))[0, 0])
    bounds = np.iinfo(datatype.lower())
    if np.isnan(value):
        assert found == 0
    elif value >= bounds.max:
        assert found == bounds.max
    elif value <= bounds.min:
        assert found == bounds.min
    else:
        assert found == round(value)


def test_whole_numbers_saturate_into_narrower_ones():
    array = np.array([[-5, 300, 7]], np.int64)
    np.testing.assert_array_equal(run(array, step("cast", datatype="UINT8"), datatype="INT64"), [[0, 255, 7]])


def test_steps_chain_and_write_beside_their_input():
    steps = compiled(step("softmax", output="p"), mf.Transform(op="threshold", input="p", params={"value": 0.5}))
    found = steps.run({"x": np.array([[0, 0, 10]], np.float32)})
    assert set(found) == {"x", "p"}
    np.testing.assert_array_equal(found["p"], [[False, False, True]])
    assert steps.after["p"] == Spec("p", "BOOL", (-1, 3))


def test_labels_of_an_index_out_of_range_stay_in_the_table():
    found = run(np.array([[-1, 1, 99]], np.int64), step("labels", labels=["a", "b"]), datatype="INT64")
    assert found.tolist() == [["a", "b", "b"]]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (step("explode"), "unknown op, wanted one of scale"),
        (mf.Transform(op="scale", input="nowhere"), "no tensor 'nowhere', there are x"),
        (step("scale", mean=0.0), "parameter scale is missing"),
        (step("scale", mean=0.0, scale=0.0), "other than 0"),
        (step("scale", mean=0.0, scale=[1.0, 0.0, 1.0]), "other than 0"),
        (step("scale", mean=0.0, scale=1e-60), "other than 0"),
        (step("scale", mean=[0.0, 1.0], scale=1.0), "wanted 3 numbers for x, got 2"),
        (step("scale", mean="0", scale=1.0), "wanted finite numbers, got '0'"),
        (step("scale", mean=float("nan"), scale=1.0), "wanted finite numbers"),
        (step("scale", mean=True, scale=1.0), "wanted finite numbers, got True"),
        (step("scale", mean=1e39, scale=1.0), "wanted numbers that fit float32"),
        (step("scale", mean=0.0, scale=1.0, with_std=True), "unknown parameter with_std"),
        (step("clip", low=2.0, high=1.0), "wanted low <= high"),
        (step("select", columns=[3]), "wanted a column from 0 to 2, got 3"),
        (step("select", columns=[-1]), "wanted a column from 0 to 2, got -1"),
        (step("select", columns=[]), "wanted a list of column indices"),
        (step("cast", datatype="FP8"), "wanted a datatype of numbers, got 'FP8'"),
        (step("cast", datatype="BYTES"), "wanted a datatype of numbers"),
        (step("labels", labels=["a", "b"]), "wanted 3 labels for x, got 2"),
        (step("labels", labels=[1, 2, 3]), "wanted a list of text"),
        (step("threshold", value=[1.0, 2.0, 3.0]), "wanted one number"),
        (step("threshold", value=1.0, column=9), "wanted a column from 0 to 2"),
    ],
)
def test_a_step_that_cannot_be_is_refused_at_load(wrong, words):
    with pytest.raises(Rejected) as caught:
        compiled(wrong)
    assert caught.value.code == "transform_invalid"
    assert words in caught.value.detail
    assert f"transforms[0] ({wrong.op})" in caught.value.detail


@pytest.mark.parametrize("op", ["scale", "clip", "impute", "softmax", "argmax", "labels", "threshold", "log1p"])
def test_steps_on_text_are_refused(op):
    with pytest.raises(Rejected, match="transform_invalid"):
        compiled(ROWWISE[op], datatype="BYTES")


def test_a_list_needs_a_fixed_width():
    with pytest.raises(Rejected, match="a list needs a fixed width"):
        compiled(ROWWISE["scale"], shape=(-1, -1))


def test_a_list_needs_an_axis():
    with pytest.raises(Rejected, match="wanted one number, x has no axis"):
        compiled(step("scale", mean=[0.0], scale=1.0), shape=())
    assert run(np.array(3, np.float32), step("scale", mean=1.0, scale=2.0), shape=()) == 1.0
