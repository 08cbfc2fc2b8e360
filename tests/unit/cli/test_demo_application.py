"""The demo's application: ground truth follows each answer, late, once, and through a lost connection."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_cli.demo.application import Application, write_world


class Agent(http.server.ThreadingHTTPServer):
    """Answers inferences; hangs up on the first feedback after having taken it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answered: dict[str, float] = {}
        self.labelled: dict[str, tuple[str, float]] = {}
        self.hung_up = False


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Agent

    def do_GET(self) -> None:
        self._answer({"ready": True})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/skerry/v1/feedback":
            prediction = f"p-{len(self.server.answered)}"
            self.server.answered[prediction] = time.monotonic()
            outputs = [{"name": "probabilities", "data": [1, 0, 0, 0, 0, 0]}]
            self._answer({"model_version": "1.0.0", "outputs": outputs, "parameters": {"prediction_id": prediction}})
            return
        outcomes = []
        for item in asked["feedback"]:
            seen = item["id"] in self.server.labelled
            outcomes.append({"id": item["id"], "outcome": "duplicate" if seen else "matched"})
            self.server.labelled.setdefault(item["id"], (item["label"], time.monotonic()))
        if not self.server.hung_up:
            self.server.hung_up = True
            self.close_connection = True
            return
        self._answer({"feedback": outcomes})

    def _answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def agent() -> Iterator[Agent]:
    server = Agent()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_until(application: Application, agent: Agent, labels: int) -> None:
    deadline = time.monotonic() + 30.0
    application.run(lambda: sum(application.counts.labels.values()) >= labels or time.monotonic() > deadline)


def application(agent: Agent, folder: Path, after_s: tuple[float, float]) -> Application:
    host, port = agent.server_address[:2]
    (folder / "serving.json").write_text(json.dumps({"host": host, "port": port}))
    return Application(
        device="d",
        serving=folder / "serving.json",
        out=folder / "counts.json",
        model="gas",
        world=folder / "world",
        seed=1,
        rate=50.0,
        truth_after_s=after_s,
    )


def test_every_label_counts_once_through_a_connection_that_was_lost_after_it_had_arrived(
    agent: Agent, tmp_path: Path
) -> None:
    write_world(tmp_path / "world", 1)
    asking = application(agent, tmp_path, (0.1, 0.4))
    run_until(asking, agent, 30)
    assert asking.counts.label_retries == 1 and asking.counts.failed == 0
    assert asking.counts.labels == {"matched": len(agent.labelled)} and len(agent.labelled) >= 30
    assert all(at - agent.answered[prediction] >= 0.1 for prediction, (_, at) in agent.labelled.items())


def test_the_world_changes_under_a_running_application(agent: Agent, tmp_path: Path) -> None:
    """Batch 1 has toluene in one row of six, batch 3 in none."""
    write_world(tmp_path / "world", 1)
    asking = application(agent, tmp_path, (0.0, 0.0))
    run_until(asking, agent, 60)
    before = set(agent.answered)
    write_world(tmp_path / "world", 3)
    run_until(asking, agent, 200)
    first = [label for prediction, (label, _) in agent.labelled.items() if prediction in before]
    later = [label for prediction, (label, _) in agent.labelled.items() if prediction not in before]
    assert "Toluene" in first
    assert len(later) > 100 and "Toluene" not in later
