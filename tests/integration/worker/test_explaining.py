"""Explanations and samples of a real worker: what its windows say of them, what it answers, and what it never gives away."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_agent import workerwire as ww
from skerry_agent.worker import choosing
from skerry_agent.worker.explaining import MOST_WAITING
from skerry_contract import histogram as h
from skerry_contract import manifest as mf
from skerry_contract import window as w
from skerry_contract import wire
from skerry_runtime import explain
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load

from tests import models
from tests.integration.worker.rig import Rig, Worker

MEDIANS = {"f0": 0.25, "f1": 0.0, "f3": -0.5}


def build(folder: Path, *, pii: tuple[str, ...] = (), **explanations: Any) -> Path:
    models.build_bundle(folder)
    features = json.loads((folder / mf.MANIFEST_FILE).read_bytes())["features"]
    for feature in features:
        feature["pii"] = feature["name"] in pii
        feature["range"] = [-20.0, 20.0]
    models.build_bundle(folder, changes={"explanations": {"medians": MEDIANS, **explanations}, "features": features})
    return folder


def post(rig: Rig, path: str, content: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    connection.request("POST", path, json.dumps(content))
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    return response.status, found, dict(response.getheaders())


def tensor(x: np.ndarray) -> list[dict[str, Any]]:
    return [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}]


def ask(rig: Rig, x: np.ndarray) -> list[str]:
    """One request per row; the predictions' ids."""
    ids = []
    for row in x:
        status, _, headers = post(rig, "/v2/models/gas/infer", {"inputs": tensor(row[None])})
        assert status == 200
        ids.append(headers["Skerry-Prediction-Id"])
    return ids


def merged(rig: Rig) -> w.Window:
    windows = [window for _, window in rig.windows]
    found = windows[0]
    for window in windows[1:]:
        found = w.merge(found, window)
    return found


def until(rig: Rig, worker: Worker, rows: int) -> w.Window:
    end = time.monotonic() + 60
    while True:
        rig.flush(worker)
        found = merged(rig)
        if found.tallies.get("explain.rows", 0) >= rows or time.monotonic() > end:
            return found
        time.sleep(0.05)


def place(ident: str) -> tuple[int, int]:
    prefix, _, position = ident.rpartition("-")
    return choosing.seed_of(f"{prefix}-"), int(position, 16)


def test_all_answers_of_an_audit_class_and_a_share_by_id_are_explained_exactly(rig: Rig, tmp_path: Path) -> None:
    bundle = build(tmp_path / "bundle", share=0.25, audit=["class-1"])
    worker = rig.start(rig.served(bundle))
    x, _ = models.rows(60)
    ids = ask(rig, x)
    predicted = models.probabilities(x).argmax(1)
    by_hash = [choosing.hash_of(*place(ident)) < 0.25 * 2.0**64 for ident in ids]
    wanted = [i for i in range(60) if by_hash[i] or predicted[i] == 1]
    assert 20 < len(wanted) < 60
    found = until(rig, worker, len(wanted))
    assert found.tallies == {"explain.chosen": len(wanted), "explain.rows": len(wanted)}
    occluder = explain.occluder_of(load(open_bundle(bundle), "onnx-fp32"))
    each = [occluder.explain({"x": x[i][None]}).attributions for i in wanted]
    assert set(found.attributions) == set(MEDIANS)
    for k, name in enumerate(occluder.features):
        assert found.attributions[name] == h.moments_of(h.quantize(abs(float(a[k])), 0.0, 1.0) for a in each)


def test_all_of_an_audit_class_are_explained_however_many_come_together_and_a_share_has_its_bound(
    rig: Rig, tmp_path: Path
) -> None:
    bundle = build(tmp_path / "bundle", share=1.0, audit=["class-1"])
    worker = rig.start(rig.served(bundle))
    x = models.rows(1800)[0]
    status, _, _ = post(rig, "/v2/models/gas/infer", {"inputs": tensor(x)})
    assert status == 200
    audited = models.probabilities(x).argmax(1) == 1
    n = int(np.count_nonzero(audited))
    others = len(x) - n
    assert n > 2 * MOST_WAITING
    assert others > 4 * MOST_WAITING
    end = time.monotonic() + 60
    while True:
        rig.flush(worker)
        tallies = merged(rig).tallies
        done = tallies.get("explain.rows", 0) + tallies.get("explain.dropped", 0)
        if done == len(x) or time.monotonic() > end:
            break
        time.sleep(0.05)
    assert done == tallies["explain.chosen"] == len(x)
    # Folds are of at most 1,024 rows: at least one has more of the share than may wait.
    assert n + MOST_WAITING <= tallies["explain.rows"] < len(x)
    occluder = explain.occluder_of(load(open_bundle(bundle), "onnx-fp32"))
    only = build(tmp_path / "only", share=0.0, audit=["class-1"])
    rig.stop(worker)
    rig.windows.clear()
    second = rig.start(rig.served(only))
    post(rig, "/v2/models/gas/infer", {"inputs": tensor(x)})
    found = until(rig, second, n)
    assert found.tallies == {"explain.chosen": n, "explain.rows": n}
    each = [occluder.explain({"x": row[None]}).attributions for row in x[audited]]
    for k, name in enumerate(occluder.features):
        moments = h.moments_of(h.quantize(abs(float(a[k])), 0.0, 1.0) for a in each)
        assert found.attributions[name].n == moments.n == n
        # Some of one run in the runtime's last bit: at most one step of 2**-12 in a row.
        assert found.attributions[name].total == pytest.approx(moments.total, abs=n // 100)


def test_what_was_chosen_and_not_explained_is_counted_when_the_worker_leaves_or_its_key_changes(
    rig: Rig, tmp_path: Path
) -> None:
    worker = rig.start(rig.served(build(tmp_path / "bundle", share=1.0)))
    x, _ = models.rows(80)
    ask(rig, x)
    rig.send(worker, ww.Rekey(model="gas", ring=rig.ring_path(), arm="candidate", rollout="r1"))
    worker.wait_for(ww.Rekeyed)
    ask(rig, x[:30])
    rig.send(worker, ww.Stop())
    with worker.changed:
        worker.changed.wait_for(lambda: worker.gone, 60)
    for arm, chosen in (("none", 80), ("candidate", 30)):
        tallies: dict[str, int] = {}
        for _, window in rig.windows:
            if window.key.arm == arm:
                for name, n in window.tallies.items():
                    tallies[name] = tallies.get(name, 0) + n
        assert tallies["explain.chosen"] == chosen
        assert tallies.get("explain.rows", 0) + tallies.get("explain.dropped", 0) == chosen


def test_a_killed_workers_chosen_rows_are_counted_as_dropped(rig: Rig, tmp_path: Path) -> None:
    bundle = build(tmp_path / "bundle", share=1.0)
    worker = rig.start(rig.served(bundle))
    ask(rig, models.rows(9)[0])
    rig.kill(worker)
    successor = rig.start(rig.served(bundle))
    rig.recover(successor, worker.rings["gas"])
    assert merged(rig).tallies == {"explain.chosen": 9, "explain.dropped": 9}


def test_a_prediction_still_remembered_and_given_inputs_are_explained_on_request(rig: Rig, tmp_path: Path) -> None:
    bundle = build(tmp_path / "bundle", pii=("f1",))
    worker = rig.start(rig.served(bundle))
    x, _ = models.rows(3)
    ids = ask(rig, x)
    occluder = explain.occluder_of(load(open_bundle(bundle), "onnx-fp32"))
    for asked, row in (({"id": ids[1]}, x[1]), ({"model": "gas", "inputs": tensor(x[2][None])}, x[2])):
        status, found, _ = post(rig, "/skerry/v1/explain", asked)
        assert status == 200, found
        wanted = occluder.explain({"x": row[None]})
        k = int(models.probabilities(row[None])[0].argmax())
        assert (found["model"], found["output"], found["label"]) == ("gas", "probabilities", f"class-{k}")
        assert found["value"] == pytest.approx(wanted.value)
        # f1 is personal: neither its value nor what hangs on it is told.
        assert found["withheld"] == ["f1"]
        assert found["attributions"] == pytest.approx({"f0": wanted.attributions[0], "f3": wanted.attributions[2]})
    rig.flush(worker)
    assert merged(rig).tallies == {"explain.asked": 2}
    assert merged(rig).attributions == {}


def test_a_question_that_cannot_be_answered_says_why(rig: Rig, tmp_path: Path) -> None:
    rig.start(rig.served(build(tmp_path / "bundle")))
    asked: dict[str, Any]
    for asked, status, says in (
        ({}, 400, "wanted the id of a prediction, or inputs"),
        ({"id": "gas-0123456789-0"}, 404, "no such prediction"),
        ({"id": "nonsense"}, 404, "no such prediction"),
        ({"model": "wear", "inputs": []}, 404, "wanted the model, one of gas"),
        ({"inputs": tensor(np.zeros((2, 4), np.float32))}, 400, "inputs of one row"),
        ({"inputs": tensor(np.zeros((1, 3), np.float32))}, 400, "x: "),
        ({"inputs": [{"name": "x"}]}, 400, "missing required field"),
        ({"id": "gas-0123456789-0", "rows": 1}, 400, "rows"),
    ):
        found = post(rig, "/skerry/v1/explain", asked)
        assert found[0] == status, found
        assert says in found[1]["error"], found


def test_a_row_belongs_to_its_own_request_and_no_other_clients_answer_is_told(rig: Rig, tmp_path: Path) -> None:
    bundle = build(tmp_path / "bundle")
    worker = rig.start(rig.served(bundle))
    x, _ = models.rows(6)
    first = ask(rig, x[:1])[0]
    status, _, headers = post(rig, "/v2/models/gas/infer", {"inputs": tensor(x[1:4])})
    assert status == 200
    three = headers["Skerry-Prediction-Id"]
    last = ask(rig, x[4:5])[0]

    def explained(of: str, row: int) -> tuple[int, Any]:
        return post(rig, "/skerry/v1/explain", {"id": of, "row": row})[:2]

    for of, row, values in ((first, 0, x[0]), (three, 0, x[1]), (three, 1, x[2]), (three, 2, x[3]), (last, 0, x[4])):
        status, body = explained(of, row)
        assert status == 200
        given = post(rig, "/skerry/v1/explain", {"inputs": tensor(values[None])})
        assert body["attributions"] == given[1]["attributions"]
    for of, row in (
        (first, 1),
        (first, 2),
        (three, 3),
        (three, 4),
        (last, 1),
        (last, 1 << 40),
        (first, -5),
        (three, 99),
    ):
        assert explained(of, row) == (404, {"error": f"explain: {of}: the request has no row {row}"})
    # The slots of its second and third row are no requests.
    prefix, _, position = three.rpartition("-")
    inside = f"{prefix}-{int(position, 16) + 1:x}"
    assert explained(inside, 0) == (404, {"error": f"explain: {inside}: no such prediction"})
    later = f"{prefix}-{int(position, 16) + 1000:x}"
    assert explained(later, 0) == (404, {"error": f"explain: {later}: no such prediction"})
    rig.stop(worker)


def test_a_model_without_medians_says_so(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "bundle")
    rig.start(rig.served(tmp_path / "bundle"))
    (ident,) = ask(rig, models.rows(1)[0])
    status, found, _ = post(rig, "/skerry/v1/explain", {"id": ident})
    assert (status, "names no explanations.medians" in found["error"]) == (400, True)


# --- samples ---------------------------------------------------------------------------------------------------------


def samples(worker: Worker) -> list[wire.Sample]:
    return [wire.decode(wire.Sample, m.body) for m in worker.heard if isinstance(m, ww.Sampled)]


def test_samples_are_a_share_by_id_and_what_is_strange_each_with_its_own_bound(rig: Rig, tmp_path: Path) -> None:
    rules = ww.SamplingRules(rate=0.3, per_hour=12)
    worker = rig.start(rig.served(build(tmp_path / "bundle", pii=("f2",))), sampling=rules)
    x, _ = models.rows(40)
    x[5, 1] = 25.0  # out of range
    x[6] = (models.centres()[0] + models.centres()[1]) / 2  # as near to one class as to another
    ids = ask(rig, x)
    rig.flush(worker)
    found = samples(worker)
    by_why: dict[str, list[wire.Sample]] = {}
    for sample in found:
        by_why.setdefault(sample.why, []).append(sample)
    assert [s.id for s in by_why["outside"]] == [ids[5]]
    assert ids[6] in [s.id for s in by_why["uncertain"]]
    strange = {s.id for s in by_why["outside"] + by_why["uncertain"]}
    chosen = [i for i in ids if choosing.hash_of(*place(i)) < 0.3 * 2.0**64 and i not in strange]
    assert [s.id for s in by_why.get("share", [])] == chosen[:12]
    tallies = merged(rig).tallies
    assert tallies.get("samples.bounded", 0) == max(0, len(chosen) - 12)
    assert tallies["samples.outside"] == 1
    for sample in found:
        row = x[ids.index(sample.id)]
        # Without f2, which is personal.
        assert sample.inputs == pytest.approx({"f0": row[0], "f1": row[1], "f3": row[3]})
        assert sample.outputs["probabilities"] == pytest.approx(models.probabilities(row[None])[0].tolist(), abs=1e-6)
        assert sample.key.model == "gas"


def test_an_answer_that_its_label_disagrees_with_is_kept(rig: Rig, tmp_path: Path) -> None:
    worker = rig.start(rig.served(build(tmp_path / "bundle")), sampling=ww.SamplingRules(rate=1e-12))
    x, _ = models.rows(4)
    ids = ask(rig, x)
    predicted = models.probabilities(x).argmax(1)
    labels = [{"id": ids[i], "label": int((predicted[i] + (i == 2)) % 3)} for i in range(4)]
    assert post(rig, "/skerry/v1/feedback", {"feedback": labels})[0] == 200
    rig.flush(worker)
    assert [(s.why, s.id) for s in samples(worker)] == [("disagrees", ids[2])]


def test_an_audited_answer_is_kept_with_its_attributions_but_for_personal_ones(rig: Rig, tmp_path: Path) -> None:
    bundle = build(tmp_path / "bundle", pii=("f0",), audit=["class-2"])
    worker = rig.start(rig.served(bundle), sampling=ww.SamplingRules(rate=1e-12, personal="hash", key=b"k" * 32))
    x = models.rows(9)[0]
    ids = ask(rig, x)
    rig.flush(worker)
    predicted = models.probabilities(x).argmax(1)
    audited = {ids[i] for i in range(9) if predicted[i] == 2}
    until(rig, worker, len(audited))
    found = [s for s in samples(worker) if s.why == "audit"]
    assert {s.id for s in found} == audited
    for sample in found:
        assert set(sample.extra["attributions"]) == {"f1", "f3"}
        assert sample.inputs["f0"].startswith("hmac:")
        assert str(float(x[ids.index(sample.id)][0])) not in str(sample.inputs)


def test_nothing_is_kept_while_the_group_asks_for_no_samples(rig: Rig, tmp_path: Path) -> None:
    worker = rig.start(rig.served(build(tmp_path / "bundle")))
    x, _ = models.rows(5)
    x[0, 0] = 99.0
    ids = ask(rig, x)
    post(rig, "/skerry/v1/feedback", {"feedback": [{"id": i, "label": 0} for i in ids]})
    rig.flush(worker)
    assert samples(worker) == []
    assert merged(rig).tallies == {}


# --- with the answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline_below_us", [1000.0, 0.0])
def test_an_answer_is_explained_with_it_where_the_request_wants_that(
    rig: Rig, tmp_path: Path, inline_below_us: float
) -> None:
    bundle = build(tmp_path / "bundle", pii=("f1",))
    worker = rig.start(rig.served(bundle), inline_below_us=inline_below_us)
    x, _ = models.rows(1)
    plain = {"inputs": tensor(x)}
    _, without, _ = post(rig, "/v2/models/gas/infer", {**plain, "parameters": {"explain": False}})
    assert set(without["parameters"]) == {"prediction_id"}
    status, found, headers = post(rig, "/v2/models/gas/infer", {**plain, "parameters": {"explain": True}})
    assert status == 200, found
    assert found["outputs"] == without["outputs"]
    assert found["parameters"]["prediction_id"] == headers["Skerry-Prediction-Id"]
    _, by_id, _ = post(rig, "/skerry/v1/explain", {"id": headers["Skerry-Prediction-Id"]})
    told = found["parameters"]["explanation"]
    assert set(told["attributions"]) == {"f0", "f3"}
    assert told["withheld"] == ["f1"]
    assert {name: by_id[name] for name in told} == told, "the same as asked later"
    rig.flush(worker)
    assert merged(rig).tallies == {"explain.asked": 2}
    assert merged(rig).counts.ok == 2


def test_a_request_that_cannot_be_explained_says_why_and_is_counted_as_invalid(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "plain", model="wear")
    worker = rig.start(
        rig.served(build(tmp_path / "bundle")), rig.served(tmp_path / "plain", name="wear", version="1.0.0")
    )
    x, _ = models.rows(2)
    for name, rows, wish, says in (
        (
            "wear",
            1,
            True,
            "parameters.explain: wanted a model that can be explained, and wear cannot: the manifest names no",
        ),
        ("gas", 2, True, "parameters.explain: wanted a request of one row, got x of shape [2, 4]"),
        ("gas", 1, "yes", "parameters.explain: wanted true or false, got 'yes'"),
        ("gas", 1, 1, "parameters.explain: wanted true or false, got 1"),
    ):
        asked = {"inputs": tensor(x[:rows]), "parameters": {"explain": wish}}
        status, found, _ = post(rig, f"/v2/models/{name}/infer", asked)
        assert status == 400, found
        assert says in found["error"]
    rig.flush(worker)
    assert sum(window.counts.invalid for _, window in rig.windows) == 4
