"""Samples of devices: stored once, listed for engineers, whatever a device may have put into them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
from skerry_contract import window as w
from skerry_contract import wire

from tests import warm
from tests.rig_server import DeviceRig, ServerRig

BUNDLE = "ab" * 32


def sample(ident: str, why: str = "share", **fields: Any) -> wire.Sample:
    at = w.Instant("b" * 32, 5, 1000, False)
    key = w.Key("gas", BUNDLE, "onnx-fp32", "none", "", 0)
    return wire.Sample(at=at, key=key, id=ident, why=why, **fields)


def test_samples_are_listed_once_each_and_odd_ones_harm_nobody(server: ServerRig, tmp_path: Path) -> None:
    device = DeviceRig(server, "dev-s", tmp_path)
    device.enrol()
    device.connect()
    first = sample("gas-1", inputs={"f0": 0.5, "f1": float("nan")}, outputs={"p": [0.25, 0.75]})
    second = sample("gas-2", "audit", inputs={"f2": "hmac:00"}, extra={"attributions": {"f0": -0.125}})
    odd = sample("gas-3", inputs={"f0": msgspec.msgpack.Ext(5, b"x"), "f1": b"raw"})
    for body in (first, second, odd):
        device.send(("sample", wire.encode(body)))
    path = "/api/v1/telemetry/samples"
    server.wait("all samples", lambda: len(server.good("GET", path)["items"]) == 3)
    items = server.good("GET", path)["items"]
    assert items[0]["inputs"] == {"f0": 0.5, "f1": None}
    assert items[0]["outputs"] == {"p": [0.25, 0.75]}
    assert [item.get("prediction_id") for item in items[:2]] == ["gas-1", "gas-2"]
    assert (items[1]["why"], items[1]["attributions"]) == ("audit", {"f0": -0.125})
    assert items[2]["unreadable"] is True
    assert (items[0]["at_ms"], items[0]["timed"]) == (items[0]["received_ms"], "received"), "1970 is not believed"
    page = server.good("GET", f"{path}?limit=2")
    assert [one["id"] for one in page["items"]] == [items[0]["id"], items[1]["id"]]
    rest = server.good("GET", f"{path}?limit=2&after={page['next']}")["items"]
    assert [one["id"] for one in rest] == [items[2]["id"]]
    assert server.good("GET", f"{path}?model=other")["items"] == []
    assert len(server.good("GET", f"{path}?device=dev-s&bundle={BUNDLE}")["items"]) == 3
    device.disconnect()

    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")},
        "SKERRY_SERVER": server.url,
        "SKERRY_TOKEN": server.token,
        "SKERRY_CA": str(server.ca_file),
    }

    def skerry(*arguments: str) -> str:
        done = warm.run("skerry_cli", ["samples", *arguments], env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [one["id"] for one in json.loads(skerry("--json"))["items"]] == [one["id"] for one in items]
    assert "gas-2" in skerry("--model", "gas")
    assert "No samples came of the model wear" in skerry("--model", "wear")
