"""Open Inference Protocol tensors to numpy and back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skerry_runtime import tensors
from skerry_runtime.errors import BadInput

NUMERIC = [name for name, dtype in tensors.DTYPES.items() if dtype.kind in "iufb"]


@pytest.mark.parametrize("datatype", NUMERIC)
@given(data=st.data())
def test_binary_and_json_give_back_the_same_tensor(datatype, data):
    dtype = tensors.DTYPES[datatype]
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=4))
    array = data.draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, allow_infinity=False)))
    again = tensors.from_binary("x", datatype, list(shape), tensors.to_binary(array))
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, array)
    from_json = tensors.from_json("x", datatype, list(shape), tensors.to_json(array))
    assert from_json.dtype == dtype
    np.testing.assert_array_equal(from_json, array)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_texts_go_both_ways(texts):
    array = tensors.from_json("x", "BYTES", [len(texts)], texts)
    binary = tensors.from_binary("x", "BYTES", [len(texts)], tensors.to_binary(array))
    assert tensors.to_json(binary) == texts
    assert tensors.datatype_of(array) == "BYTES"


def test_nested_data_is_read_row_by_row():
    found = tensors.from_json("x", "FP32", [2, 2], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(found, np.array([[1, 2], [3, 4]], np.float32))


def test_null_is_nan_and_nan_is_null():
    found = tensors.from_json("x", "FP32", [1, 3], [[1.5, None, 2]])
    assert math.isnan(found[0, 1])
    assert tensors.to_json(found) == [1.5, None, 2.0]


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("FP31", [1], [1.0], "x.datatype: wanted one of"),
        ("FP32", [2], [1.0], "wanted 2 for shape [2], got 1 elements"),
        ("FP32", [0, 1 << 39, 1 << 39], [], "sizes whose product is below 2**40"),
        ("FP32", [1], ["1.0"], "wanted numbers for FP32, got strings"),
        ("FP32", [2], [1.0, "2"], "got strings"),
        ("FP32", [1], [True], "got true or false"),
        ("FP32", [1], [{"a": 1}], "wanted numbers"),
        ("FP32", [2, 2], [[1, 2], [3]], "rows of different lengths"),
        ("FP32", [1], [1e39], "numbers that fit FP32"),
        ("FP64", [1], [10**400], "numbers that fit FP64"),
        ("INT32", [1], [1.5], "wanted whole numbers for INT32, got a fraction"),
        ("INT8", [1], [128], "-128 to 127"),
        ("UINT8", [1], [-1], "0 to 255"),
        ("INT64", [1], [2**63], "for INT64"),
        ("INT64", [1], [None], "wanted whole numbers"),
        ("BOOL", [1], [1], "wanted true or false"),
        ("BYTES", [1], [1], "wanted strings"),
        ("FP32", [-1], [1.0], "whole sizes"),
        ("FP32", [True], [1.0], "whole sizes"),
        ("FP32", "1", [1.0], "a list of at most 16 sizes"),
        ("FP32", [1 << 41], [1.0], "whole sizes"),
        ("FP32", [1], 1.0, "wanted a list"),
        ("FP32", [1], {"0": 1.0}, "wanted a list"),
        (None, [1], [1.0], "x.datatype"),
        (["FP32"], [1], [1.0], "x.datatype"),
    ],
)
def test_what_does_not_fit_is_named(datatype, shape, data, words):
    with pytest.raises(BadInput) as caught:
        tensors.from_json("x", datatype, shape, data)
    assert words in str(caught.value)
    assert caught.value.violation.field.startswith("x")


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("FP32", [2], b"\0" * 7, "wanted 8 for FP32 of shape [2], got 7 bytes"),
        ("BOOL", [2], b"\x01\x02", "bytes 0 or 1"),
        ("BYTES", [1], b"\x05\0\0\0ab", "wanted whole elements"),
        ("BYTES", [1], b"\x05\0", "a length of 4 bytes"),
        ("BYTES", [2], b"\x01\0\0\0a", "wanted 2, got 1 elements"),
        ("BYTES", [1], b"\xff\xff\xff\xffa", "wanted whole elements"),
    ],
)
def test_binary_of_another_length_is_refused(datatype, shape, data, words):
    with pytest.raises(BadInput, match=r".*") as caught:
        tensors.from_binary("x", datatype, shape, data)
    assert words in str(caught.value)


def test_an_infinity_that_was_sent_stays_one():
    assert math.isinf(tensors.from_json("x", "FP32", [1], [math.inf])[0])


def test_a_numpy_type_outside_the_protocol_is_refused():
    with pytest.raises(BadInput):
        tensors.datatype_of(np.zeros(1, np.complex64))
