"""Spans of a real worker, taken by a real HTTP collector that reads OTLP by its published definition."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from skerry_agent import workerwire as ww
from skerry_agent.worker import http1, ring
from skerry_agent.worker import spans as sp
from skerry_agent.worker.model import Model
from skerry_agent.worker.plan import plan_of
from skerry_agent.worker.recorder import Recorder
from skerry_contract import window as w
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load

from tests import models
from tests.integration.worker.rig import Rig

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
IDS = ("traceId", "spanId", "parentSpanId")


def as_protobuf_says(value: Any) -> Any:
    """OTLP's JSON has ids in hexadecimal digits, protobuf's own has bytes in base64."""
    if isinstance(value, dict):
        return {
            k: base64.b64encode(bytes.fromhex(v)).decode() if k in IDS else as_protobuf_says(v)
            for k, v in value.items()
        }
    return [as_protobuf_says(one) for one in value] if isinstance(value, list) else value


class Collector:
    """Takes spans. ``status`` is what it answers."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.status = 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                assert self.path == "/v1/traces"
                # Unknown fields and wrong types raise.
                found = json_format.ParseDict(as_protobuf_says(json.loads(body)), ExportTraceServiceRequest())
                if outer.status == 200:
                    outer.requests.append(found)
                self.send_response(outer.status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def spans(self) -> list[Span]:
        return [s for q in list(self.requests) for rs in q.resource_spans for ss in rs.scope_spans for s in ss.spans]

    def wait(self, n: int) -> list[Span]:
        end = time.monotonic() + 30
        while len(self.spans()) < n:
            assert time.monotonic() < end, f"{len(self.spans())} of {n} spans"
            time.sleep(0.02)
        return self.spans()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def ask(rig: Rig, *headers: dict[str, str], value: Any = None) -> list[int]:
    x, _ = models.rows(1)
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": x.ravel().tolist() if value is None else value}
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    statuses = []
    for one in headers:
        connection.request("POST", "/v2/models/gas/infer", json.dumps({"inputs": [tensor]}), one)
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()
    return statuses


def parent(span: str = PARENT, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{span}-{flags}"}


@pytest.mark.parametrize("inline_below_us", [1000.0, 0.0])
def test_a_request_of_a_trace_gives_its_spans_and_others_none(
    rig: Rig, tmp_path: Path, collector: Collector, inline_below_us: float
) -> None:
    models.build_bundle(tmp_path / "b", transforms=True)
    served = rig.served(tmp_path / "b")
    worker = rig.start(served, otlp_endpoint=collector.endpoint, device="d-1", inline_below_us=inline_below_us)
    before_ns = time.time_ns()
    assert ask(rig, parent(), {}, parent(flags="00"), {"traceparent": "00-nonsense"}) == [200] * 4
    found = {span.name: span for span in collector.wait(3)}
    root = found["infer gas"]
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.kind) == (TRACE, PARENT, Span.SPAN_KIND_SERVER)
    told = {a.key: a.value.string_value for a in root.attributes}
    assert told == {
        "skerry.model": "gas", "skerry.version": "1.0.0", "skerry.bundle": served.digest, "skerry.arm": "none",
        "skerry.outcome": "ok",
    }  # fmt: skip
    parts = {"transform", "infer"} | ({"queue"} if not inline_below_us else set())
    assert set(found) == {"infer gas"} | parts
    for name in parts:
        part = found[name]
        assert (part.trace_id, part.parent_span_id) == (root.trace_id, root.span_id)
        assert (
            root.start_time_unix_nano <= part.start_time_unix_nano < part.end_time_unix_nano <= root.end_time_unix_nano
        )
    assert before_ns <= root.start_time_unix_nano < root.end_time_unix_nano <= time.time_ns()
    assert len({span.span_id for span in found.values()}) == len(found)
    resource = {a.key: a.value.string_value for a in collector.requests[0].resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["host.name"]) == ("skerry-agent", "d-1")
    assert rig.stop(worker) == 0
    assert len(collector.spans()) == len(found), "nothing of the others"


def test_a_refused_request_is_traced_too_and_a_share_of_the_rest_begins_its_own_traces(
    rig: Rig, tmp_path: Path, collector: Collector
) -> None:
    models.build_bundle(tmp_path / "b")
    worker = rig.start(rig.served(tmp_path / "b"), otlp_endpoint=collector.endpoint, trace_share=1.0)
    assert ask(rig, parent(), value=[1.0, 2.0]) == [400]
    assert ask(rig, *[{}] * 20) == [200] * 20
    assert rig.stop(worker) == 0, "what is left is sent at the end"
    roots = [span for span in collector.spans() if span.name == "infer gas"]
    assert len(roots) == 21
    outcomes = [next(a.value.string_value for a in s.attributes if a.key == "skerry.outcome") for s in roots]
    assert sorted(outcomes) == ["invalid"] + ["ok"] * 20
    own = [span for span in roots if not span.parent_span_id]
    assert len({span.trace_id for span in own}) == 20
    assert all(span.status.code == Status.STATUS_CODE_UNSET for span in roots)


def test_a_collector_that_is_away_or_refuses_costs_spans_and_no_answer(
    rig: Rig, tmp_path: Path, collector: Collector
) -> None:
    models.build_bundle(tmp_path / "b")
    collector.status = 503
    worker = rig.start(
        rig.served(tmp_path / "b"), otlp_endpoint=collector.endpoint, trace_share=1.0, health_interval_s=0.05
    )
    assert ask(rig, *[{}] * 50) == [200] * 50
    health = worker.wait_for(ww.Health, where=lambda m: m.spans_dropped > 0)
    assert health.spans_sent == 0
    collector.status = 200
    assert ask(rig, parent()) == [200]
    collector.wait(2)
    assert rig.stop(worker) == 0
    assert rig.total().ok == 51


def test_the_queue_is_bounded_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    digest = models.build_bundle(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b", digest=digest)
    runner = load(bundle, bundle.manifest.variants[0])
    key = w.Key("gas", digest, "v", "none", "", 0)
    recorder = Recorder(
        key, plan_of(bundle.manifest), ring=str(tmp_path / "r.ring"), boot_id="0" * 32, send=lambda _: None, later=lambda act: act()
    )  # fmt: skip
    model = Model("gas", "1.0.0", bundle.manifest, runner, recorder, infer_us=1.0)
    recorder.other(ring.FAILED, 5, time.monotonic_ns())
    request = http1.Request(http1.Head(method="POST", path=b"/", keep_alive=True), b"", 0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Takes connections and never answers.
        found = sp.Spans(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces", 1.0)
        watched = found.watching(lambda *_: b"reply")
        began = time.monotonic()
        for _ in range(sp.QUEUE + 2 * sp.BATCH + 100):
            assert watched(model, request, lambda _: None) == b"reply"
        assert time.monotonic() - began < 4.0, "nobody waited for the collector"
        assert found.dropped >= 100
        found.close(0.0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"00-{TRACE}-{PARENT}-01", sp.Parent(TRACE, PARENT, True)),
        (f"00-{TRACE}-{PARENT}-00", sp.Parent(TRACE, PARENT, False)),
        (f"00-{TRACE}-{PARENT}-03", sp.Parent(TRACE, PARENT, True)),
        (f"01-{TRACE}-{PARENT}-01-later", sp.Parent(TRACE, PARENT, True)),
        (f"00-{TRACE}-{PARENT}-01-later", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        ("", None),
        ("00", None),
    ],
)
def test_traceparent_is_read_as_the_recommendation_says(text: str, wanted: sp.Parent | None) -> None:
    assert sp.parse_traceparent(text.encode()) == wanted


# --- explanations ----------------------------------------------------------------------------------------------------


def explainable(folder: Path, **explanations: Any) -> Path:
    models.build_bundle(folder, changes={"explanations": {"medians": {"f0": 0.25, "f3": -0.5}, **explanations}})
    return folder


def test_an_explanation_with_the_answer_is_a_span_within_its_requests(
    rig: Rig, tmp_path: Path, collector: Collector
) -> None:
    worker = rig.start(rig.served(explainable(tmp_path / "b")), otlp_endpoint=collector.endpoint)
    x, _ = models.rows(1)
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": x.ravel().tolist()}
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    for wish in (True, False):
        body = json.dumps({"inputs": [tensor], "parameters": {"explain": wish}})
        connection.request("POST", "/v2/models/gas/infer", body, parent())
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
    connection.close()
    assert rig.stop(worker) == 0
    (part,) = [span for span in collector.spans() if span.name == "explain"]
    roots = {span.span_id: span for span in collector.spans() if span.name == "infer gas"}
    assert len(roots) == 2
    root = roots[part.parent_span_id]
    assert part.trace_id.hex() == TRACE
    assert root.start_time_unix_nano <= part.start_time_unix_nano < part.end_time_unix_nano <= root.end_time_unix_nano


def test_chosen_and_asked_explanations_are_spans_where_their_requests_are_traced(
    rig: Rig, tmp_path: Path, collector: Collector
) -> None:
    bundle = explainable(tmp_path / "b", share=1.0, audit=["class-0"])
    worker = rig.start(rig.served(bundle), otlp_endpoint=collector.endpoint)
    assert ask(rig, parent(), {}, parent(), {}) == [200] * 4
    rig.flush(worker)
    x, _ = models.rows(1)
    question = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": x.ravel().tolist()}]}
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    for headers in (parent(), {}):
        connection.request("POST", "/skerry/v1/explain", json.dumps(question), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
    connection.close()
    end = time.monotonic() + 30
    while len(found := [span for span in collector.spans() if span.name == "explain gas"]) < 3:
        assert time.monotonic() < end, len(found)
        time.sleep(0.05)
    assert rig.stop(worker) == 0
    found = [span for span in collector.spans() if span.name == "explain gas"]
    why = [next(a.value.string_value for a in span.attributes if a.key == "skerry.why") for span in found]
    (asked,) = [span for span, of in zip(found, why, strict=True) if of == "asked"]
    assert (asked.parent_span_id.hex(), asked.kind) == (PARENT, Span.SPAN_KIND_SERVER)
    assert why.count("audit" if models.probabilities(x)[0].argmax() == 0 else "share") == 2
    chosen = {span.parent_span_id for span, of in zip(found, why, strict=True) if of != "asked"}
    assert chosen == {span.span_id for span in collector.spans() if span.name == "infer gas"}, (
        "one for each, and no other"
    )
    assert {span.trace_id.hex() for span in found} == {TRACE}
