"""One row at fixed places gives what the session gives, and nobody sees that the places are the same each time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from skerry_runtime.engines.onnx import OnnxEngine
from skerry_runtime.engines.onnx_row import MOST_BYTES
from skerry_runtime.errors import BadInput, EngineFailed

KINDS = {np.float32: T.FLOAT, np.float16: T.FLOAT16, np.int64: T.INT64, np.uint8: T.UINT8, np.bool_: T.BOOL}


def engine(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], tables: list[Any] = []) -> OnnxEngine:  # noqa: B006
    graph = h.make_graph(nodes, "g", inputs, outputs, tables)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    path = folder / "m.onnx"
    onnx.save(model, path)
    return OnnxEngine(path)


def is_bound(run: Any) -> bool:
    return run.__name__ == "run_row"


def doubled(folder: Path, width: int = 4) -> OnnxEngine:
    value = h.make_tensor_value_info
    return engine(
        folder,
        [h.make_node("Add", ["x", "x"], ["y"])],
        [value("x", T.FLOAT, [None, width])],
        [value("y", T.FLOAT, [None, width])],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_datatype_comes_out_as_it_goes_in(tmp_path: Path, kind: Any) -> None:
    value = h.make_tensor_value_info
    same = engine(
        tmp_path,
        [h.make_node("Identity", ["x"], ["y"])],
        [value("x", KINDS[kind], [None, 2, 3])],
        [value("y", KINDS[kind], [None, 2, 3])],
    )
    run = same.prepare(["y"])
    assert is_bound(run)
    x = np.array([[[0, 1, 0], [1, 1, 0]]], kind)
    (found,) = run({"x": x})
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, x)


def test_an_answer_stays_what_it_was_when_the_next_comes(tmp_path: Path) -> None:
    run = doubled(tmp_path).prepare(["y"])
    (first,) = run({"x": np.ones((1, 4), np.float32)})
    run({"x": np.zeros((1, 4), np.float32)})
    assert first.tolist() == [[2, 2, 2, 2]]


def test_rows_of_another_layout_in_memory_are_read_in_their_order(tmp_path: Path) -> None:
    run = doubled(tmp_path).prepare(["y"])
    wide = np.arange(8, dtype=np.float32).reshape(1, 8)
    assert run({"x": wide[:, ::2]})[0].tolist() == [[0, 4, 8, 12]]


def test_one_row_and_several_come_in_any_order(tmp_path: Path) -> None:
    run = doubled(tmp_path).prepare(["y"])
    for rows in (1, 3, 1, 2, 1):
        x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
        np.testing.assert_array_equal(run({"x": x})[0], 2 * x)


def test_several_tensors_keep_their_names_and_order(tmp_path: Path) -> None:
    value = h.make_tensor_value_info
    both = engine(
        tmp_path,
        [
            h.make_node("Cast", ["b"], ["bf"], to=T.FLOAT),
            h.make_node("Add", ["a", "bf"], ["sum"]),
            h.make_node("Sub", ["a", "bf"], ["difference"]),
        ],
        [value("a", T.FLOAT, [None, 2]), value("b", T.INT64, [None, 2])],
        [value("sum", T.FLOAT, [None, 2]), value("difference", T.FLOAT, [None, 2])],
    )
    run = both.prepare(["difference", "sum"])
    assert is_bound(run)
    difference, total = run({"b": np.array([[1, 2]]), "a": np.array([[5, 5]], np.float32)})
    assert (difference.tolist(), total.tolist()) == ([[4, 3]], [[6, 7]])
    difference, total = run({"b": np.array([[1, 2], [0, 0]]), "a": np.full((2, 2), 5, np.float32)})
    assert (difference.tolist(), total.tolist()) == ([[4, 3], [5, 5]], [[6, 7], [5, 5]])


def test_threads_that_ask_at_once_get_each_their_own_answer(tmp_path: Path) -> None:
    run = doubled(tmp_path, 64).prepare(["y"])
    wrong: list[Any] = []

    def ask(number: int) -> None:
        x = np.full((1, 64), number, np.float32)
        for _ in range(3000):
            (found,) = run({"x": x})
            if not (found == 2 * number).all():
                wrong.append((number, found))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_answer_whose_size_only_its_values_tell_is_whole(tmp_path: Path) -> None:
    value = h.make_tensor_value_info
    # The file says "some number of rows"; it depends on the values how many.
    kept = engine(
        tmp_path,
        [
            h.make_node("Compress", ["x", "mask"], ["y"]),
            h.make_node("Greater", ["x", "zero"], ["m2"]),
            h.make_node("Squeeze", ["m2", "first"], ["mask"]),
        ][::-1],
        [value("x", T.FLOAT, [None, 3])],
        [value("y", T.FLOAT, [None])],
        [h.make_tensor("zero", T.FLOAT, [], [0.0]), h.make_tensor("first", T.INT64, [1], [0])],
    )
    run = kept.prepare(["y"])
    for row, wanted in (([1, -1, 2], [1, 2]), ([1, -1, -1], [1]), ([1, 2, 3], [1, 2, 3]), ([-1, 4, -1], [4])):
        assert run({"x": np.array([row], np.float32)})[0].tolist() == wanted


def test_what_fails_says_so_and_the_next_is_answered_as_fast(tmp_path: Path) -> None:
    value = h.make_tensor_value_info
    looked_up = engine(
        tmp_path,
        [h.make_node("Gather", ["table", "x"], ["y"], axis=0)],
        [value("x", T.INT64, [None, 1])],
        [value("y", T.FLOAT, [None, 1])],
        [h.make_tensor("table", T.FLOAT, [3], [5, 6, 7])],
    )
    run = looked_up.prepare(["y"])
    free = next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, list))
    for _ in range(2):
        with pytest.raises(EngineFailed):
            run({"x": np.array([[9]])})
        assert run({"x": np.array([[2]])})[0].tolist() == [[7]]
    assert len(free) == 1, "the places were given up"


def test_numbers_of_another_type_and_the_same_size_are_not_taken_for_ours(tmp_path: Path) -> None:
    run = doubled(tmp_path).prepare(["y"])
    with pytest.raises(BadInput, match="Unexpected input data type"):
        run({"x": np.ones((1, 4), np.int32)})
    # The same type by another name is.
    assert run({"x": np.ones((1, 4), np.dtype("<f4"))})[0].tolist() == [[2, 2, 2, 2]]


def test_large_tensors_and_texts_go_the_usual_way(tmp_path: Path) -> None:
    assert not is_bound(doubled(tmp_path, MOST_BYTES // 8 + 1).prepare(["y"]))
    assert is_bound(doubled(tmp_path, MOST_BYTES // 8).prepare(["y"]))
    value = h.make_tensor_value_info
    text = engine(
        tmp_path,
        [h.make_node("Identity", ["x"], ["y"])],
        [value("x", T.STRING, [None, 1])],
        [value("y", T.STRING, [None, 1])],
    )
    assert text.prepare(["y"])({"x": np.array([["a"]], object)})[0].tolist() == [["a"]]
