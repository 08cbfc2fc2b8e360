"""Steps that look back: whole arrays in training and rows one by one on the device give the same bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skerry_contract import manifest as mf
from skerry_runtime.errors import Rejected
from skerry_runtime.tensors import Spec
from skerry_runtime.transforms import apply, compile_steps
from skerry_runtime.transforms.windows import MOST_NUMBERS

WIDTH = 3
ANY = st.floats(width=32)
NUMBERS = st.floats(-1e6, 1e6, width=32)


def arrays(elements=ANY, most=40):
    return hnp.arrays(np.float32, st.tuples(st.integers(1, most), st.just(WIDTH)), elements=elements)


def step(op, output="", source="x", **params):
    return {"op": op, "input": source, "output": output, "params": params}


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if a.dtype.kind == "O":
        assert a.tolist() == b.tolist()
    else:
        assert a.tobytes() == b.tobytes()


def one_by_one(steps, tensors, cuts=(), streams=None):
    """As a device does: each stream's rows in requests of some sizes, in the order of time."""
    specs = [Spec(name, "FP32", (-1, *array.shape[1:])) for name, array in tensors.items()]
    compiled = compile_steps([mf.Transform(**s) for s in steps], specs)
    rows = len(next(iter(tensors.values())))
    bounds = sorted({0, rows, *(cut for cut in cuts if cut < rows)}) if streams is None else range(rows + 1)
    memories, found = {}, []
    for low, high in zip(bounds, [*bounds][1:], strict=False):
        stream = None if streams is None else streams[low]
        request = {name: array[low:high] for name, array in tensors.items()}
        memory = memories.get(stream, compiled.begin())
        memories[stream] = compiled.run_on(request, memory)
        found.append(request)
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


LOOKING_BACK = {
    "lag": [step("lag", rows=2)],
    "lags": [step("lag", rows=[1, 5], columns=[2, 0], keep=True)],
    "filled lag": [step("lag", rows=3, fill=-1.5)],
    "rolling": [step("rolling", rows=4, statistics=["mean", "min", "max", "sd"])],
    "rolling of some": [step("rolling", rows=7, statistics=["sd", "mean"], columns=[1], minimum=3, keep=True)],
    "rolling of one row": [step("rolling", rows=1, statistics="mean")],
    "one upon the other": [step("rolling", rows=3, statistics="mean"), step("lag", rows=[1, 2], keep=True), step("impute", value=0.0)],
    "all": [
        step("clip", low=-1e5, high=1e5),
        step("scale", mean=[1.0, -2.0, 0.5], scale=[2.0, 0.25, 100.0]),
        step("log1p"),
        step("lag", rows=1, keep=True),
        step("rolling", rows=5, statistics=["mean", "sd"], columns=[0, 4], keep=True),
        step("impute", value=-1.0),
        step("softmax", output="p"),
        step("rolling", source="p", output="smooth", rows=3, statistics="max"),
        step("argmax", source="smooth", output="winner"),
        step("threshold", source="p", output="sure", value=0.5),
        step("labels", source="winner", output="label", labels=["a", "b"]),
        step("select", source="p", output="some", columns=[1, 0]),
        step("one_hot", source="some", output="ones", values=[0.0, 0.5, 1.0]),
        step("cast", source="p", output="small", datatype="INT8"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("steps", LOOKING_BACK.values(), ids=LOOKING_BACK.keys())
@given(array=arrays(), cuts=st.lists(st.integers(1, 39)))
@settings(max_examples=60)
def test_training_and_device_give_the_same_bits(steps, array, cuts):
    before = array.tobytes()
    whole = apply(steps, {"x": array})
    single = one_by_one(steps, {"x": array}, range(1, len(array)))
    in_requests = one_by_one(steps, {"x": array}, cuts)
    assert array.tobytes() == before
    for name, wanted in whole.items():
        if wanted.dtype.kind == "f":
            # NaN has many forms of bits; which one an operation gives is the CPU's business.
            for other in (wanted, single[name], in_requests[name]):
                other[np.isnan(other)] = np.nan
        same_bits(wanted, single[name])
        same_bits(wanted, in_requests[name])


@pytest.mark.parametrize("steps", [LOOKING_BACK["lags"], LOOKING_BACK["all"]], ids=["lags", "all"])
@given(array=arrays(NUMBERS), data=st.data())
@settings(max_examples=30)
def test_a_stream_column_keeps_streams_apart_as_sequence_ids_do(steps, array, data):
    streams = data.draw(st.lists(st.sampled_from("abc"), min_size=len(array), max_size=len(array)))
    whole = apply(steps, {"x": array}, streams=np.array(streams))
    single = one_by_one(steps, {"x": array}, streams=streams)
    for name, wanted in whole.items():
        same_bits(wanted, single[name])
    # And each stream alone is what it is among the others.
    of_a = [i for i, stream in enumerate(streams) if stream == "a"]
    if of_a:
        alone = apply(steps, {"x": array[of_a]})
        for name, wanted in alone.items():
            same_bits(wanted, whole[name][of_a])


@given(array=arrays(st.one_of(NUMBERS, st.just(np.nan))), rows=st.integers(1, 6), minimum=st.integers(1, 6))
def test_rolling_is_what_its_words_say(array, rows, minimum):
    minimum = min(rows, minimum)
    found = apply([step("rolling", rows=rows, minimum=minimum, statistics=["mean", "min", "max", "sd"])], array)
    for t in range(len(array)):
        for column in range(WIDTH):
            seen = array[max(0, t - rows + 1) : t + 1, column].astype(np.float64)
            seen = seen[~np.isnan(seen)]
            wanted = [seen.mean(), seen.min(), seen.max(), seen.std()] if len(seen) >= minimum else [np.nan] * 4
            np.testing.assert_allclose(
                found[t].reshape(4, WIDTH)[:, column], wanted, rtol=1e-5, atol=1e-6 * (1 + np.abs(seen).max(initial=0))
            )


@given(array=arrays(NUMBERS), rows=st.integers(1, 6))
def test_lag_is_the_row_so_many_rows_ago(array, rows):
    found = apply([step("lag", rows=[rows], keep=True)], array)
    np.testing.assert_array_equal(found[:, :WIDTH], array)
    np.testing.assert_array_equal(found[rows:, WIDTH:], array[:-rows] if rows < len(array) else array[:0])
    assert np.isnan(found[:rows, WIDTH:]).all()


def test_a_long_array_is_taken_in_parts_and_gives_the_same():
    array = np.random.default_rng(3).normal(size=(2 * MOST_NUMBERS // 90, WIDTH)).astype(np.float32)
    steps = [step("rolling", rows=60, statistics=["mean", "sd"])]
    whole = apply(steps, array)
    tail = apply(steps, array[-200:])
    same_bits(whole[-141:], tail[-141:])


def test_whole_numbers_lag_with_a_fill_of_their_own():
    found = apply([step("lag", rows=1, fill=-1, keep=True)], np.array([[1], [2]], np.int8))
    assert found.tolist() == [[1, -1], [2, 1]]
    assert found.dtype == np.int8


def test_one_hot_of_numbers_texts_and_one_column_among_others():
    x = np.array([[2.0, 7.0], [3.0, 8.0], [np.nan, 9.0]], np.float32)
    one = apply([step("one_hot", column=0, values=[2, 3])], x)
    np.testing.assert_array_equal(one, np.array([[1, 0, 7], [0, 1, 8], [0, 0, 9]], np.float32))
    every = apply([step("one_hot", values=[2, 8])], x)
    np.testing.assert_array_equal(every, np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], np.float32))
    texts = np.array([["on"], [b"off"], ["Off"]], object)
    np.testing.assert_array_equal(apply([step("one_hot", values=["on", "off"])], texts), [[1, 0], [0, 1], [0, 0]])
    flat = apply([step("one_hot", values=[1, 2, 3])], np.array([3, 1], np.int64))
    assert flat.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert flat.dtype == np.float32


WRONG = [
    ({"op": "lag", "params": {}}, "parameter rows is missing"),
    ({"op": "lag", "params": {"rows": 0}}, "rows: wanted a whole number from 1 to 4096, got 0"),
    ({"op": "lag", "params": {"rows": [1, 1]}}, "rows: wanted a number of rows, or a list of different ones"),
    ({"op": "lag", "params": {"rows": 1, "columns": [3]}}, "columns: wanted a column from 0 to 2"),
    ({"op": "lag", "params": {"rows": 1, "columns": [1, 1]}}, "columns: wanted a list of different"),
    ({"op": "lag", "params": {"rows": 1, "keep": 1}}, "keep: wanted true or false"),
    ({"op": "lag", "params": {"rows": 1, "fill": [1.0, 2.0, 3.0]}}, "fill: wanted one number"),
    ({"op": "rolling", "params": {"rows": 2, "statistics": ["median"]}}, "wanted some of mean, min, max, sd, got 'median'"),
    ({"op": "rolling", "params": {"rows": 2, "statistics": []}}, "statistics: wanted a list"),
    ({"op": "rolling", "params": {"rows": 2, "statistics": "sd", "minimum": 3}}, "minimum: wanted a whole number from 1 to 2"),
    ({"op": "one_hot", "params": {"values": []}}, "values: wanted a list of different numbers"),
    ({"op": "one_hot", "params": {"values": ["a"]}}, "values: wanted different numbers, got 'a'"),
    ({"op": "one_hot", "params": {"values": [1, 1]}}, "values: wanted different numbers"),
    ({"op": "one_hot", "params": {"values": [1], "column": 3}}, "column: wanted a column from 0 to 2"),
    ({"op": "one_hot", "params": {"values": [1], "with": 3}}, "unknown parameter with"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_a_step_that_cannot_be_is_refused_before_it_runs(wrong, words):
    with pytest.raises(Rejected) as refused:
        apply([{"input": "x", **wrong}], np.zeros((2, WIDTH), np.float32))
    assert refused.value.code == "transform_invalid"
    assert words in refused.value.detail


def test_what_cannot_look_back_says_so():
    for array, words in (
        (np.zeros((2, 3, 4), np.float32), "wanted rows with a fixed number of columns"),
        (np.zeros(2, np.float32), "wanted rows with a fixed number of columns"),
        (np.zeros((2, 3), np.int32), "which has no null: wanted a fill"),
        (np.array([["a"]], object), "wanted numbers in x"),
    ):
        with pytest.raises(Rejected, match=words):
            apply([step("lag", rows=1)], array)
    with pytest.raises(Rejected, match="remembered numbers"):
        apply([step("lag", rows=4096)], np.zeros((1, 100), np.float32))


def test_apply_says_what_does_not_fit():
    x = np.zeros((3, 1), np.float32)
    with pytest.raises(ValueError, match="streams: wanted one value for each of 3 rows"):
        apply([step("lag", rows=1)], x, streams=["a", "b"])
    with pytest.raises(ValueError, match="as many rows"):
        apply([step("lag", rows=1)], {"x": x, "y": x[:2]})
    with pytest.raises(Rejected, match=r"steps\[0\]: unknown key param"):
        apply([{"op": "lag", "input": "x", "param": {}}], x)
    assert apply([], x) is x
