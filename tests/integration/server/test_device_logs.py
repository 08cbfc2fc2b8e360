"""Asking a device for its log: over real HTTPS, from the operator's side and from the device's."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.rig_server import Answer, DeviceRig, Operator, ServerRig

MOST_BYTES, MOST_TEXT = 128 * 1024, 1 << 20


def ask(server: ServerRig, device: DeviceRig) -> dict[str, Any]:
    found: dict[str, Any] = server.good("POST", f"/api/v1/devices/{device.id}/logs")
    return found


def send(device: DeviceRig, number: int, packed: bytes) -> Answer:
    path = f"/device/v1/logs/{number}"
    headers = {
        "Authorization": device.signed(device.claims("POST", path, packed)),
        "Content-Type": "application/gzip",
    }
    return device.server.ask("POST", path, data=packed, headers=headers, token="")


def look(server: ServerRig, device: DeviceRig, number: int) -> dict[str, Any]:
    found: dict[str, Any] = server.good("GET", f"/api/v1/devices/{device.id}/logs/{number}")
    return found


def wanted(device: DeviceRig) -> object:
    return device.ask("GET", "/device/v1/self").json()["logs"]


def test_a_request_rings_the_device_stands_in_its_self_and_ends_with_its_lines(
    server: ServerRig, operator: Operator, device: DeviceRig
) -> None:
    assert operator.ceremony, "before the trust is installed no bell rings"
    device.connect()
    assert wanted(device) is None
    asked = ask(server, device)
    assert (asked["state"], asked["repeated"], asked["lines"]) == ("waiting", False, None)
    server.wait("the bell", lambda: any(f"{device.id}/bell" in topic for topic, _ in device.bells))
    assert wanted(device) == asked["number"]
    assert send(device, asked["number"], gzip.compress(b'{"message":"one"}\n\xff\x1b[2Jtwo\n')).status == 200
    assert wanted(device) is None
    found = look(server, device, asked["number"])
    assert found["state"] == "answered"
    assert found["lines"] == ['{"message":"one"}', "\ufffd\x1b[2Jtwo"]
    assert found["ended_ms"] >= found["asked_ms"]
    audited = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    about = [(row["action"], row["actor"]) for row in audited if row["subject"] == f"device:{device.id}"]
    assert ("device.logs.ask", "token:admin") in about
    assert ("device.logs.answer", f"device:{device.id}") in about


def test_a_second_request_before_the_answer_is_the_first_again(server: ServerRig, device: DeviceRig) -> None:
    first, second = ask(server, device), ask(server, device)
    assert (second["number"], second["repeated"]) == (first["number"], True)
    assert send(device, first["number"], gzip.compress(b"x\n")).status == 200
    third = ask(server, device)
    assert (third["repeated"], third["state"]) == (False, "waiting")
    assert third["number"] > first["number"]


def test_an_answer_is_taken_once_and_only_of_the_device_that_was_asked(
    server: ServerRig, device: DeviceRig, tmp_path: Path
) -> None:
    other = DeviceRig(server, "logs-other", tmp_path)
    other.enrol()
    number = ask(server, device)["number"]
    packed = gzip.compress(b"mine\n")
    stolen = send(other, number, packed)
    assert (stolen.status, stolen.code) == (404, "not_found")
    assert send(device, number + 1000, packed).code == "not_found"
    assert send(device, 1 << 70, packed).code == "not_found"
    assert send(device, number, packed).status == 200
    again = send(device, number, gzip.compress(b"other\n"))
    assert (again.status, again.code) == (409, "answered")
    assert look(server, device, number)["lines"] == ["mine"]
    unsigned = server.ask("POST", f"/device/v1/logs/{number}", data=packed, token="")
    assert (unsigned.status, unsigned.code) == (401, "bad_device_token")


NOISE = gzip.compress(random.Random(1).randbytes(MOST_BYTES + 1000))
BOMB = gzip.compress(b"\0" * (MOST_TEXT + 1))


@pytest.mark.parametrize(
    ("packed", "code"),
    [(NOISE, "too_large"), (BOMB, "too_large"), (b"no gzip", "bad_logs"), (gzip.compress(b"x")[:-3], "bad_logs"),
     (gzip.compress(b"x") * 2, "bad_logs"), (b"", "bad_logs")],
    ids=["packed", "unpacked", "plain", "cut", "twice", "empty"],
)  # fmt: skip
@pytest.mark.attack("decompression bomb")
def test_what_cannot_be_taken_ends_the_request_and_nothing_of_it_is_kept(
    server: ServerRig, device: DeviceRig, packed: bytes, code: str
) -> None:
    number = ask(server, device)["number"]
    assert send(device, number, packed).code == code
    found = look(server, device, number)
    assert (found["state"], found["fault"], found["lines"]) == ("failed", code, None)
    assert wanted(device) is None, "it is not asked to try that again"
    assert ask(server, device)["repeated"] is False


def test_far_too_long_a_body_is_not_read_at_all(server: ServerRig, device: DeviceRig) -> None:
    number = ask(server, device)["number"]
    assert send(device, number, b"x" * 200_000).code == "too_large"
    assert look(server, device, number)["state"] == "waiting"


def test_few_requests_are_kept_of_each_device(server: ServerRig, device: DeviceRig) -> None:
    numbers = []
    for n in range(5):
        numbers.append(ask(server, device)["number"])
        assert send(device, numbers[-1], gzip.compress(b"%d\n" % n)).status == 200
    kept = server.good("GET", f"/api/v1/devices/{device.id}/logs")["items"]
    assert [row["number"] for row in kept] == numbers[-3:]
    assert all("lines" not in row and row["state"] == "answered" for row in kept)
    gone = server.ask("GET", f"/api/v1/devices/{device.id}/logs/{numbers[0]}")
    assert (gone.status, gone.code) == (404, "not_found")


def test_a_revoked_or_unknown_device_is_not_asked(server: ServerRig, device: DeviceRig) -> None:
    number = ask(server, device)["number"]
    server.good("POST", f"/api/v1/devices/{device.id}/revoke", {"reason": "lost"})
    assert look(server, device, number)["state"] == "revoked"
    assert send(device, number, gzip.compress(b"x\n")).code == "unknown_device"
    refused = server.ask("POST", f"/api/v1/devices/{device.id}/logs")
    assert (refused.status, refused.code) == (409, "revoked")
    assert server.ask("POST", "/api/v1/devices/nobody/logs").code == "not_found"
    assert server.ask("GET", "/api/v1/devices/nobody/logs/1").code == "not_found"


def test_only_an_operator_asks_and_reads(server: ServerRig, device: DeviceRig) -> None:
    number = ask(server, device)["number"]
    viewer = server.good("POST", "/api/v1/tokens", {"name": "logs-viewer", "role": "viewer"})["token"]
    for method, path in (("POST", ""), ("GET", ""), ("GET", f"/{number}")):
        found = server.ask(method, f"/api/v1/devices/{device.id}/logs{path}", token=viewer)
        assert (found.status, found.code) == (403, "role_missing")
        assert json.loads(found.data)["error"]["details"]["needs"] == "operator"
