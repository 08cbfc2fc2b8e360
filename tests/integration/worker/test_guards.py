"""What the manifest's policies do to requests of a real worker: refused, imputed, answered by the fallback model, counted."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from skerry_contract import histogram as h
from skerry_contract import manifest as mf
from skerry_contract import window as w

from tests import models
from tests.integration.worker.rig import Rig

NAN = float("nan")


def guarded(folder: Path, *, fallback: str = "", model: str = "gas", **by_feature: dict[str, Any]) -> Path:
    """The classifier with policies: changes of features by name, and its fallback."""
    models.build_bundle(folder, model=model)
    features = json.loads((folder / "manifest.json").read_bytes())["features"]
    for feature in features:
        feature.update(by_feature.get(feature["name"], {}))
    changes: dict[str, Any] = {"features": features, "requires": ["guards"]}
    models.build_bundle(folder, model=model, changes={**changes, **({"fallback": fallback} if fallback else {})})
    return folder


def ask(
    rig: Rig, x: Any, *, parameters: dict[str, Any] | None = None, model: str = "gas", **of_input: Any
) -> tuple[int, Any, dict[str, str]]:
    array = np.asarray(x, np.float32)
    given = {"name": "x", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
    if of_input:
        given["parameters"] = of_input
    body = {"id": "seven", "inputs": [given], **({"parameters": parameters} if parameters is not None else {})}
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.headers)
    finally:
        connection.close()


def window(rig: Rig, model: str = "gas") -> w.Window:
    found = [window for _, window in rig.windows if window.key.model == model]
    assert found
    total = found[0]
    for more in found[1:]:
        total = w.merge(total, more)
    return total


def answer(body: Any) -> np.ndarray:
    return np.array(body["outputs"][0]["data"], np.float32).reshape(body["outputs"][0]["shape"])


def test_what_is_imputed_reaches_the_model_and_what_was_sent_is_counted(rig: Rig, tmp_path: Path) -> None:
    folder = guarded(
        tmp_path / "b",
        f0={"on_null": "impute", "on_outside": "impute", "impute": 0.5},
        f1={"on_stale": "impute", "ttl_s": 60.0, "impute": -1.0},
    )
    worker = rig.start(rig.served(folder))
    x, _ = models.rows(3)
    sent, wanted = x.copy(), x.copy()
    sent[0, 0], sent[1, 0] = NAN, 999.0
    wanted[:2, 0] = 0.5
    status, body, _ = ask(rig, sent)
    assert status == 200, body
    np.testing.assert_allclose(answer(body), models.probabilities(wanted), atol=1e-5)
    wanted[:, 1] = -1.0
    status, body, _ = ask(rig, sent, age_ms=[0, 60_001, 0, 0])
    np.testing.assert_allclose(answer(body), models.probabilities(wanted), atol=1e-5)
    assert "prediction_id" in body["parameters"]
    rig.flush(worker)
    found = window(rig)
    assert (found.counts.ok, found.counts.rows) == (2, 6)
    # The window tells what the world sent: nulls are nulls and strange values strange, whatever the model got.
    assert (found.features["f0"].null, found.features["f0"].outside) == (2, 2)
    assert found.features["f1"].moments == h.moments_of(
        [h.quantize(float(v), centre=0.0, scale=1.0) for v in sent[:, 1]] * 2
    )
    assert found.tallies == {"null.imputed": 2, "outside.imputed": 2, "stale.imputed": 1}
    assert (found.freshness.n, found.freshness.total) == (1, 60_001)


def test_what_is_refused_is_named_and_counted_by_kind(rig: Rig, tmp_path: Path) -> None:
    folder = guarded(
        tmp_path / "b",
        f0={"on_null": "reject"},
        f1={"on_outside": "reject", "range": [-5.0, 5.0]},
        f2={"on_stale": "reject", "ttl_s": 1.5},
        f3={"ttl_s": 1.0},
    )
    worker = rig.start(rig.served(folder))
    fine = [[0.0, 0.0, 0.0, 0.0]]
    for x, options, wanted in (
        ([[0, 0, 0, 0], [NAN, 0, 0, 0]], {}, "x[1][0] (f0): wanted a number, got NaN"),
        ([[0, 5.5, 0, 0]], {}, "x[0][1] (f1): wanted -5 to 5, got 5.5"),
        (fine, {"parameters": {"age_ms": 1501}}, "x[2] (f2): wanted at most 1.5 s, got a value 1.501 s old"),
    ):
        status, body, _ = ask(rig, x, **options)  # type: ignore[arg-type]
        assert (status, body["error"]) == (400, wanted)
    # A null where no policy says otherwise is refused and counted too; so is a stale value that only counts.
    assert ask(rig, [[0, 0, 0, NAN]])[0] == 400
    assert ask(rig, fine, parameters={"age_ms": 1200})[0] == 200
    assert ask(rig, fine)[0] == 200
    rig.flush(worker)
    found = window(rig)
    assert (found.counts.ok, found.counts.invalid) == (2, 4)
    assert found.tallies == {"null.rejected": 2, "outside.rejected": 1, "stale.rejected": 1, "stale.counted": 1}


WRONG_AGES: list[tuple[dict[str, Any], str]] = [
    ({"parameters": {"age_ms": -1}}, "parameters.age_ms: wanted milliseconds from 0, which is now,"),
    ({"parameters": {"age_ms": "old"}}, "parameters.age_ms: wanted milliseconds, got old"),
    ({"parameters": {"age_ms": True}}, "parameters.age_ms: wanted milliseconds, got True"),
    ({"parameters": {"age_ms": 1e300}}, "parameters.age_ms: wanted milliseconds from 0"),
    ({"age_ms": [1, 2, 3]}, "x.parameters.age_ms: wanted a number, or one for each of 4 columns, got 3 of them"),
    ({"age_ms": [1, 2, 3, -4]}, "x.parameters.age_ms[3]: wanted milliseconds from 0"),
    ({"age_ms": {}}, "x.parameters.age_ms: wanted milliseconds, got {}"),
    ({"parameters": {"sequence_id": -1}}, "parameters.sequence_id: wanted a whole number from 0 to 2**64 - 1, got -1"),
    ({"parameters": {"sequence_id": 1.5}}, "parameters.sequence_id: wanted a whole number, or text"),
    ({"parameters": {"sequence_id": "a" * 300}}, "parameters.sequence_id: wanted a whole number, or text"),
    ({"parameters": {"sequence_id": 1, "sequence_end": 1}}, "parameters.sequence_end: wanted true or false, got 1"),
    ({"parameters": {"sequence_start": True}}, "parameters.sequence_id: wanted a sequence_id beside sequence_start"),
]


def test_parameters_that_cannot_be_are_refused_by_any_model(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    for options, words in WRONG_AGES:
        status, body, _ = ask(rig, [[0, 0, 0, 0]], **options)
        assert status == 400
        assert body["error"].startswith(words)
    assert ask(rig, [[0, 0, 0, 0]], parameters={"age_ms": 0.25})[0] == 200
    rig.flush(worker)
    assert (window(rig).counts.ok, window(rig).counts.invalid) == (1, len(WRONG_AGES))
    # Said by a request of a model without a time to live, an age counts as freshness all the same.
    assert (window(rig).freshness.n, window(rig).freshness.total) == (1, 1)


def test_the_fallback_model_answers_by_its_own_name(rig: Rig, tmp_path: Path) -> None:
    first = guarded(tmp_path / "a", fallback="spare", f0={"on_null": "fallback"}, f1={"on_outside": "fallback"})
    # The spare is another model of the same kind: it takes a null for 0.
    second = tmp_path / "b"
    models.build_bundle(second, model="spare", version="2.1.0", seed=5)
    features = json.loads((second / "manifest.json").read_bytes())["features"]
    features[0].update(on_null="impute", impute=0.0)
    models.build_bundle(
        second, model="spare", version="2.1.0", seed=5, changes={"features": features, "requires": ["guards"]}
    )
    worker = rig.start(rig.served(first), rig.served(second, name="spare", version="2.1.0"))
    x, _ = models.rows(2)
    status, body, headers = ask(rig, x)
    assert (status, body["model_name"], body["model_version"]) == (200, "gas", "1.0.0")
    assert "fallback" not in body["parameters"]
    sent, read = x.copy(), x.copy()
    sent[1, 0], read[1, 0] = NAN, 0.0
    status, body, headers = ask(rig, sent)
    assert (status, body["model_name"], body["model_version"], body["id"]) == (200, "spare", "2.1.0", "seven")
    assert body["parameters"] == {
        "fallback": True,
        "fallback_for": "gas",
        "fallback_reason": "x[1][0] (f0): wanted a number, got NaN",
    }
    assert headers["Skerry-Fallback"] == "gas"
    assert "Skerry-Prediction-Id" not in headers
    np.testing.assert_allclose(answer(body), models.probabilities(read, seed=5), atol=1e-5)
    rig.flush(worker)
    found = window(rig)
    assert (found.counts.ok, found.counts.fallback, found.counts.rows) == (2, 1, 4)
    assert found.tallies == {"null.fallback": 1}
    assert found.features["f0"].null == 1
    # Classes that another model saw are not this one's: only the first request's two rows are in the outputs.
    assert sum(found.outputs["probabilities"].counts) == 2
    assert not [window for _, window in rig.windows if window.key.model == "spare"]


def test_without_its_fallback_model_a_request_gets_503_and_a_reason(rig: Rig, tmp_path: Path) -> None:
    folder = guarded(tmp_path / "a", fallback="spare", f0={"on_null": "fallback"})
    worker = rig.start(rig.served(folder))
    x, _ = models.rows(1)
    sent = x.copy()
    sent[0, 0] = NAN
    status, body, _ = ask(rig, sent)
    wanted = "x[0][0] (f0): wanted a number, got NaN; spare should answer instead: it is not served here"
    assert (status, body["error"]) == (503, wanted)
    assert ask(rig, x)[0] == 200
    models.build_bundle(tmp_path / "other", model="spare", n_features=5)
    worker = rig.swap(worker, rig.served(folder), rig.served(tmp_path / "other", name="spare"))
    status, body, _ = ask(rig, sent)
    assert (status, body["error"].rpartition("; ")[2]) == (
        503,
        "spare should answer instead: its input x is not the same",
    )
    rig.flush(worker)
    assert (window(rig).counts.shed, window(rig).counts.ok, window(rig).counts.fallback) == (2, 1, 0)
    assert window(rig).tallies == {"null.fallback": 2}


def test_tritonclient_sends_ages_and_binary_data_to_guards(rig: Rig, tmp_path: Path) -> None:
    folder = guarded(tmp_path / "b", f0={"on_null": "impute", "impute": 0.5, "on_stale": "reject", "ttl_s": 1.0})
    rig.start(rig.served(folder))
    x, _ = models.rows(4)
    read = x.copy()
    x[2, 0], read[2, 0] = NAN, 0.5
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        given = triton.InferInput("x", [4, 4], "FP32")
        given.set_data_from_numpy(x)
        found = client.infer("gas", [given], parameters={"age_ms": 900}).as_numpy("probabilities")
        np.testing.assert_allclose(found, models.probabilities(read), atol=1e-5)
        with pytest.raises(Exception, match=r"at most 1 s, got a value 1\.1 s old"):
            client.infer("gas", [given], parameters={"age_ms": 1100})


def test_guards_hold_in_the_inference_thread_too(rig: Rig, tmp_path: Path) -> None:
    folder = guarded(
        tmp_path / "a", fallback="spare", f0={"on_null": "fallback"}, f1={"on_null": "impute", "impute": 0.0}
    )
    models.build_bundle(tmp_path / "b", model="spare", changes={"features": []})
    worker = rig.start(rig.served(folder), rig.served(tmp_path / "b", name="spare"), inline_below_us=0.0)
    x, _ = models.rows(1)
    imputed = x.copy()
    imputed[0, 1] = NAN
    assert ask(rig, imputed)[1]["model_name"] == "gas"
    x[0, 0] = NAN
    assert ask(rig, x)[1]["model_name"] == "spare"
    rig.flush(worker)
    assert window(rig).tallies == {"null.imputed": 1, "null.fallback": 1}
    assert window(rig).latency.queue.total > 0
    assert mf.parse((folder / "manifest.json").read_bytes()).fallback == "spare"
