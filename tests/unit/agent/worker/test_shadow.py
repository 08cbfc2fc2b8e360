"""What a shadow counts of each frame: a pair, or a reason why there is none."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
from skerry_agent.worker import shadow, tee
from skerry_agent.worker import share as core
from skerry_contract import window as w
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import Runner, load

KEY = w.Key("gas", "a" * 64, "onnx", "control", "r-1", 2)
OTHER = KEY._replace(stage=3)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, models: ModuleType) -> Runner:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    digest = models.build_bundle(folder)
    bundle = open_bundle(folder, digest=digest)
    return load(bundle, bundle.manifest.variants[0].id)


def make(runner: Runner, thermal: Path = Path("/nowhere"), max_c: float = 0.0) -> shadow.Comparison:
    return shadow.Comparison(runner, cpu=1.0, max_c=max_c, boot_id="0" * 32, thermal=thermal)


def stream(*frames: tee.Frame) -> io.BytesIO:
    out = io.BytesIO()
    for frame in frames:
        data = msgspec.msgpack.encode(frame)
        out.write(tee.LENGTH.pack(len(data)) + data)
    out.seek(0)
    return out


def shown(models: ModuleType, seed: int, place: int = 1, *, outputs: dict | None = None) -> tee.Shown:
    x, _ = models.rows(1, seed=seed)
    p = models.probabilities(x)
    inputs = {"x": tee.Wired("FP32", x.shape, x.tobytes())}
    answered = {"probabilities": tee.Wired("FP32", p.shape, p.astype(np.float32).tobytes())}
    return tee.Shown(place=place, inputs=inputs, outputs=answered if outputs is None else outputs, took_ns=1)


def test_pairs_are_counted_under_the_key_they_were_answered_under(runner: Runner, models: ModuleType) -> None:
    comparison = make(runner)
    comparison.follow(
        stream(
            tee.Keyed(key=KEY), shown(models, 1), shown(models, 2), tee.Keyed(key=OTHER), shown(models, 3),
            tee.Missed(n=4),
        )
    )  # fmt: skip
    found = {window.key: window.shadows["c" * 64] for window in comparison.cut("c" * 64)}
    assert (found[KEY].pairs, found[KEY].agreed, found[KEY].dropped) == (2, 2, {})
    assert (found[OTHER].pairs, found[OTHER].dropped) == (1, {"busy": 4})
    assert found[KEY].distance.n == 2
    assert found[KEY].slower.n == 2, "nothing runs in a nanosecond"
    assert comparison.cut("c" * 64) == []


def test_a_request_that_the_candidate_does_not_take_is_no_pair(runner: Runner, models: ModuleType) -> None:
    wrong = tee.Shown(place=1, inputs={"y": tee.Wired("FP32", (1,), b"\0" * 4)}, outputs={}, took_ns=1)
    comparison = make(runner)
    comparison.follow(stream(tee.Keyed(key=KEY), wrong, shown(models, 1, outputs={})))
    (window,) = comparison.cut("c" * 64)
    assert window.shadows["c" * 64].dropped == {"failed": 1, "unlike": 1}


def test_a_label_is_for_who_was_right(runner: Runner, models: ModuleType) -> None:
    x, _ = models.rows(1, seed=1)
    theirs = int(models.probabilities(x)[0].argmax())
    other = (theirs + 1) % 3
    labels = [
        tee.Labelled(place=core.place("ab", 7), truth=truth, predicted=ours)
        for truth, ours in ((theirs, theirs), (other, other), (theirs, other), (other, (theirs + 2) % 3))
    ]
    strange = tee.Labelled(place=core.place("ab", 8), truth=0, predicted=0)
    comparison = make(runner)
    comparison.follow(stream(tee.Keyed(key=KEY), shown(models, 1, core.place("ab", 7)), *labels, strange))
    (window,) = comparison.cut("c" * 64)
    assert window.shadows["c" * 64].labelled == (1, 1, 1, 1)


def test_a_shadow_rests_while_it_is_hot(runner: Runner, models: ModuleType, tmp_path: Path) -> None:
    for i, degrees in enumerate(("41000", "83500", "broken")):
        (tmp_path / f"thermal_zone{i}").mkdir()
        (tmp_path / f"thermal_zone{i}" / "temp").write_text(degrees)
    assert shadow.hottest_c(tmp_path) == 83.5
    assert shadow.hottest_c(tmp_path / "none") is None
    for limit, dropped in ((80.0, {"hot": 1}), (90.0, {})):
        comparison = make(runner, tmp_path, limit)
        comparison.follow(stream(tee.Keyed(key=KEY), shown(models, 1)))
        (window,) = comparison.cut("c" * 64)
        assert window.shadows["c" * 64].dropped == dropped


def test_a_cut_stream_ends_quietly_and_an_absurd_one_is_an_error(runner: Runner, models: ModuleType) -> None:
    whole = stream(tee.Keyed(key=KEY), shown(models, 1)).getvalue()
    comparison = make(runner)
    comparison.follow(io.BytesIO(whole[:-3]))
    assert comparison.cut("c" * 64) == []
    with pytest.raises(ValueError, match="wanted at most"):
        comparison.follow(io.BytesIO(tee.LENGTH.pack((1 << 32) - 1)))


def test_the_distance_is_the_widest_difference_and_nan_beside_a_number_is_far() -> None:
    def far(a: list[float], b: list[float]) -> int:
        return shadow._distance({"y": np.array(a, np.float32)}, {"y": np.array(b, np.float32)})

    assert far([1.0, 2.0], [1.5, 2.25]) == 500_000
    assert far([math.nan, math.inf], [math.nan, math.inf]) == 0
    assert far([math.nan], [1.0]) == far([math.inf], [1.0]) == 1 << 40


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_any_run_of_requests_shows_its_share(share: float) -> None:
    below = core.threshold(share)
    for start in (0, 12_345, 1 << 40):
        n = sum(core.chosen(i, below) for i in range(start, start + 1000))
        assert abs(n - 1000 * share) <= 2
