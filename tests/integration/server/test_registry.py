"""Bundles from draft to retired, and the files that devices download."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import ssl
from pathlib import Path

import psutil
import pytest
from skerry_cli import publishing
from skerry_cli.bundle import read_bundle
from skerry_contract import layout

from tests import models
from tests.rig_server import Answer, Operator, ServerRig


def manifest_of(folder: Path) -> bytes:
    return (folder / "manifest.json").read_bytes()


def blobs_of(folder: Path) -> dict[str, bytes]:
    found = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {hashlib.sha256(data).hexdigest(): data for data in found}


def push(server: ServerRig, folder: Path) -> Answer:
    return server.ask("POST", "/api/v1/bundles", data=manifest_of(folder))


def upload(server: ServerRig, folder: Path) -> None:
    for sha256, data in blobs_of(folder).items():
        server.good("PUT", f"/api/v1/blobs/{sha256}", data=data)


def test_a_bundle_goes_from_draft_to_retired(server: ServerRig, operator: Operator, tmp_path: Path) -> None:
    digest = models.build_bundle(tmp_path / "b", "life", "1.0.0")
    first = push(server, tmp_path / "b").json()
    assert first == {"digest": digest, "state": "draft", "missing": sorted(blobs_of(tmp_path / "b"))}
    early = server.ask("POST", f"/api/v1/bundles/{digest}/validate")
    assert (early.status, early.code) == (409, "incomplete")
    upload(server, tmp_path / "b")
    assert push(server, tmp_path / "b").json() == {"digest": digest, "state": "draft", "missing": []}
    found = server.good("POST", f"/api/v1/bundles/{digest}/validate")
    assert found["state"] == "validated"
    assert found["validation"]["variants"][0]["status"] == "passed"
    assert server.good("POST", f"/api/v1/bundles/{digest}/validate") == found, "asked again, it answers what it found"
    operator.approve("life", "1.0.0", digest)
    assert server.good("GET", f"/api/v1/bundles/{digest}")["state"] == "approved"
    assert server.ask("GET", f"/api/v1/bundles/{digest}/manifest").data == manifest_of(tmp_path / "b")
    assert server.good("POST", f"/api/v1/bundles/{digest}/deprecate")["state"] == "deprecated"
    assert server.good("POST", f"/api/v1/bundles/{digest}/retire")["state"] == "retired"
    again = server.ask("POST", f"/api/v1/bundles/{digest}/deprecate")
    assert (again.status, again.code) == (409, "not_allowed")


def test_a_variant_that_could_not_be_run_here_is_named(server: ServerRig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b", "partly", "1.0.0")
    (here,) = json.loads(manifest_of(tmp_path / "b"))["variants"]
    elsewhere = {**here, "id": "onnx-sparc", "arch": ["sparc64"]}
    digest = models.build_bundle(tmp_path / "b", "partly", "1.0.0", changes={"variants": [here, elsewhere]})
    push(server, tmp_path / "b")
    upload(server, tmp_path / "b")
    found = server.good("POST", f"/api/v1/bundles/{digest}/validate")
    assert found["state"] == "validated"
    assert [one["status"] for one in found["validation"]["variants"]] == ["passed", "skipped"]
    assert found["reason"].startswith("not run here: onnx-sparc (for sparc64, this machine is")


def test_a_version_names_one_bundle_for_ever(server: ServerRig, tmp_path: Path) -> None:
    first = models.build_bundle(tmp_path / "a", "fixed", "1.0.0", seed=1)
    models.build_bundle(tmp_path / "b", "fixed", "1.0.0", seed=2)
    assert push(server, tmp_path / "a").status == 200
    other = push(server, tmp_path / "b")
    assert (other.status, other.code) == (409, "version_taken")
    assert other.json()["error"]["details"]["digest"] == first
    assert push(server, tmp_path / "a").status == 200


@pytest.mark.parametrize(
    ("kind", "code"),
    [("damaged", "model_damaged"), ("crash-on-load", "runtime_crashed"), ("wrong-golden", "golden_failed")],
)
def test_a_bundle_that_fails_in_the_child_is_rejected_with_its_reason_and_the_server_lives(
    server: ServerRig, tmp_path: Path, kind: str, code: str
) -> None:
    digest = models.build_bundle(tmp_path / "b", kind, "1.0.0", kind)
    push(server, tmp_path / "b")
    upload(server, tmp_path / "b")
    found = server.good("POST", f"/api/v1/bundles/{digest}/validate")
    assert found["state"] == "rejected"
    assert found["validation"]["code"] == code
    assert code in found["reason"]
    assert server.ask("GET", "/readyz", token="").status == 200


def test_a_file_lost_or_damaged_on_the_servers_disk_is_asked_for_again(server: ServerRig, tmp_path: Path) -> None:
    digest = models.build_bundle(tmp_path / "b", "disk", "1.0.0")
    push(server, tmp_path / "b")
    upload(server, tmp_path / "b")
    largest = max(blobs_of(tmp_path / "b").items(), key=lambda item: len(item[1]))[0]
    stored = server.data / "repository" / layout.blob(largest)
    kept = stored.read_bytes()
    stored.unlink()
    assert push(server, tmp_path / "b").json()["missing"] == [largest]
    assert server.ask("POST", f"/api/v1/bundles/{digest}/validate").code == "incomplete"
    upload(server, tmp_path / "b")
    assert stored.read_bytes() == kept
    stored.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    found = server.ask("POST", f"/api/v1/bundles/{digest}/validate")
    assert (found.status, found.code) == (409, "incomplete"), found.data
    assert found.json()["error"]["details"]["missing"] == [largest]
    upload(server, tmp_path / "b")
    assert server.good("POST", f"/api/v1/bundles/{digest}/validate")["state"] == "validated"


def test_a_bundle_rejected_for_want_of_time_can_be_validated_again(tmp_path: Path) -> None:
    digest = models.build_bundle(tmp_path / "b", "late", "1.0.0")
    rig = ServerRig(tmp_path / "server", {"VALIDATION_TIMEOUT_S": "0.05"}).start()
    try:
        push(rig, tmp_path / "b")
        upload(rig, tmp_path / "b")
        path = f"/api/v1/bundles/{digest}/validate"
        found = rig.good("POST", path)
        assert (found["state"], found["validation"]["code"]) == ("rejected", "timeout")
        rig.stop()
    finally:
        rig.close()
    patient = ServerRig(tmp_path / "server").start()
    try:
        assert patient.good("POST", path)["state"] == "rejected"
        assert patient.good("POST", f"{path}?again=true")["state"] == "validated"
    finally:
        patient.close()


def test_many_validations_take_turns_and_the_server_goes_on(server: ServerRig, tmp_path: Path) -> None:
    digests = []
    for i in range(3):
        digests.append(models.build_bundle(tmp_path / f"b{i}", f"turns-{i}", "1.0.0"))
        push(server, tmp_path / f"b{i}")
        upload(server, tmp_path / f"b{i}")
    assert server.process is not None
    own = psutil.Process(server.process.pid)
    most = 0
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        asked = [pool.submit(server.good, "POST", f"/api/v1/bundles/{digests[i % 3]}/validate") for i in range(18)]
        while not all(one.done() for one in asked):
            children = [" ".join(child.cmdline()) for child in _alive(own)]
            most = max(most, sum("skerry_runtime.validation" in words for words in children))
            assert server.ask("GET", "/healthz", token="").status == 200
    assert {one.result()["state"] for one in asked} == {"validated"}
    assert 1 <= most <= 2
    audited = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    passed = [row["subject"] for row in audited if row["action"] == "bundle.pass"]
    assert [passed.count(f"bundle:{digest}") for digest in digests] == [1, 1, 1]


def _alive(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.cmdline()
            found.append(child)
    return found


@pytest.mark.attack("arbitrary software")
def test_a_bundle_that_nobody_approved_runs_nowhere(server: ServerRig, operator: Operator, tmp_path: Path) -> None:
    digest = operator.push("lonely", "1.0.0")
    assert server.good("GET", f"/api/v1/bundles/{digest}")["state"] == "validated"
    plan = {"group": "press", "model": "lonely", "candidate": digest, "stages": [{"share": 1}]}
    for method, path, body in (
        ("POST", "/api/v1/rollouts", plan),
        ("PUT", "/api/v1/groups/press/models/lonely", {"stable": digest}),
    ):
        found = server.ask(method, path, body)
        assert (found.status, found.code) == (409, "not_approved")


def test_a_bundle_in_use_is_not_retired(server: ServerRig, operator: Operator) -> None:
    digest = operator.publish("used", "1.0.0")
    server.good("PUT", "/api/v1/groups/press/models/used", {"stable": digest})
    found = server.ask("POST", f"/api/v1/bundles/{digest}/retire")
    assert (found.status, found.code) == (409, "in_use")
    assert found.json()["error"]["details"]["used_by"] == ["group:press"]


def test_a_bundle_in_the_shadow_of_another_is_not_retired(server: ServerRig, operator: Operator) -> None:
    stable, candidate = operator.publish("watched", "1.0.0"), operator.publish("watched", "1.1.0")
    server.good("PUT", "/api/v1/groups/press/models/watched", {"stable": stable})
    server.good("PUT", "/api/v1/groups/press/models/watched/shadow", {"digest": candidate})
    assert server.good("GET", f"/api/v1/bundles/{candidate}")["used_by"] == ["group:press"]
    found = server.ask("POST", f"/api/v1/bundles/{candidate}/retire")
    assert (found.status, found.code) == (409, "in_use")
    server.good("DELETE", "/api/v1/groups/press/models/watched/shadow")
    assert server.good("GET", f"/api/v1/bundles/{candidate}")["used_by"] == []


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"\xff\xfe", b'{"schema":99}', b"[" * 100_000, b'{"schema":1}'],
    ids=["empty", "object", "list", "not-utf8", "newer", "nested", "bare"],
)
def test_bytes_that_are_no_manifest_are_refused(server: ServerRig, data: bytes) -> None:
    found = server.ask("POST", "/api/v1/bundles", data=data)
    assert found.status == 422, found.data
    assert found.code in ("malformed", "unsupported_version")


def test_a_manifest_that_is_not_canonical_is_refused(server: ServerRig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b", "spaced", "1.0.0")
    loose = json.dumps(json.loads(manifest_of(tmp_path / "b"))).encode()
    assert server.ask("POST", "/api/v1/bundles", data=loose).code == "malformed"


def test_only_the_bytes_that_a_draft_lists_are_taken(server: ServerRig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b", "bytes", "1.0.0", seed=7)
    unlisted = hashlib.sha256(b"hello").hexdigest()
    assert server.ask("PUT", f"/api/v1/blobs/{unlisted}", data=b"hello").code == "not_found"
    push(server, tmp_path / "b")
    sha256, data = max(blobs_of(tmp_path / "b").items(), key=lambda item: len(item[1]))
    flipped = bytes([data[0] ^ 1]) + data[1:]
    assert server.ask("PUT", f"/api/v1/blobs/{sha256}", data=flipped).code == "hash_mismatch"
    assert server.ask("PUT", f"/api/v1/blobs/{sha256}", data=data[:-1]).code == "size_mismatch"
    assert server.ask("PUT", f"/api/v1/blobs/{sha256}", data=data + b"x").code == "too_large"
    assert server.ask("PUT", f"/api/v1/blobs/{sha256.upper()}", data=data).code == "malformed"
    assert server.ask("GET", f"/repository/blobs/sha256/{sha256[:2]}/{sha256}", token="").status == 404
    assert server.good("PUT", f"/api/v1/blobs/{sha256}", data=data)["stored"] is True
    assert server.good("PUT", f"/api/v1/blobs/{sha256}", data=b"anything")["stored"] is False
    assert server.ask("GET", f"/repository/blobs/sha256/{sha256[:2]}/{sha256}", token="").data == data


def test_an_upload_cut_short_leaves_nothing(server: ServerRig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b", "cut", "1.0.0", padding=300_000, seed=8)
    push(server, tmp_path / "b")
    sha256, data = max(blobs_of(tmp_path / "b").items(), key=lambda item: len(item[1]))
    host, port = server.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(server.ca_file))
    with (
        socket.create_connection((host, int(port)), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname=host) as link,
    ):
        head = (
            f"PUT /api/v1/blobs/{sha256} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.token}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        link.sendall(head.encode() + data[:150_000])
    folder = server.data / "repository" / "blobs" / "sha256" / sha256[:2]
    server.wait("the scratch file to go", lambda: not folder.exists() or not os.listdir(folder))
    assert server.good("PUT", f"/api/v1/blobs/{sha256}", data=data)["stored"] is True


# --- metadata and static files -------------------------------------------------------------------------------------------


@pytest.mark.attack("rollback of metadata")
def test_forged_or_stale_metadata_is_refused_and_nothing_changes(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    before = server.good("GET", "/api/v1/repository/status")
    stranger = Operator(server, tmp_path / "stranger")
    for role in ("root", "targets", "catalog"):
        text = getattr(stranger.ceremony, role).decode()
        found = server.ask("POST", "/api/v1/repository/metadata", {"role": role, "metadata": text})
        assert found.status in (409, 422), (role, found.data)
    for text in ("", "{}", "nonsense", "[" * 50_000):
        found = server.ask("POST", "/api/v1/repository/metadata", {"role": "catalog", "metadata": text})
        assert found.status == 422, found.data
    floors = {"role": "root", "metadata": operator.ceremony.root.decode(), "floors": "{}"}
    assert server.ask("POST", "/api/v1/repository/metadata", floors).status == 422
    assert server.good("GET", "/api/v1/repository/status") == before


@pytest.mark.parametrize(
    "path",
    [
        "../server.db",
        "../admin.token",
        "..%2fadmin.token",
        "%2e%2e/admin.token",
        "%2e%2e%2fca%2fca.key",
        "metadata/../../admin.token",
        "metadata/..%2f..%2fca/ca.key",
        "blobs/../../keys/online.pem",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "metadata/%00",
        "metadata/" + "a" * 5000,
        ".lock",
        "metadata/.new-0",
        "metadata",
        "",
        "blobs/sha256",
        "metadata\\..\\..\\admin.token",
        "blobs/sha256/link/admin.token",
    ],
)
@pytest.mark.attack("path traversal")
def test_nothing_outside_the_repository_is_served(server: ServerRig, operator: Operator, path: str) -> None:
    link = server.data / "repository" / "blobs" / "sha256" / "link"
    if not link.is_symlink():
        link.symlink_to(server.data)
    host, port = server.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(server.ca_file))
    # By hand: clients tidy paths up before they send them.
    with (
        socket.create_connection((host, int(port)), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname=host) as connection,
    ):
        connection.sendall(f"GET /repository/{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.split(b" ")[1] in (b"404", b"400", b"307"), answer[:200]
    assert b"PRIVATE" not in answer
    assert server.token.encode() not in answer
    link.unlink()


def test_metadata_is_asked_for_anew_and_versions_and_blobs_are_kept(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    timestamp = server.ask("GET", "/repository/metadata/timestamp.json", token="")
    assert timestamp.headers["cache-control"] == "no-cache"
    tag = {"If-None-Match": timestamp.headers["etag"]}
    assert server.ask("GET", "/repository/metadata/timestamp.json", headers=tag, token="").status == 304
    root = server.ask("GET", "/repository/metadata/1.root.json", token="")
    assert "immutable" in root.headers["cache-control"]
    assert root.data == operator.ceremony.root

    models.build_bundle(tmp_path / "b", "ranged", "1.0.0", padding=200_000)
    push(server, tmp_path / "b")
    upload(server, tmp_path / "b")
    sha256, data = max(blobs_of(tmp_path / "b").items(), key=lambda item: len(item[1]))
    where = f"/repository/blobs/sha256/{sha256[:2]}/{sha256}"
    whole = server.ask("GET", where, token="")
    assert (whole.status, whole.data) == (200, data)
    assert whole.headers["etag"] == f'"{sha256}"'
    assert "immutable" in whole.headers["cache-control"]
    part = server.ask("GET", where, headers={"Range": "bytes=100000-", "If-Range": f'"{sha256}"'}, token="")
    assert (part.status, part.data) == (206, data[100_000:])
    other = server.ask("GET", where, headers={"Range": "bytes=100000-", "If-Range": '"another"'}, token="")
    assert (other.status, len(other.data)) == (200, len(data))
    assert server.ask("GET", where, headers={"Range": f"bytes={len(data)}-"}, token="").status == 416
    assert server.ask("HEAD", where, token="").headers["content-length"] == str(len(data))
    for method in ("PUT", "POST", "DELETE"):
        assert server.ask(method, where, data=b"x").status == 405


def test_a_signature_longer_than_a_header_may_be_travels_as_a_body(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    """A model.sig has some 200 bytes for every file of the bundle."""
    digest = models.build_bundle(tmp_path / "b", "manyfiles", "1.0.0")
    path = f"/api/v1/bundles/{digest}/signature"
    assert server.ask("PUT", path, data=b"{}").status == 404
    long = b'{"of": "' + b"many files " * 30_000 + b'"}'
    made = dataclasses.replace(read_bundle(tmp_path / "b"), signature=long)
    publishing.push(operator.api, made)
    assert server.ask("GET", path).data == long
    assert server.good("GET", f"/api/v1/bundles/{digest}")["signed"]
    # Whoever relies on it finds it again: it is not replaced any more.
    operator.approve("manyfiles", "1.0.0", digest)
    other = server.ask("PUT", path, data=b"{}")
    assert (other.status, other.code) == (409, "signed")
    assert server.ask("PUT", path, data=long).status == 200
    assert server.ask("PUT", path, data=b"x" * ((4 << 20) + 1)).status == 413
