"""What a shadow counts of each frame: a pair, or a reason why there is none."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
from skerry_agent import workerwire as ww
from skerry_agent.worker import comparison as c
from skerry_agent.worker import share as core
from skerry_agent.worker import tee
from skerry_agent.worker.disagreements import Disagreements
from skerry_contract import window as w
from skerry_contract import wire
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


def make(runner: Runner, thermal: Path = Path("/nowhere"), max_c: float = 0.0) -> c.Comparison:
    return c.Comparison(runner, cpu=1.0, max_c=max_c, boot_id="0" * 32, thermal=thermal)


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
    assert c.hottest_c(tmp_path) == 83.5
    assert c.hottest_c(tmp_path / "none") is None
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
        return c._distance({"y": np.array(a, np.float32)}, {"y": np.array(b, np.float32)})

    assert far([1.0, 2.0], [1.5, 2.25]) == 500_000
    assert far([math.nan, math.inf], [math.nan, math.inf]) == 0
    assert far([math.nan], [1.0]) == far([math.inf], [1.0]) == 1 << 40


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_any_run_of_requests_shows_its_share(share: float) -> None:
    below = core.threshold(share)
    for start in (0, 12_345, 1 << 40):
        n = sum(core.chosen(i, below) for i in range(start, start + 1000))
        assert abs(n - 1000 * share) <= 2


def differing(models: ModuleType, seed: int, place: int = 1) -> tee.Shown:
    """What was answered is another class than the candidate's."""
    x, _ = models.rows(2, seed=seed)
    p = models.probabilities(x)
    answered = np.stack([p[0], np.roll(p[1], 1)]).astype(np.float32)
    inputs = {"x": tee.Wired("FP32", x.shape, x.tobytes())}
    outputs = {"probabilities": tee.Wired("FP32", p.shape, answered.tobytes())}
    return tee.Shown(place=place, ident=f"gas-ab-{place:x}", inputs=inputs, outputs=outputs, took_ns=1)


@pytest.mark.parametrize("personal", ["drop", "hash"])
def test_pairs_that_disagree_are_kept_up_to_a_bound_and_without_personal_values(
    runner: Runner, models: ModuleType, personal: str
) -> None:
    sent: list[wire.Sample] = []
    manifest = runner.bundle.manifest
    # What this bundle marks, and what the one that answered does: by another name, at the same place.
    features = [msgspec.structs.replace(f, pii=f.name == "f1") for f in manifest.features]
    samples = Disagreements(
        msgspec.structs.replace(manifest, features=tuple(features)),
        "c" * 64,
        ww.SamplingRules(rate=0.5, per_hour=2, personal=personal, key=b"k"),
        send=lambda message: sent.append(wire.decode(wire.Sample, message.body)),
    )
    comparison = c.Comparison(runner, cpu=1.0, max_c=0.0, boot_id="0" * 32, samples=samples)
    keyed = tee.Keyed(key=KEY, personal=(("age", "x", 2),))
    comparison.follow(stream(keyed, shown(models, 1), *(differing(models, 4, place) for place in (7, 8, 9))))
    (window,) = comparison.cut("c" * 64)
    assert (window.shadows["c" * 64].pairs, window.shadows["c" * 64].agreed) == (4, 1)
    assert window.tallies == {"samples.shadow": 2, "samples.bounded": 1}
    assert [one.id for one in sent] == ["gas-ab-7", "gas-ab-8"]
    x, _ = models.rows(2, seed=4)
    own = models.probabilities(x)[1]
    for one in sent:
        assert (one.why, one.key) == ("shadow", KEY)
        clear = {name: value for name, value in one.inputs.items() if not isinstance(value, str)}
        # The row of the two that differs.
        assert clear == {"f0": pytest.approx(x[1, 0]), "f3": pytest.approx(x[1, 3])}
        hidden = {name for name, value in one.inputs.items() if isinstance(value, str) and value.startswith("hmac:")}
        assert hidden == ({"f1", "f2"} if personal == "hash" else set())
        assert one.outputs["probabilities"] == pytest.approx(np.roll(own, 1), abs=1e-6)
        assert one.extra["candidate"]["probabilities"] == pytest.approx(own, abs=1e-5)
        assert one.extra["shadow"] == "c" * 64 and one.extra["distance"] > 0


def test_without_a_sample_rate_no_pair_is_kept(runner: Runner, models: ModuleType) -> None:
    sent: list[object] = []
    samples = Disagreements(runner.bundle.manifest, "c" * 64, ww.SamplingRules(), send=sent.append)
    comparison = c.Comparison(runner, cpu=1.0, max_c=0.0, boot_id="0" * 32, samples=samples)
    comparison.follow(stream(tee.Keyed(key=KEY), differing(models, 4)))
    (window,) = comparison.cut("c" * 64)
    assert (window.tallies, sent) == ({}, [])
