"""Explanations and traces of inferences in the application's own process, with a real agent and a real collector."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from skerry_agent import sdk
from skerry_runtime import explain
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load

from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.agent.test_sdk import confirm, opened
from tests.integration.worker.test_spans import PARENT, TRACE, Collector

MEDIANS = {"f0": 0.25, "f3": -0.5}
ROW = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def test_inferences_are_explained_and_traced_where_that_is_asked_for(
    device: Device, server: Server, collector: Collector
) -> None:
    with device.config.open("a") as file:
        file.write(f'[telemetry]\notlp_endpoint = "{collector.endpoint}"\n')
    confirm(device, "1.0.0", changes={"explanations": {"medians": MEDIANS}})
    with opened(device) as model:
        plain = model.infer({"x": ROW})
        assert plain.explanation is None
        with pytest.raises(sdk.BadInput, match=r"^explain: wanted a request of one row"):
            model.infer({"x": np.repeat(ROW, 2, 0)}, explain=True)
        answer = model.infer({"x": ROW}, explain=True, traceparent=f"00-{TRACE}-{PARENT}-01")
        model.infer({"x": ROW}, traceparent="nonsense")
        told = answer.explanation
        assert told is not None
        wanted = explain.occluder_of(load(open_bundle(device.folder / "bundle-1.0.0"), "onnx-fp32")).explain({"x": ROW})
        assert told.attributions == pytest.approx(dict(zip(MEDIANS, wanted.attributions, strict=True)))
        assert told.value == pytest.approx(float(answer.outputs["probabilities"].max()))
        pid = os.fork()
        if not pid:
            # A child of the fork has none of it, and does not wait for a thread that it does not have.
            try:
                model.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert model.flush()
    found = {span.name: span for span in collector.spans() if span.trace_id.hex() == TRACE}
    root = found["infer gas"]
    assert (root.parent_span_id.hex(), root.kind) == (PARENT, Span.SPAN_KIND_INTERNAL)
    assert (found["infer"].parent_span_id, found["explain"].parent_span_id) == (root.span_id, root.span_id)
    services = {
        attribute.value.string_value
        for request in collector.requests
        for attribute in request.resource_spans[0].resource.attributes
        if attribute.key == "service.name"
    }
    assert services == {"skerry-sdk"}, "nothing else was asked to be traced"

    def explained() -> int:
        return sum(window.tallies.get("explain.asked", 0) for window in server.windows())

    wait_for(explained, why="the window that says so")
    assert explained() == 1
