"""Late labels: each is counted once, under the key of the prediction it is about, whatever died in between."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import random
import signal
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_agent import workerwire as ww
from skerry_contract import window as w

from tests import models
from tests.integration.worker.rig import Rig, Worker

CLASSES = models.labels(3)


class App:
    """An application on one keep-alive connection."""

    def __init__(self, port: int, *, timeout: float = 20.0) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        self.connection.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body))
        response = self.connection.getresponse()
        self.header = response.getheader("Skerry-Prediction-Id")
        return response.status, json.loads(response.read())

    def infer(self, rows: np.ndarray, *, ident: str = "", model: str = "gas") -> tuple[str, list[int]]:
        """The prediction's id and the predicted classes."""
        n, wide = rows.shape
        tensor = {"name": "x", "shape": [n, wide], "datatype": "FP32", "data": rows.ravel().tolist()}
        status, answer = self.post(f"/v2/models/{model}/infer", {"id": ident, "inputs": [tensor]})
        assert status == 200, answer
        assert answer["id"] == ident
        prediction = answer["parameters"]["prediction_id"]
        assert self.header == prediction
        return prediction, np.reshape(answer["outputs"][0]["data"], (n, -1)).argmax(1).tolist()

    def label(self, *labels: dict[str, Any]) -> list[str]:
        """What each was taken for."""
        status, answer = self.post("/skerry/v1/feedback", {"feedback": list(labels)})
        assert status == 200, answer
        assert [one["id"] for one in answer["feedback"]] == [one["id"] for one in labels]
        return [one["outcome"] for one in answer["feedback"]]


def one_row(i: int) -> np.ndarray:
    return models.rows(64)[0][i % 64][None]


def test_labels_are_matched_by_name_and_index_and_counted_by_true_and_predicted_class(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle, arm="candidate", rollout="r7", stage=2))
    app = App(rig.port)
    rng = random.Random(1)
    wanted: Counter[tuple[int, int]] = Counter()
    for i in range(50):
        prediction, (predicted,) = app.infer(one_row(i))
        truth = rng.randrange(3)
        wanted[truth, predicted] += 1
        assert app.label({"id": prediction, "label": truth if i % 2 else CLASSES[truth]}) == ["matched"]
    assert rig.stop(worker) == 0
    found = rig.labels(where=lambda key: (key.arm, key.rollout, key.stage) == ("candidate", "r7", 2))
    assert found == w.Labels(
        confusion=tuple(wanted[truth, predicted] for truth in range(3) for predicted in range(3)), matched=50
    )
    lags = rig.lags(where=lambda key: key.rollout == "r7")
    assert {truth: lag.n for truth, lag in lags.items()} == {
        truth: sum(wanted[truth, predicted] for predicted in range(3)) for truth in range(3)
    }
    assert all(lag.total <= 5 * lag.n for lag in lags.values())
    assert rig.total().ok == 50


def test_a_label_that_comes_again_is_a_duplicate_and_another_one_conflicts_and_changes_nothing(
    rig: Rig, bundle: Path
) -> None:
    worker = rig.start(rig.served(bundle))
    app = App(rig.port)
    prediction, (predicted,) = app.infer(one_row(0))
    sent = [{"id": prediction, "label": label} for label in (1, CLASSES[1], 2, 1)]
    assert app.label(*sent) == ["matched", "duplicate", "conflicting", "duplicate"]
    rig.stop(worker)
    confusion = [0] * 9
    confusion[3 + predicted] = 1
    assert rig.labels() == w.Labels(confusion=tuple(confusion), matched=1, duplicate=2, conflicting=1)


def test_a_label_says_how_long_it_took_also_when_its_worker_was_killed_before_the_window(
    rig: Rig, bundle: Path
) -> None:
    worker = rig.start(rig.served(bundle))
    app = App(rig.port)
    early, _ = app.infer(one_row(0))
    late, _ = app.infer(one_row(1))
    assert app.label({"id": early, "label": 0}) == ["matched"]
    asked = time.monotonic()
    time.sleep(2.2)
    assert app.label({"id": late, "label": 2}, {"id": early, "label": 0}) == ["matched", "duplicate"]
    told = time.monotonic() - asked
    rig.kill(worker)
    successor = rig.start(rig.served(bundle))
    rig.recover(successor, worker.rings["gas"])
    rig.adopt_all(worker, successor)
    rig.flush(successor)
    rig.stop(successor)
    lags = rig.lags()
    # Whole seconds, and predictions are dated to the second: of one that took 2.2 s, 2 or 3. A duplicate adds nothing.
    assert {truth: lag.n for truth, lag in lags.items()} == {0: 1, 2: 1}
    assert lags[0].total <= 1
    assert 2 <= lags[2].total <= told + 1


@pytest.mark.parametrize(
    "name", ["nonsense", "gas-0123456789-0", "position", "not-a-head", "refused", "gas-", "é" * 100, ""]
)
def test_a_label_without_a_prediction_is_unknown_and_counted_under_the_present_key(
    rig: Rig, bundle: Path, name: str
) -> None:
    worker = rig.start(rig.served(bundle, arm="control", rollout="r1", stage=1))
    app = App(rig.port)
    prediction, _ = app.infer(models.rows(3)[0])
    head, _, position = prediction.rpartition("-")
    if name == "position":
        name = f"{head}-{int(position, 16) + 3:x}"
    elif name == "not-a-head":
        name = f"{head}-{int(position, 16) + 1:x}"
    elif name == "refused":
        assert app.post("/v2/models/gas/infer", "{}")[0] == 400
        name = f"{head}-3"
    assert app.label({"id": name, "label": 0}) == ["unknown"]
    rig.stop(worker)
    assert rig.labels(where=lambda key: key.stage == 1) == w.Labels(unknown=1)


def test_each_row_of_a_batch_has_its_own_label(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    app = App(rig.port)
    rng = np.random.default_rng(3)
    wanted: Counter[tuple[int, int]] = Counter()
    for i, n in enumerate([5, 2000, 1, 3, 2000, 2000, 17, 2000]):
        x = models.rows(n)[0][rng.permutation(n)]
        prediction, predicted = app.infer(x)
        chosen = sorted(rng.choice(n, min(n, 40), replace=False).tolist())
        labels = [{"id": prediction, "label": int(rng.integers(3)), "row": row} for row in chosen]
        if n == 1:
            del labels[0]["row"]
        assert app.label(*labels) == ["matched"] * len(chosen), i
        assert app.label(*labels[:3]) == ["duplicate"] * min(n, 3)
        for one, row in zip(labels, chosen, strict=True):
            wanted[one["label"], predicted[row]] += 1
        assert app.label({"id": prediction, "label": 0, "row": n}) == ["unknown"]
        if n > 1:
            assert app.label({"id": prediction, "label": 0}) == ["invalid"]
    rig.stop(worker)
    found = rig.labels()
    assert found.confusion == tuple(wanted[t, p] for t in range(3) for p in range(3))
    assert found.matched == sum(wanted.values())
    assert found.unknown == 8


def test_a_clients_own_id_names_its_latest_prediction_also_after_a_swap(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle, arm="control", rollout="r1", stage=1))
    app = App(rig.port)
    app.infer(one_row(0), ident="order/7")
    _, (second,) = app.infer(one_row(1), ident="order/7")
    _, (other,) = app.infer(one_row(2), ident="órder 8")
    assert app.label({"id": "order/7", "label": 2}) == ["matched"]
    worker = rig.swap(worker, rig.served(bundle, arm="candidate", rollout="r1", stage=2))
    assert app.label({"id": "órder 8", "label": 1}, {"id": "order/7", "label": 2}) == ["matched", "duplicate"]
    app.infer(one_row(3), ident="order/7")
    assert app.label({"id": "order/7", "label": 2}, {"id": "order/9", "label": 2}) == ["matched", "unknown"]
    rig.stop(worker)
    confusion = [0] * 9
    confusion[2 * 3 + second] += 1
    confusion[1 * 3 + other] += 1
    old = rig.labels(where=lambda key: key.arm == "control")
    assert (old.confusion, old.duplicate, old.unknown) == (tuple(confusion), 1, 0)
    new = rig.labels(where=lambda key: key.arm == "candidate")
    assert (new.matched, new.unknown) == (1, 1)


def test_own_ids_among_ten_thousand_predictions_are_found_after_a_swap_and_after_kill_9(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle, arm="control", rollout="r1", stage=1))
    app = App(rig.port, timeout=60)
    wanted: Counter[tuple[int, int]] = Counter()
    rows = models.rows(2000)[0]
    predicted = {i: app.infer(rows, ident=f"order/{i}")[1][0] for i in range(6)}
    worker = rig.swap(worker, rig.served(bundle, arm="candidate", rollout="r1", stage=2))
    assert app.label({"id": "order/2", "label": 1, "row": 0}, {"id": "order/9", "label": 1}) == ["matched", "unknown"]
    rig.kill(worker)
    old, worker = worker, rig.start(rig.served(bundle, arm="candidate", rollout="r1", stage=3))
    rig.recover(worker, old.rings["gas"])
    rig.adopt_all(old, worker)
    app = App(rig.port, timeout=60)
    labels = [{"id": f"order/{i}", "label": 1, "row": 0} for i in range(6)]
    assert app.label(*labels) == ["duplicate" if i == 2 else "matched" for i in range(6)]
    rig.stop(worker)
    for i in range(6):
        wanted[1, predicted[i]] += 1
    found = rig.labels(where=lambda key: key.stage == 1)
    assert found.confusion == tuple(wanted[truth, one] for truth in range(3) for one in range(3))
    assert (found.matched, found.duplicate) == (6, 1)


def test_labels_of_predictions_before_swaps_and_new_keys_are_counted_under_the_old_keys(
    rig: Rig, tmp_path: Path
) -> None:
    for version in ("1.0.0", "1.1.0"):
        models.build_bundle(tmp_path / version, version=version)
    worker = rig.start(rig.served(tmp_path / "1.0.0", arm="control", rollout="r1", stage=1))
    app = App(rig.port)
    predictions: list[tuple[str, int]] = []

    def predict(stage: int) -> None:
        for i in range(20):
            predictions.append((app.infer(one_row(i))[0], stage))

    predict(1)
    new_ring = rig.ring_path()
    worker.books.add(str(Path(new_ring).with_suffix(".labels")))
    rig.send(worker, ww.Rekey(model="gas", ring=new_ring, arm="candidate", rollout="r1", stage=2))
    worker.wait_for(ww.Rekeyed)
    predict(2)
    worker = rig.swap(worker, rig.served(tmp_path / "1.1.0", version="1.1.0", arm="candidate", rollout="r1", stage=3))
    predict(3)
    worker = rig.swap(worker, rig.served(tmp_path / "1.0.0", arm="none"))
    random.Random(2).shuffle(predictions)
    for prediction, _ in predictions:
        assert app.label({"id": prediction, "label": CLASSES[1]}) == ["matched"]
    rig.flush(worker)
    digests = {window.key.stage: window.key.bundle for _, window in rig.windows if window.labels.matched}
    assert sorted(digests) == [1, 2, 3]
    assert digests[1] == digests[2] != digests[3]
    for stage in (1, 2, 3):
        assert rig.labels(where=lambda key, stage=stage: key.stage == stage).matched == 20
    rig.stop(worker)


def test_kill_9_between_prediction_and_label_forgets_no_prediction(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle, arm="control", rollout="r1", stage=1))
    app = App(rig.port)
    predictions = [app.infer(one_row(i))[0] for i in range(30)]
    batch, _ = app.infer(models.rows(7)[0], ident="mine")
    # Some are labelled before, nothing is folded, no window is cut.
    assert app.label(*({"id": one, "label": 0} for one in predictions[:10])) == ["matched"] * 10
    rig.kill(worker)
    successor = rig.start(rig.served(bundle, arm="candidate", rollout="r2", stage=5))
    rig.recover(successor, worker.rings["gas"])
    rig.adopt_all(worker, successor)
    app = App(rig.port)
    assert app.label(*({"id": one, "label": 0} for one in predictions)) == ["duplicate"] * 10 + ["matched"] * 20
    assert app.label({"id": batch, "label": 1, "row": 6}, {"id": "mine", "label": 1, "row": 5}) == ["matched"] * 2
    rig.stop(successor)
    old = rig.labels(where=lambda key: key.stage == 1)
    assert (old.matched, old.duplicate, sum(old.confusion)) == (32, 10, 32)
    assert rig.labels(where=lambda key: key.stage == 5) == w.Labels()
    assert rig.total(where=lambda key: key.stage == 1).ok == 31


def kill_behind(worker: Worker, answered: list[str], n: int, more_s: float) -> None:
    """Kills once ``n`` were answered and a moment more has passed, wherever that falls."""
    end = time.monotonic() + 120
    while len(answered) < n and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(more_s)
    worker.process.kill()


def test_kill_9_at_random_moments_counts_each_answered_label_once(rig: Rig, bundle: Path) -> None:
    rng = random.Random(4)
    told: Counter[str] = Counter()
    matched_unheard = others_unheard = 0
    pending: list[str] = []
    worker = rig.start(rig.served(bundle), fold_interval_s=0.02)
    for _ in range(6):
        app = App(rig.port)
        killer = threading.Thread(
            target=kill_behind, args=(worker, pending, len(pending) + rng.randrange(10, 60), rng.uniform(0, 0.02))
        )
        killer.start()
        sent: list[str] = []
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                pending.append(app.infer(one_row(len(pending)))[0])
                sent = rng.sample(pending, min(len(pending), rng.randrange(1, 6)))
                outcomes = app.label(*({"id": one, "label": 1} for one in sent))
                told.update(outcomes)
                assert set(outcomes) <= {"matched", "duplicate"}
                sent = []
        killer.join()
        rig.kill(worker)
        successor = rig.start(rig.served(bundle), fold_interval_s=0.02)
        rig.recover(successor, worker.rings["gas"])
        rig.adopt_all(worker, successor)
        worker = successor
        if sent:
            # The last request had no answer: what was counted of it comes back as a duplicate, the rest as matched.
            again = Counter(App(rig.port).label(*({"id": one, "label": 1} for one in sent)))
            told.update(again)
            matched_unheard += len(sent)
            others_unheard += len(sent)
    everything = App(rig.port).label(*({"id": one, "label": 1} for one in pending[-1000:]))
    told.update(everything)
    rig.stop(worker)
    found = rig.labels()
    assert len(pending) > 50
    assert found.unknown == found.late == found.conflicting == 0
    # Every prediction that was labelled is matched once, exactly: the confusion matrix cannot hold more.
    assert len(set(pending)) >= found.matched >= told["matched"]
    assert found.matched - told["matched"] <= matched_unheard
    assert 0 <= found.duplicate - told["duplicate"] <= others_unheard
    assert found.matched == len(set(pending)) == sum(found.confusion)


def test_a_label_past_the_age_is_late_and_later_still_its_book_is_closed(rig: Rig, bundle: Path) -> None:
    ages = {"label_age_s": 1.0, "fold_interval_s": 0.1}
    worker = rig.start(rig.served(bundle, rollout="r1", stage=1), **ages)
    app = App(rig.port)
    first, _ = app.infer(one_row(0))
    second, _ = app.infer(one_row(1), ident="mine")
    assert app.label({"id": first, "label": 0}) == ["matched"]
    (book,) = worker.books
    worker = rig.swap(worker, rig.served(bundle, rollout="r1", stage=2), **ages)
    time.sleep(2.1)
    closed = worker.wait_for(ww.BookClosed)
    assert closed.book == book
    assert closed.damage == ""
    assert app.label({"id": second, "label": 0}) == ["unknown"]
    third, _ = app.infer(one_row(1))
    time.sleep(2.1)
    assert app.label({"id": third, "label": 0}) == ["late"]
    rig.stop(worker)
    assert rig.labels(where=lambda key: key.stage == 1).matched == 1
    assert rig.labels(where=lambda key: key.stage == 2) == w.Labels(late=1, unknown=1)


def test_what_newer_predictions_replaced_is_late(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle), label_predictions=8192)
    app = App(rig.port)
    first, _ = app.infer(one_row(0), ident="mine")
    for _ in range(5):
        last, _ = app.infer(models.rows(2000)[0])
    assert app.label({"id": first, "label": 0}, {"id": last, "label": 0, "row": 1999}) == ["late", "matched"]
    assert app.label({"id": "mine", "label": 0}) == ["unknown"]
    rig.stop(worker)
    assert (rig.labels().late, rig.labels().matched, rig.labels().unknown) == (1, 1, 1)


def test_only_so_many_books_are_kept(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle, stage=0), label_books=2)
    app = App(rig.port)
    predictions = []
    for stage in range(1, 5):
        time.sleep(1.05)  # books are told apart by the second of their last prediction
        predictions.append(app.infer(one_row(0))[0])
        worker = rig.swap(worker, rig.served(bundle, stage=stage), label_books=2)
    assert app.label(*({"id": one, "label": 0} for one in predictions)) == ["unknown", "unknown", "matched", "matched"]
    rig.stop(worker)


def test_a_label_waits_for_the_book_of_a_predecessor_that_still_leaves(rig: Rig, bundle: Path) -> None:
    old = rig.start(rig.served(bundle, stage=1))
    app = App(rig.port)
    prediction, _ = app.infer(one_row(0))
    new = rig.start(rig.served(bundle, stage=2))
    rig.successor = new
    rig.send(old, ww.Drain(deadline_s=5.0))
    old.wait_for(ww.Drained)
    assert old.process.wait(10) == 0
    heard: list[list[str]] = []
    thread = threading.Thread(target=lambda: heard.append(app.label({"id": prediction, "label": 0})))
    thread.start()
    time.sleep(0.3)
    assert heard == []
    rig.adopt_all(old, new)
    thread.join(10)
    assert heard == [["matched"]]
    rig.stop(new)
    assert rig.labels(where=lambda key: key.stage == 1).matched == 1


def test_a_worker_that_must_go_answers_labels_that_wait_and_counts_none_of_them(rig: Rig, bundle: Path) -> None:
    old = rig.start(rig.served(bundle))
    prediction, _ = App(rig.port).infer(one_row(0))
    rig.kill(old)
    worker = rig.start(rig.served(bundle))
    app = App(rig.port)
    heard: list[tuple[int, Any]] = []
    sent = {"feedback": [{"id": prediction, "label": 0}]}
    thread = threading.Thread(target=lambda: heard.append(app.post("/skerry/v1/feedback", sent)))
    thread.start()
    time.sleep(0.3)
    rig.stop(worker)
    thread.join(10)
    assert heard[0][0] == 503
    assert rig.labels() == w.Labels()


@pytest.mark.parametrize("damage", ["short", "magic", "boot"])
def test_a_damaged_book_is_reported_and_its_labels_are_unknown(rig: Rig, bundle: Path, damage: str) -> None:
    worker = rig.start(rig.served(bundle))
    prediction, _ = App(rig.port).infer(one_row(0))
    (book,) = (Path(path) for path in worker.books)
    rig.kill(worker)
    data = book.read_bytes()
    changed = {"short": data[:8192], "magic": b"X" + data[1:], "boot": data.replace(b"0" * 32, b"1" * 32)}
    book.write_bytes(changed[damage])
    successor = rig.start(rig.served(bundle))
    rig.recover(successor, worker.rings["gas"])
    rig.adopt_all(worker, successor)
    assert successor.wait_for(ww.BookClosed).damage
    assert App(rig.port).label({"id": prediction, "label": 0}) == ["unknown"]
    rig.stop(successor)
    assert rig.total().ok == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "feedback"),
        (b"[]", "feedback"),
        (b'{"feedback":{}}', "array"),
        (b'{"feedback":[{"id":"a"}]}', "label"),
        (b'{"feedback":[{"id":7,"label":1}]}', "id"),
        (b'{"feedback":[{"id":"a","label":1.5}]}', "label"),
        (b'{"feedback":[{"id":"a","label":null}]}', "label"),
        (b'{"feedback":[{"id":"a","label":1,"rows":2}]}', "rows"),
        (b'{"feedback":[' + b",".join([b'{"id":"a","label":1}'] * 1001) + b"]}", "1000"),
        (b"[" * 100_000, "feedback"),
    ],
)
def test_what_is_no_feedback_is_refused_whole_and_says_why(rig: Rig, bundle: Path, body: bytes, says: str) -> None:
    worker = rig.start(rig.served(bundle))
    status, answer = App(rig.port).post("/skerry/v1/feedback", body)
    assert status == 400
    assert says in answer["error"]
    rig.stop(worker)
    assert rig.labels() == w.Labels()


@pytest.mark.parametrize("label", ["class-3", "", 3, -1, 10**30, "Class-0"])
def test_a_label_that_is_no_class_is_refused_with_the_classes_and_not_counted(
    rig: Rig, bundle: Path, label: str | int
) -> None:
    worker = rig.start(rig.served(bundle))
    app = App(rig.port)
    prediction, _ = app.infer(one_row(0))
    status, answer = app.post("/skerry/v1/feedback", {"feedback": [{"id": prediction, "label": label}]})
    assert status == 200
    assert answer["feedback"][0]["outcome"] == "invalid"
    assert "class-0, class-1, class-2" in answer["feedback"][0]["error"]
    assert app.label({"id": prediction, "label": 0}) == ["matched"]
    rig.stop(worker)
    assert (rig.labels().matched, sum(rig.labels().confusion)) == (1, 1)


def test_with_several_models_the_id_or_the_label_says_which(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "gas")
    models.build_bundle(tmp_path / "smoke", model="smoke", classes=4)
    worker = rig.start(rig.served(tmp_path / "gas"), rig.served(tmp_path / "smoke", name="smoke"))
    app = App(rig.port)
    gas, _ = app.infer(one_row(0), ident="same")
    app.infer(one_row(0), ident="same", model="smoke")
    assert app.label({"id": gas, "label": 0, "model": "smoke"}) == ["invalid"]
    assert app.label({"id": "same", "label": 3, "model": "smoke"}, {"id": "same", "label": 2, "model": "gas"}) == [
        "matched",
        "matched",
    ]
    assert app.label({"id": "other", "label": 0}) == ["invalid"]
    assert app.label({"id": "other", "label": 0, "model": "smoke"}, {"id": "gas-0123456789-7", "label": 0}) == [
        "unknown",
        "unknown",
    ]
    rig.stop(worker)
    for model, classes in (("gas", 3), ("smoke", 4)):
        found = rig.labels(where=lambda key, model=model: key.model == model)
        assert (found.matched, found.unknown, len(found.confusion)) == (1, 1, classes**2)


def test_many_labels_at_once_wait_for_room_and_none_is_lost(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    app = App(rig.port)
    predictions = [app.infer(models.rows(2000)[0])[0] for _ in range(5)]
    labels = [{"id": one, "label": 1, "row": row} for one in predictions for row in range(2000)]
    for i in range(0, len(labels), 1000):
        assert app.label(*labels[i : i + 1000]) == ["matched"] * 1000
    rig.stop(worker)
    assert rig.labels().matched == 10_000
    assert len([cut for cut, _ in rig.windows if cut.ring.endswith(".labels")]) > 2


def test_without_labels_wanted_there_are_no_ids_and_no_book(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle), label_age_s=0.0)
    app = App(rig.port)
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": one_row(0)[0].tolist()}
    status, answer = app.post("/v2/models/gas/infer", {"inputs": [tensor]})
    assert status == 200
    assert "parameters" not in answer
    assert app.header is None
    assert list(rig.folder.glob("*.labels")) == []
    assert app.label({"id": "a", "label": 0}) == ["unknown"]
    rig.stop(worker)


def test_labels_of_many_classes_are_matched_and_have_no_matrix(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "wide", n_features=550, classes=1100, n_golden=1100, minimum_recall=0.0)
    worker = rig.start(rig.served(tmp_path / "wide"))
    app = App(rig.port)
    prediction, _ = app.infer(np.zeros((1, 550), np.float32))
    assert app.label({"id": prediction, "label": "class-1099"}) == ["matched"]
    rig.stop(worker)
    assert rig.labels() == w.Labels(matched=1)


def locked(path: str) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_book_is_locked_by_whoever_takes_its_labels_and_by_nobody_after_that(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    (book,) = worker.books
    assert locked(book)
    rig.send(worker, ww.Rekey(model="gas", ring=rig.ring_path()))
    worker.wait_for(ww.Rekeyed)
    # The ring was given up, and labels still come for what it held.
    assert (locked(worker.rings["gas"]), locked(book)) == (False, True)
    rig.kill(worker)
    assert not locked(book)
    successor = rig.start(rig.served(bundle))
    rig.send(successor, ww.AdoptBook(book=book, start=0))
    rig.flush(successor)
    assert locked(book)
    rig.kill(successor)
    assert not locked(book)


def test_the_book_of_a_worker_that_outlives_its_supervisor_is_taken_over_only_when_that_worker_is_gone(
    rig: Rig, bundle: Path
) -> None:
    worker = rig.start(rig.served(bundle))
    predictions = [App(rig.port).infer(one_row(i))[0] for i in range(10)]
    assert App(rig.port).label(*({"id": one, "label": 1} for one in predictions[:4])) == ["matched"] * 4
    (book,) = worker.books
    # It hangs, and with it its hold on the book; the next one is told to take the book all the same.
    worker.process.send_signal(signal.SIGSTOP)
    successor = rig.start(rig.served(bundle))
    rig.send(successor, ww.AdoptBook(book=book, start=0))
    rig.flush(successor)
    assert rig.labels() == w.Labels()
    assert not [m for m in successor.heard if isinstance(m, ww.BookClosed)]
    rig.kill(worker)
    rig.recover(successor, worker.rings["gas"])
    assert App(rig.port).label(*({"id": one, "label": 1} for one in predictions)) == ["duplicate"] * 4 + ["matched"] * 6
    rig.stop(successor)
    assert (rig.labels().matched, rig.labels().duplicate) == (10, 4)


BOOK_SCRIBBLES = {
    "written for ever": (16, struct.pack("<Q", 2**64 - 1)),
    "less written than committed": (16, struct.pack("<Q", 1)),
}


@pytest.mark.parametrize("scribble", BOOK_SCRIBBLES)
def test_a_scribbled_book_is_reported_and_counts_nothing(rig: Rig, bundle: Path, scribble: str) -> None:
    offset, changed = BOOK_SCRIBBLES[scribble]
    worker = rig.start(rig.served(bundle))
    one = App(rig.port).infer(one_row(0))[0]
    assert App(rig.port).label({"id": one, "label": 1}) == ["matched"]
    rig.kill(worker)
    (book,) = worker.books
    data = Path(book).read_bytes()
    Path(book).write_bytes(data[:offset] + changed + data[offset + len(changed) :])
    successor = rig.start(rig.served(bundle))
    rig.send(successor, ww.AdoptBook(book=book, start=2))
    assert successor.wait_for(ww.BookClosed).damage
    assert rig.labels() == w.Labels()
    assert App(rig.port).label({"id": one, "label": 1}) == ["unknown"]


def test_a_slot_that_was_scribbled_on_is_no_prediction_of_the_book_beside_it(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    predictions = [App(rig.port).infer(one_row(i))[0] for i in range(3)]
    rig.kill(worker)
    ring = Path(worker.rings["gas"])
    data = ring.read_bytes()
    ring.write_bytes(data[:4096] + b"\xff" + data[4097:])
    successor = rig.start(rig.served(bundle))
    assert rig.recover(successor, str(ring)).damage
    rig.adopt_all(worker, successor)
    assert App(rig.port).label(*({"id": one, "label": 1} for one in predictions)) == ["unknown", "matched", "matched"]
