"""Who may do what: tokens, roles, and the shape of every refusal."""

from __future__ import annotations

import json
import socket
import ssl

import pytest

from tests.rig_server import Operator, ServerRig

A = "0" * 64
ROLES = ("viewer", "engineer", "approver", "operator", "auditor", "admin")
COMMANDS: list[tuple[str, str, object, set[str]]] = [
    ("GET", "/api/v1/info", None, set(ROLES)),
    ("GET", "/api/v1/devices", None, set(ROLES)),
    ("GET", "/api/v1/groups", None, set(ROLES)),
    ("GET", "/api/v1/rollouts", None, set(ROLES)),
    ("GET", "/api/v1/bundles", None, set(ROLES)),
    ("GET", "/api/v1/deltas", None, set(ROLES)),
    ("POST", "/api/v1/deltas/retry", {}, {"operator", "admin"}),
    ("GET", "/api/v1/telemetry/counts", None, set(ROLES)),
    ("GET", "/api/v1/telemetry/samples", None, {"engineer", "admin"}),
    ("GET", "/api/v1/repository/status", None, set(ROLES)),
    ("GET", "/api/v1/audit", None, {"auditor", "admin"}),
    ("GET", "/api/v1/tokens", None, {"admin"}),
    ("POST", "/api/v1/tokens", {"name": "Bad Name", "role": "viewer"}, {"admin"}),
    ("DELETE", "/api/v1/tokens/nobody", None, {"admin"}),
    ("POST", "/api/v1/bundles", {}, {"engineer", "admin"}),
    ("PUT", f"/api/v1/blobs/{A}", {}, {"engineer", "admin"}),
    ("PUT", f"/api/v1/bundles/{A}/key", {"key": "x"}, {"engineer", "admin"}),
    ("GET", f"/api/v1/bundles/{A}/key", None, {"approver", "admin"}),
    ("PUT", f"/api/v1/bundles/{A}/signature", {}, {"engineer", "admin"}),
    ("GET", f"/api/v1/bundles/{A}/releases", None, {"auditor", "admin"}),
    ("POST", "/api/v1/devices/nobody/forget-key", {"reason": "x"}, {"operator", "admin"}),
    ("POST", f"/api/v1/bundles/{'0' * 64}/key/nobody", None, {"operator", "admin"}),
    ("POST", f"/api/v1/bundles/{A}/validate", None, {"engineer", "admin"}),
    ("POST", f"/api/v1/bundles/{A}/deprecate", None, {"operator", "admin"}),
    ("POST", f"/api/v1/bundles/{A}/retire", None, {"operator", "admin"}),
    ("POST", "/api/v1/enrolment-tokens", {"group": "press"}, {"operator", "admin"}),
    ("PUT", "/api/v1/devices/nobody/pins/gas", {"digest": A}, {"operator", "admin"}),
    ("DELETE", "/api/v1/devices/nobody/pins/gas", None, {"operator", "admin"}),
    ("PUT", "/api/v1/devices/nobody/membership", {}, {"operator", "admin"}),
    ("POST", "/api/v1/devices/nobody/revoke", {"reason": "x"}, {"operator", "admin"}),
    ("POST", "/api/v1/devices/nobody/retry", {"reason": "x"}, {"operator", "admin"}),
    ("POST", "/api/v1/devices/nobody/renew", {"reason": "x"}, {"operator", "admin"}),
    ("POST", "/api/v1/groups/nobody/retry", {"reason": "x"}, {"operator", "admin"}),
    ("POST", "/api/v1/devices/nobody/cancel", {"reason": "x"}, {"operator", "admin"}),
    ("POST", "/api/v1/devices/nobody/logs", None, {"operator", "admin"}),
    ("GET", "/api/v1/devices/nobody/logs", None, {"operator", "admin"}),
    ("GET", "/api/v1/devices/nobody/logs/1", None, {"operator", "admin"}),
    ("PUT", "/api/v1/groups/press", {"settings": {"nonsense": 1}}, {"operator", "admin"}),
    ("PUT", "/api/v1/groups/press/models/gas", {"stable": A}, {"operator", "admin"}),
    ("PUT", "/api/v1/groups/press/models/gas/shadow", {"digest": A}, {"operator", "admin"}),
    ("DELETE", "/api/v1/groups/press/models/gas/shadow", None, {"operator", "admin"}),
    ("POST", "/api/v1/rollouts", {"group": "g", "model": "m", "candidate": A, "stages": []}, {"operator", "admin"}),
    ("POST", "/api/v1/rollouts/none/pause", None, {"operator", "admin"}),
    ("POST", "/api/v1/rollouts/none/resume", None, {"operator", "admin"}),
    ("POST", "/api/v1/rollouts/none/abort", None, {"operator", "admin"}),
    ("POST", "/api/v1/rollouts/none/rollback", None, {"operator", "admin"}),
    ("POST", "/api/v1/repository/metadata", {"role": "root", "metadata": "x"}, {"admin"}),
    ("POST", "/api/v1/repository/metadata", {"role": "targets", "metadata": "x"}, {"admin"}),
    ("POST", "/api/v1/repository/metadata", {"role": "catalog", "metadata": "x"}, {"approver", "admin"}),
    ("POST", "/api/v1/repository/set", {}, {"admin"}),
    ("POST", "/api/v1/repository/proposals", {"metadata": "x", "floors": "x"}, {"approver", "admin"}),
    ("POST", "/api/v1/repository/proposals/none/signatures", {"metadata": "x"}, {"approver", "admin"}),
    ("POST", "/api/v1/repository/proposals/none/withdraw", None, {"approver", "admin"}),
]


@pytest.fixture(scope="module")
def tokens(server: ServerRig) -> dict[str, str]:
    """A token per role."""
    return {
        role: server.good("POST", "/api/v1/tokens", {"name": f"the-{role}", "role": role})["token"] for role in ROLES
    }


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_do_its_own_commands_and_no_others(server: ServerRig, tokens: dict[str, str], role: str) -> None:
    for method, path, body, may in COMMANDS:
        found = server.ask(method, path, body, token=tokens[role])
        if role in may:
            assert found.status not in (401, 403), (method, path, found.data)
        else:
            assert (found.status, found.code) == (403, "role_missing"), (method, path, found.data)


def test_every_operator_route_wants_a_token(server: ServerRig) -> None:
    """Also the ones that the table above forgot: the server's own list of routes is asked."""
    described = server.good("GET", "/openapi.json", token="")
    asked = 0
    for path, methods in described["paths"].items():
        if path.startswith("/api/"):
            for method in methods:
                concrete = path.replace("{", "x").replace("}", "x")
                found = server.ask(method.upper(), concrete, token="", data=b"{}" if method != "get" else None)
                assert (found.status, found.code) == (401, "bad_token"), (method, path, found.data)
                asked += 1
    assert asked >= 30


def test_the_role_table_covers_every_operator_route(server: ServerRig) -> None:
    described = server.good("GET", "/openapi.json", token="")
    writing = {
        (method.upper(), path)
        for path, methods in described["paths"].items()
        for method in methods
        if path.startswith("/api/") and method != "get"
    }
    covered = set()
    for method, path, _, _ in COMMANDS:
        for known_method, template in writing:
            parts, wanted = template.split("/"), path.split("/")
            same = len(parts) == len(wanted) and all(
                p == w or p.startswith("{") for p, w in zip(parts, wanted, strict=True)
            )
            if same and method == known_method:
                covered.add((known_method, template))
    assert covered == writing


def test_a_revoked_and_an_expired_token_are_refused_alike(server: ServerRig) -> None:
    gone = server.good("POST", "/api/v1/tokens", {"name": "gone", "role": "viewer"})["token"]
    brief = server.good("POST", "/api/v1/tokens", {"name": "brief", "role": "viewer", "expires_s": 0.2})["token"]
    assert server.ask("GET", "/api/v1/info", token=gone).status == 200
    assert server.ask("DELETE", "/api/v1/tokens/gone").status == 204
    server.wait("expiry", lambda: server.ask("GET", "/api/v1/info", token=brief).status == 401)
    answers = {server.ask("GET", "/api/v1/info", token=token).data for token in (gone, brief, "skt_never", "x" * 3000)}
    assert len(answers) == 1
    assert server.ask("POST", "/api/v1/tokens", {"name": "gone", "role": "viewer"}).code == "name_taken"


def test_neither_secrets_nor_hashes_of_tokens_are_listed_or_audited(server: ServerRig) -> None:
    secret = server.good("POST", "/api/v1/tokens", {"name": "listed", "role": "viewer"})["token"]
    listed = server.ask("GET", "/api/v1/tokens").data + server.ask("GET", "/api/v1/audit?limit=1000").data
    assert b"listed" in listed
    assert secret.encode() not in listed
    assert b"sha256" not in server.ask("GET", "/api/v1/tokens").data


def test_every_refusal_has_the_one_shape(server: ServerRig) -> None:
    for method, path, body in (
        ("GET", "/nowhere", None),
        ("POST", "/api/v1/info", {}),
        ("POST", "/api/v1/tokens", {"name": 7}),
        ("POST", "/api/v1/tokens", {"name": "x", "role": "viewer", "surprise": 1}),
        ("GET", "/api/v1/devices?limit=0", None),
        ("GET", "/api/v1/audit?after=-1", None),
        ("GET", "/api/v1/bundles?after=nonsense", None),
        ("GET", "/api/v1/devices/UPPER", None),
        ("GET", f"/api/v1/bundles/{A}", None),
    ):
        found = server.ask(method, path, body)
        assert 400 <= found.status < 500, (path, found.data)
        error = found.json()["error"]
        assert set(error) <= {"code", "message", "details"}
        assert error["code"]
        assert error["message"]


def test_a_refusal_does_not_repeat_a_secret_that_was_sent_wrongly(server: ServerRig) -> None:
    found = server.ask("POST", "/device/v1/enrol", {"token": ["ske_supersecret"], "csr": 5}, token="")
    assert found.status == 422
    assert b"supersecret" not in found.data


def test_a_body_longer_than_the_limit_is_refused_whether_announced_or_streamed(server: ServerRig) -> None:
    big = b"x" * (8_000_000 + 1)
    assert server.ask("POST", "/api/v1/bundles", data=big).code == "too_large"
    assert server.ask("POST", "/device/v1/enrol", data=b"x" * 70_000, token="").status == 413
    # Without a length: chunks, for as long as the server reads them.
    host, port = server.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(server.ca_file))
    with (
        socket.create_connection((host, int(port)), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname=host) as link,
    ):
        head = f"POST /device/v1/enrol HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n"
        link.sendall(head.encode())
        for _ in range(5):
            link.sendall(b"4000\r\n" + b"y" * 0x4000 + b"\r\n")
        answer = b""
        while b"}}" not in answer:
            piece = link.recv(4096)
            assert piece, answer
            answer += piece
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b'"too_large"' in answer


def test_a_body_that_lies_about_its_length_is_refused(server: ServerRig) -> None:
    host, port = server.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(server.ca_file))
    with (
        socket.create_connection((host, int(port)), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname=host) as link,
    ):
        link.sendall(f"POST /device/v1/enrol HTTP/1.1\r\nHost: {host}\r\nContent-Length: -5\r\n\r\n".encode())
        answer = link.recv(4096)
    assert answer.split(b" ")[1] in (b"400", b"413")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window_s": 1e9}, "$.settings.window_s: wanted 0.1 to 86400, got 1000000000"),
        ({"sync_s": 0.001}, "$.settings.sync_s: wanted 1 to 86400, got 0.001"),
        ({"trial_inferences": -5}, "$.settings.trial_inferences: wanted 0 to 10000000, got -5"),
    ],
)
def test_a_setting_that_would_take_a_fleet_out_of_reach_is_refused_with_its_bounds(
    server: ServerRig, settings: dict[str, float], said: str
) -> None:
    found = server.ask("PUT", "/api/v1/groups/unbounded", {"settings": settings})
    assert (found.status, found.code) == (422, "bad_settings")
    assert said in found.json()["error"]["message"]
    assert server.ask("GET", "/api/v1/groups/unbounded").status == 404


def test_the_audit_chain_holds_and_every_change_has_a_row(server: ServerRig, operator: Operator) -> None:
    from skerry_server import audit

    server.good("PUT", "/api/v1/groups/audited", {"settings": {"window_s": 7.5}})
    server.good("PUT", "/api/v1/groups/audited", {"settings": {"window_s": 9}})
    rows, after = [], 0
    while True:
        page = server.good("GET", f"/api/v1/audit?after={after}&limit=50")
        rows += page["items"]
        if page["next"] is None:
            break
        after = page["next"]
    assert audit.first_break(rows) is None
    actions = {row["action"] for row in rows}
    assert {"token.create", "group.create", "group.settings", "repository.install"} <= actions
    changed = json.loads(json.dumps(rows))
    changed[len(rows) // 2]["after"] = {"role": "admin"}
    assert audit.first_break(changed) == rows[len(rows) // 2]["id"]
    assert audit.first_break(rows[:2] + rows[3:]) == rows[3]["id"]


def test_operational_routes_need_no_token_and_name_no_device(server: ServerRig, operator: Operator) -> None:
    assert server.ask("GET", "/healthz", token="").json() == {"status": "ok"}
    ready = server.ask("GET", "/readyz", token="")
    assert (ready.status, ready.json()["ready"]) == (200, True)
    server.good("GET", "/api/v1/info")
    text = server.ask("GET", "/metrics", token="").data.decode()
    for name in (
        'skerry_part_up{part="broker"} 1.0',
        "skerry_orchestrator_tick_seconds_count",
        'skerry_http_requests_total{method="GET",route="/api/v1/info",status="200"}',
        'skerry_metadata_version{role="timestamp"}',
    ):
        assert name in text, name
    assert "device=" not in text


def test_the_description_of_the_api_is_complete(server: ServerRig) -> None:
    described = server.good("GET", "/openapi.json", token="")
    tags = {tag["name"] for tag in described["tags"]}
    for path, methods in described["paths"].items():
        for method, found in methods.items():
            assert found["summary"], (method, path)
            assert set(found["tags"]) <= tags, (method, path)
            assert len(found["tags"]) == 1, (method, path)
