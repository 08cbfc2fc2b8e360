"""The quick way of counting a request writes what the thorough one writes, bit by bit, and leaves to it what is not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_agent import workerwire as ww
from skerry_agent.worker.distinct import Distinct
from skerry_agent.worker.plan import FeatureColumn, OutputColumn, Plan
from skerry_agent.worker.recorder import Recorder
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "0" * 64, "onnx-fp32", "none", "", 0)
PLAN = Plan(
    features=tuple(FeatureColumn(name=str(i), input="x", column=i, edges=(0.0,)) for i in range(3)),
    outputs=(OutputColumn(name="p", classes=2),),
    whole=("x",),
    direct=True,
)
BOOT = "0" * 32
floats = st.floats(width=32, allow_nan=True)


def made(path: Path, **more: Any) -> tuple[Recorder, list[ww.WindowCut]]:
    cuts: list[ww.WindowCut] = []
    recorder = Recorder(
        KEY, PLAN, ring=str(path), boot_id=BOOT, send=cuts.append, later=lambda act: act(), predictions=64, **more
    )
    return recorder, cuts


def is_quick(recorder: Recorder) -> bool:
    return recorder.ok != recorder.count


requests = st.tuples(
    st.lists(floats, min_size=3, max_size=3),
    st.lists(floats, min_size=2, max_size=2),
    st.tuples(*[st.integers(0, 2**52)] * 5),
    st.integers(0, 7),
    st.integers(0, 2**64 - 1),
    st.integers(0, 3),
    st.integers(-1, 9),
)


@given(st.lists(requests, min_size=1, max_size=20))
@settings(max_examples=80, deadline=None)
def test_the_quick_way_and_the_thorough_one_write_the_same(
    tmp_path_factory: pytest.TempPathFactory, asked: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("rings")
    (quick, _), (thorough, _) = made(folder / "1.ring", capacity=16), made(folder / "2.ring", capacity=16)
    assert is_quick(quick)
    for x, p, times, flags, ident, kinds, age_ms in asked:
        inputs, outputs = {"x": np.array([x], "f4")}, {"p": np.array([p], "f4"), "other": np.zeros(1)}
        quick.ok(inputs, outputs, 1, *times, flags, ident, kinds, age_ms)
        thorough.count(inputs, outputs, 1, *times, flags, ident, kinds, age_ms)
        assert quick.ring.written == quick.ring.positions[0]
    assert quick.ring.written == thorough.ring.written == len(asked)
    start, size = quick.ring.start, 16 * quick.ring.slot_bytes
    assert quick.ring.memory[start : start + size] == thorough.ring.memory[start : start + size]


@pytest.mark.parametrize(
    "outputs", [{"p": np.zeros((1, 3), "f4")}, {"p": np.zeros((1, 1), "f4")}, {"q": np.zeros((1, 2), "f4")}, {}]
)
def test_an_answer_of_another_shape_counts_without_its_values(tmp_path: Path, outputs: dict[str, Any]) -> None:
    recorder, cuts = made(tmp_path / "1.ring")
    assert is_quick(recorder)
    recorder.ok({"x": np.zeros((1, 3), "f4")}, outputs, 1, 9, 0, 1, 1, 5)
    recorder.ok({"x": np.zeros((1, 3), "f4")}, {"p": np.zeros((1, 2), "f4")}, 1, 9, 0, 1, 1, 5)
    recorder.cut()
    window = wire.decode_window(cuts[0].body)
    assert (window.counts.ok, window.outputs["p"].moments.n) == (2, 1)


def test_after_a_rekey_requests_are_written_into_the_new_ring(tmp_path: Path) -> None:
    recorder, cuts = made(tmp_path / "1.ring")
    one = {"x": np.zeros((1, 3), "f4")}, {"p": np.zeros((1, 2), "f4")}, 1, 9, 0, 1, 1, 5
    recorder.ok(*one)
    assert recorder.rekey(w.Key("gas", "1" * 64, "onnx-fp32", "none", "", 0), str(tmp_path / "2.ring")) == 1
    assert recorder.ring.written == 0
    recorder.ok(*one)
    recorder.ok(*one)
    recorder.cut()
    assert [(cut.upto - cut.start, wire.decode_window(cut.body).counts.ok) for cut in cuts] == [(1, 1), (2, 2)]


def test_whoever_counts_different_requests_sees_every_one(tmp_path: Path) -> None:
    recorder, cuts = made(tmp_path / "1.ring")
    recorder.count_distinct(Distinct(["x"]))
    assert not is_quick(recorder)
    recorder.ok({"x": np.zeros((1, 3), "f4")}, {"p": np.zeros((1, 2), "f4")}, 1, 9, 0, 1, 1, 5)
    recorder.cut()
    assert wire.decode_window(cuts[0].body).distinct != b""


def test_the_ring_is_folded_in_time_whichever_way_fills_it(tmp_path: Path) -> None:
    later: list[Any] = []
    recorder = Recorder(
        KEY, PLAN, ring=str(tmp_path / "1.ring"), boot_id=BOOT, send=lambda _: None, later=later.append, capacity=64
    )
    for i in range(64 * 3 + 5):
        # Nobody comes to fold: at the last moment it is done at once, and nothing is overwritten before.
        recorder.ok({"x": np.full((1, 3), i, "f4")}, {"p": np.zeros((1, 2), "f4")}, 1, 9, 0, 1, 1, 5)
    assert recorder.totals().counts.ok == 64 * 3 + 5
