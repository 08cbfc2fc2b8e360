"""Which rows are chosen: by their place alone, the same whatever the folds, and all of them counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_agent import workerwire as ww
from skerry_agent.worker import choosing
from skerry_agent.worker import ring as r
from skerry_agent.worker.choosing import Row
from skerry_agent.worker.explaining import asked_of
from skerry_agent.worker.plan import Explain, FeatureColumn, OutputColumn, Plan
from skerry_agent.worker.recorder import Recorder
from skerry_agent.worker.recovery import recover
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "0" * 64, "onnx-fp32", "none", "", 0)
BOOT = "0" * 32


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**63), min_size=1, max_size=20))
def test_many_hashes_are_each_of_the_definition(seed: int, positions: list[int]) -> None:
    found = choosing.hashes_of(seed, np.array(positions, np.uint64))
    assert found.tolist() == [choosing.hash_of(seed, position) for position in positions]


def test_a_share_is_that_share_and_a_larger_one_contains_it() -> None:
    hashes = choosing.hashes_of(7, np.arange(100_000, dtype=np.uint64))
    small, large = choosing.chosen(hashes, 0.02), choosing.chosen(hashes, 0.3)
    assert small.sum() == pytest.approx(2_000, rel=0.1)
    assert large.sum() == pytest.approx(30_000, rel=0.02)
    assert not (small & ~large).any()
    assert choosing.chosen(hashes, 1.0).all()
    assert not choosing.chosen(hashes, 0.0).any()


def recorder_at(path: Path, sent: list[w.Window], *, share: float, audit: tuple[int, ...] = ()) -> Recorder:
    plan = Plan(
        features=(FeatureColumn(name="a", input="x", column=0), FeatureColumn(name="b", input="x", column=1)),
        outputs=(OutputColumn(name="p", classes=2),),
        explain=Explain(share=share, audit=audit),
        complete=True,
        whole=("x",),
        direct=True,
    )
    return Recorder(
        KEY,
        plan,
        ring=str(path),
        boot_id=BOOT,
        send=lambda cut: sent.append(wire.decode_window(cut.body)),
        later=lambda act: act(),
        capacity=64,
    )


def merged(windows: list[w.Window]) -> w.Window:
    found = windows[0]
    for window in windows[1:]:
        found = w.merge(window, found)
    return found


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([(), (1,)]),
    st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_explained_rows_merge_to_what_counting_at_once_gives_however_windows_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[tuple[int, bool, bool]],
    share: float,
    audit: tuple[int, ...],
    room: int,
) -> None:
    sent: list[w.Window] = []
    recorder = recorder_at(tmp_path_factory.mktemp("chosen") / "1.ring", sent, share=share, audit=audit)
    taken: list[Row] = []

    def take(rows: list[Row]) -> int:
        taken.extend(rows[:room])
        return min(room, len(rows))

    recorder.show(explain=take)
    seed, wanted, at = recorder.ring.header.seed, [], 0
    explained: list[np.ndarray] = []

    def explain_some() -> None:
        while taken:
            values = taken.pop().values[:2] - 0.25
            explained.append(values)
            recorder.explained(("a", "b"), values[None], 0.5)

    for i, (rows, second, cut) in enumerate(requests):
        x = np.arange(rows * 2, dtype="f4").reshape(rows, 2) + i
        p = np.tile(np.array([[0.25, 0.75] if second else [0.75, 0.25]], "f4"), (rows, 1))
        recorder.ok({"x": x}, {"p": p}, rows, 9, 0, 1, 1, 5)
        for row in range(rows):
            if choosing.hash_of(seed, at + row) < share * 2.0**64 or (second and audit):
                wanted.append(at + row)
        at += rows
        if cut:
            recorder.cut()
            explain_some()
    recorder.fold()
    explain_some()
    recorder.cut()
    recorder.ring.close(remove=True)
    found = merged(sent)
    tallies = found.tallies
    assert tallies.get("explain.chosen", 0) == len(wanted)
    assert tallies.get("explain.rows", 0) == len(explained)
    assert tallies.get("explain.rows", 0) + tallies.get("explain.dropped", 0) == len(wanted)
    for i, name in enumerate(("a", "b")):
        moments = h.moments_of(h.quantize(abs(float(v[i])), 0.0, 0.5) for v in explained)
        assert found.attributions.get(name, h.Moments(n=0, total=0, squares=0)) == moments
    # The same rows in any order and partition.
    assert merged(sent[::-1]).attributions == found.attributions


def test_rows_that_are_taken_are_those_of_their_places(tmp_path: Path) -> None:
    sent: list[w.Window] = []
    recorder = recorder_at(tmp_path / "1.ring", sent, share=0.3)
    rows: list[Row] = []
    recorder.show(explain=lambda some: rows.extend(some) or len(some))
    for i in range(200):
        recorder.ok({"x": np.array([[i, -i]], "f4")}, {"p": np.array([[0.1, 0.9]], "f4")}, 1, 9, 0, 1, 1, 1000 + i)
    recorder.cut()
    seed = recorder.ring.header.seed
    wanted = [i for i in range(200) if choosing.hash_of(seed, i) < 0.3 * 2.0**64]
    assert [row.position for row in rows] == wanted
    assert [row.values.tolist()[:2] for row in rows] == [[i, -i] for i in wanted]
    assert [row.at_ns for row in rows] == [1000 + i for i in wanted]
    assert {row.predicted for row in rows} == {1}


def test_what_the_fallback_model_answered_is_not_explained(tmp_path: Path) -> None:
    sent: list[w.Window] = []
    recorder = recorder_at(tmp_path / "1.ring", sent, share=1.0)
    recorder.show(explain=len)
    for flags in (0, r.FALLBACK, r.RETRY, r.FALLBACK):
        recorder.ok({"x": np.zeros((1, 2), "f4")}, {"p": np.zeros((1, 2), "f4")}, 1, 9, 0, 1, 1, 5, flags)
    recorder.cut()
    assert sent[0].tallies == {"explain.chosen": 2}


def test_a_dead_workers_chosen_rows_are_counted_as_dropped(tmp_path: Path) -> None:
    sent: list[w.Window] = []
    recorder = recorder_at(tmp_path / "1.ring", sent, share=0.5)
    for _ in range(40):
        recorder.ok({"x": np.zeros((1, 2), "f4")}, {"p": np.zeros((1, 2), "f4")}, 1, 9, 0, 1, 1, 5)
    seed = recorder.ring.header.seed
    recorder.ring.close()
    cut, _ = recover(ww.Recover(ring=str(tmp_path / "1.ring"), start=0), boot_id=BOOT)
    assert cut is not None
    n = sum(choosing.hash_of(seed, i) < 0.5 * 2.0**64 for i in range(40))
    assert wire.decode_window(cut.body).tallies == {"explain.chosen": n, "explain.dropped": n}
    assert 0 < n < 40


@pytest.mark.parametrize(
    ("body", "models"),
    [
        (b'{"id":"gas-0123456789-1f"}', {"gas"}),
        (b'{"id":"gas-0123456789-1f","model":"wear"}', {"wear"}),
        (b'{"model":"two-words","inputs":[]}', {"two-words"}),
        (b'{"id":"two-words-0123456789-0"}', {"two-words"}),
        (b'{"id":"somebody\'s own"}', set()),
        (b'{"inputs":[]}', set()),
        (b"{", set()),
    ],
)
def test_a_question_says_which_model_it_is_about_so_that_its_worker_can_answer(body: bytes, models: set[str]) -> None:
    assert asked_of(body) == models
