"""How many streams are kept, and for how long."""

import numpy as np
import pytest
from skerry_contract import manifest as mf
from skerry_runtime.errors import EngineFailed
from skerry_runtime.streams import Sequence, States, StreamTable


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def counting(**settings):
    """A table of streams that count their inferences; one over 99 fails."""
    clock = Clock()

    def begin():
        count = 0

        def infer(inputs):
            nonlocal count
            if inputs["x"] > 99:
                raise EngineFailed("model_failed", "over 99")
            count += 1
            return count

        return infer

    return StreamTable(mf.Streams(**settings), begin, clock=clock), clock


def ask(table, name, value=0, **marks):
    return table.infer(Sequence(name, **marks), {"x": np.array(value)})


def test_streams_go_on_each_for_itself():
    table, _ = counting(internal=True)
    assert [ask(table, "a"), ask(table, "b"), ask(table, "a"), ask(table, 1), ask(table, "1")] == [
        (1, True), (1, True), (2, False), (1, True), (1, True),
    ]  # fmt: skip


def test_start_begins_anew_and_end_forgets():
    table, _ = counting(internal=True)
    ask(table, "a")
    assert ask(table, "a", start=True) == (1, True)
    assert ask(table, "a", end=True) == (2, False)
    assert len(table) == 0
    assert ask(table, "a") == (1, True)
    assert ask(table, "b", start=True, end=True) == (1, True)
    assert len(table) == 1


def test_the_quietest_stream_makes_room():
    table, _ = counting(internal=True, most=2)
    for name in "abac":
        ask(table, name)
    assert (len(table), table.begun, table.ended) == (2, 3, 1)
    assert ask(table, "a") == (3, False)
    assert ask(table, "b") == (1, True)


def test_a_quiet_stream_ends_after_its_time():
    table, clock = counting(internal=True, idle_s=60.0)
    ask(table, "a")
    clock.now += 59
    ask(table, "b")
    assert ask(table, "a") == (2, False)
    clock.now += 59
    assert ask(table, "b") == (2, False)
    clock.now += 60
    table.forget_quiet()
    assert (len(table), table.ended) == (0, 2)
    assert ask(table, "a") == (1, True)


@pytest.mark.parametrize(("internal", "after"), [(False, (2, False)), (True, (1, True))])
def test_a_failure_leaves_a_stream_as_it_was_where_it_can(internal, after):
    table, _ = counting(internal=internal)
    ask(table, "a")
    with pytest.raises(EngineFailed):
        ask(table, "a", 100)
    assert ask(table, "a") == after
    with pytest.raises(EngineFailed):
        ask(table, "new", 100)
    assert len(table) == 1


def test_a_state_of_another_shape_is_refused():
    states = States((mf.StateTensor(input="h", output="hn", datatype="FP32", shape=(1, 2)),))
    np.testing.assert_array_equal(states.now["h"], np.zeros((1, 2), np.float32))
    outputs = {"y": np.zeros(1), "hn": np.ones((1, 2), np.float32)}
    assert list(states.take(outputs)) == ["h"]
    assert list(outputs) == ["y"]
    with pytest.raises(EngineFailed, match=r"state hn: wanted shape \[1, 2\], got \[2, 2\]"):
        states.take({"hn": np.ones((2, 2), np.float32)})
