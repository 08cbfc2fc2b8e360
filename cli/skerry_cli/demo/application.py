"""An application on a device, as small as they come: it asks its own agent for an inference, ten times a second, and tells it
the truth about each answer some seconds later.

A process of its own. It reads the agent's address, keeps one HTTP connection, never repeats an inference, and counts: attempts,
answers by the version that gave them, right answers, failures with their time. The counts go to a file that is replaced as a
whole every second (or as ``--write-every`` says) and once more at the end. Rows are drawn with replacement by a seed, from the batch that the world's file
names: all applications read one such file, so that the world changes for all of them at once. Of batch 0 there are no rows: nobody
asks, and labels are sent as they become due.

Ground truth is sent 5 to 15 s after its answer (or as ``--truth-after`` says), drawn evenly. A feedback request that got no answer is sent again, which the
agent's ``duplicate`` makes safe; what is not yet due when the application ends is never sent.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from skerry_cli.demo import data

WRITE_EVERY_S = 1.0
TRUTH_AFTER_S = (5.0, 15.0)
"""Between an answer and its label, at least and at most."""
_TIMEOUT_S = 15.0
_MAX_FAILURES = 200
_MAX_LABELS = 500
_LABEL_EVERY_S = 0.5


@dataclass(slots=True)
class Counts:
    """What the application saw.

    Attributes:
        attempts = answered + failed; answered: with status 200.
        versions: model version -> [answered, right]; a failure is kept as [seconds since 1970, what happened].
        slowest_ms: of the answered.
        changes: [seconds since 1970, version] of each answer that another version gave than the one before.
        labels: what the agent took labels for -> how many; each label counts once, at its first answer.
        matched: version that had answered -> how many labels were matched.
        label_retries: feedback requests that got no answer and were sent again.
        labels_due: labels that wait for their time or for an answer.
        failed_by: error's name -> failures.
        batch: what it reads as it writes this, 0: it asks nothing.
    """

    device: str
    attempts: int = 0
    answered: int = 0
    failed: int = 0
    versions: dict[str, list[int]] = field(default_factory=dict)
    failures: list[list[Any]] = field(default_factory=list)
    slowest_ms: float = 0.0
    last_answer_s: float = 0.0
    changes: list[list[Any]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    matched: dict[str, int] = field(default_factory=dict)
    label_retries: int = 0
    labels_due: int = 0
    failed_by: dict[str, int] = field(default_factory=dict)
    batch: int = -1
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """A label to be sent when it is ``due_s`` (monotonic). ``version``: which gave the answer; ``again``: it was sent before, and nobody knows whether it arrived."""

    due_s: float
    prediction: str
    label: str
    version: str
    again: bool = False


class Application:
    """See the module. ``truth_after_s``: between an answer and its label, at least and at most; ``write_every_s``: the counts."""

    def __init__(
        self,
        *,
        device: str,
        serving: Path,
        out: Path,
        model: str,
        world: Path,
        seed: int,
        rate: float,
        truth_after_s: tuple[float, float] = TRUTH_AFTER_S,
        write_every_s: float = WRITE_EVERY_S,
    ) -> None:
        self._serving = serving
        self._out = out
        self._model = model
        self._rate = rate
        self._world = world
        self._batches: dict[int, data.Readings] = {}
        self._truth_after_s = truth_after_s
        self._write_every_s = write_every_s
        self._truths: list[Truth] = []
        self._labelled_s = 0.0
        self._draw = np.random.default_rng(seed)
        self._connection: http.client.HTTPConnection | None = None
        self.counts = Counts(device=device)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Waits until the model is ready, then asks at the rate until ``stopped``."""
        while not stopped() and not self._ready():
            time.sleep(0.3)
        due, written = time.monotonic(), 0.0
        while not stopped():
            self.counts.batch = read_world(self._world)
            if self.counts.batch:
                self._ask(self._rows(self.counts.batch))
            now = time.monotonic()
            if now - self._labelled_s >= _LABEL_EVERY_S:
                self._tell(now)
                self._labelled_s = now
            if now - written >= self._write_every_s:
                self._write()
                written = now
            # A slow answer is not made up for by a burst.
            due = max(due + 1.0 / self._rate, now)
            time.sleep(max(0.0, due - now))
        self.counts.done = True
        self._write()

    def _ready(self) -> bool:
        try:
            connection = self._connect()
            connection.request("GET", f"/v2/models/{self._model}/ready")
            answer = connection.getresponse()
            answer.read()
            return answer.status == 200
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            self._drop()
            return False

    def _ask(self, rows: data.Readings) -> None:
        row = int(self._draw.integers(len(rows)))
        values = rows.x[row]
        body = json.dumps(
            {
                "inputs": [
                    {
                        "name": "readings",
                        "shape": [1, len(values)],
                        "datatype": "FP32",
                        "data": [float(v) for v in values],
                    }
                ]
            }
        ).encode()
        self.counts.attempts += 1
        began = time.monotonic()
        try:
            connection = self._connect()
            connection.request("POST", f"/v2/models/{self._model}/infer", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}: {text[:120].decode(errors='replace')}")
            told = json.loads(text)
            version, probabilities = str(told["model_version"]), told["outputs"][0]["data"]
            prediction = str(told["parameters"]["prediction_id"])
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            self._drop()
            self.counts.failed += 1
            name = type(error).__name__
            self.counts.failed_by[name] = self.counts.failed_by.get(name, 0) + 1
            if len(self.counts.failures) < _MAX_FAILURES:
                self.counts.failures.append([time.time(), f"{name}: {error}"[:200]])
            return
        right = max(range(len(probabilities)), key=probabilities.__getitem__) == int(rows.y[row])
        tally = self.counts.versions.setdefault(version, [0, 0])
        tally[0] += 1
        tally[1] += right
        self.counts.answered += 1
        self.counts.last_answer_s = time.time()
        if not self.counts.changes or self.counts.changes[-1][1] != version:
            self.counts.changes.append([self.counts.last_answer_s, version])
        now = time.monotonic()
        self.counts.slowest_ms = max(self.counts.slowest_ms, (now - began) * 1000)
        due_s = now + float(self._draw.uniform(*self._truth_after_s))
        truth = rows.classes[int(rows.y[row])]
        self._truths.append(Truth(due_s=due_s, prediction=prediction, label=truth, version=version))

    def _rows(self, batch: int) -> data.Readings:
        if batch not in self._batches:
            self._batches[batch] = data.load([batch])
        return self._batches[batch]

    def _tell(self, now: float) -> None:
        """Sends what is due."""
        due = [truth for truth in self._truths if truth.due_s <= now][:_MAX_LABELS]
        if not due:
            return
        waiting = {id(truth) for truth in due}
        self._truths = [truth for truth in self._truths if id(truth) not in waiting]
        body = {"feedback": [{"id": truth.prediction, "label": truth.label} for truth in due]}
        try:
            connection = self._connect()
            connection.request(
                "POST", "/skerry/v1/feedback", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}: {text[:120].decode(errors='replace')}")
            outcomes = [str(item["outcome"]) for item in json.loads(text)["feedback"]]
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            self._drop()
            self.counts.label_retries += 1
            self._truths += [replace(truth, again=True) for truth in due]
            return
        for truth, outcome in zip(due, outcomes, strict=True):
            # The attempt that got no answer had arrived: the label was matched then.
            found = "matched" if truth.again and outcome == "duplicate" else outcome
            self.counts.labels[found] = self.counts.labels.get(found, 0) + 1
            if found == "matched":
                self.counts.matched[truth.version] = self.counts.matched.get(truth.version, 0) + 1

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is None:
            address = json.loads(self._serving.read_bytes())
            self._connection = http.client.HTTPConnection(address["host"], int(address["port"]), timeout=_TIMEOUT_S)
            self._connection.connect()
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _write(self) -> None:
        self.counts.labels_due = len(self._truths)
        staging = self._out.with_name(f".{self._out.name}")
        staging.write_text(json.dumps(asdict(self.counts)))
        os.replace(staging, self._out)


def write_world(path: Path, batch: int) -> None:
    """Changes the batch that every application reads, at once."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(f"{batch}\n")
    os.replace(staging, path)


def read_world(path: Path) -> int:
    """The batch that applications read now."""
    return int(path.read_text())


def read_counts(path: Path) -> Counts | None:
    """The counts an application last wrote; None before the first."""
    try:
        return Counts(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def main() -> None:
    """The process's entry."""
    parser = argparse.ArgumentParser(prog="skerry-demo-application")
    parser.add_argument("--device", required=True)
    parser.add_argument("--serving", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--world", type=Path, required=True, help="file with the number of the batch to read")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--truth-after", type=float, nargs=2, dest="truth_after_s", default=TRUTH_AFTER_S)
    parser.add_argument("--write-every", type=float, dest="write_every_s", default=WRITE_EVERY_S)
    application = Application(**vars(parser.parse_args()))
    ended: list[int] = []
    # The request under way is finished and counted before the process ends.
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    application.run(lambda: bool(ended))


if __name__ == "__main__":
    main()
