"""``/metrics`` of a real agent, read by Prometheus' own parser."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.integration.agent.rig import Device, wait_for


def families(device: Device) -> dict[str, Any]:
    text = device.call("GET", "/metrics").body.decode()
    assert text.count("# TYPE") == len({line for line in text.splitlines() if line.startswith("# TYPE")})
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(device: Device, family: str, sample: str = "", **labels: str) -> float:
    found = [
        s.value for s in families(device)[family].samples
        if s.name == (sample or s.name) and labels.items() <= s.labels.items()
    ]  # fmt: skip
    assert len(found) == 1, found
    return float(found[0])


def test_everything_that_is_counted_is_there_in_its_kind(device: Device) -> None:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    device.publish(device.bundle("1.1.0"))
    device.sync()
    device.wait_running("1.1.0", "trial")
    device.infer(25)
    device.wait_running("1.1.0")
    device.infer(5)
    requests = "skerry_agent_requests"
    wait_for(lambda: value(device, requests, model="gas", outcome="ok") == 30, why="the counts")
    found = families(device)
    kinds = {name: family.type for name, family in found.items()}
    assert {name for name, kind in kinds.items() if kind == "histogram"} == {"skerry_agent_request_seconds"}
    assert kinds[requests] == kinds["skerry_agent_lost"] == kinds["skerry_agent_worker_ends"] == "counter"
    # Counted when the old worker is gone.
    wait_for(lambda: value(device, "skerry_agent_swaps", model="gas") == 1, why="the swap")
    assert value(device, "skerry_agent_running", model="gas", version="1.1.0") == 1
    assert value(device, "skerry_agent_link_up") == 1
    assert value(device, "skerry_agent_info") == 1
    assert {s.labels["outcome"] for s in found[requests].samples} == {"ok", "invalid", "failed", "shed"}
    assert kinds["skerry_agent_cold_starts"] == "counter", "there without a model on demand, too"

    latency = [s for s in found["skerry_agent_request_seconds"].samples if s.name.endswith("_bucket")]
    counts = [s.value for s in latency]
    assert counts == sorted(counts), "cumulative"
    assert latency[-1].labels["le"] == "+Inf"
    assert (
        counts[-1]
        == 30
        == value(device, "skerry_agent_request_seconds", "skerry_agent_request_seconds_count", model="gas")
    )
    total_s = value(device, "skerry_agent_request_seconds", "skerry_agent_request_seconds_sum", model="gas")
    assert 30 * 1e-6 < total_s < 30 * float(latency[-2].labels["le"])
