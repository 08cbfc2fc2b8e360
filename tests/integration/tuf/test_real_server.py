"""The courier and the approver's library against the server that ships, not against a stand-in."""

import datetime as dt
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import urllib3
from skerry_cli import catalog, key_files, keys
from skerry_contract import enrolment


class Server:
    """``skerry-server`` as a process, and its operator API with the admin's token."""

    def __init__(self, data):
        self.data = data
        command = [sys.executable, "-m", "skerry_server"]
        subprocess.run([*command, "init", "--data", data], check=True, capture_output=True, timeout=60)
        self.log = (data / "log").open("wb")
        run = [*command, "run", "--data", data, "--port", "0", "--mqtt-port", "0"]
        self.process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=self.log)
        line = self.process.stdout.readline()
        assert line, (data / "log").read_text()
        self.ready = json.loads(line)
        self.url = self.ready["url"]
        self.ca_file = data / "ca" / "ca.pem"
        token = (data / "admin.token").read_text().strip()
        self.pool = urllib3.PoolManager(ca_certs=str(self.ca_file), headers={"Authorization": f"Bearer {token}"})

    def call(self, method, path, **more):
        answer = self.pool.request(method, f"{self.url}/api/v1{path}", **more)
        assert answer.status < 300, (path, answer.status, answer.data[:1000])
        return answer

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)
        self.process.stdout.close()
        self.log.close()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "server")
    yield made
    made.close()


def test_ceremony_enrolment_approval_sync_and_resumed_fetch(server, tmp_path, make_bundle, make_device):
    now = dt.datetime.now(dt.UTC)
    online = key_files.read_online_keys(server.call("GET", "/repository/online-keys").data)
    made = keys.hold_ceremony(tmp_path / "ceremony", online_keys=online, password=None, now=now)
    post = {"root": made.root, "targets": made.targets, "catalog": made.catalog}
    for role, data in post.items():
        floors = {"floors": made.floors.decode()} if role == "catalog" else {}
        server.call("POST", "/repository/metadata", json={"role": role, "metadata": data.decode(), **floors})
    server.call("PUT", "/groups/line-1", json={})

    bundle = make_bundle("gas", "1.0.0", weights=bytes(range(256)) * 4000)
    pushed = server.call("POST", "/bundles", body=bundle.manifest).json()
    assert set(pushed["missing"]) == set(bundle.blobs)
    for sha256, data in bundle.blobs.items():
        server.call("PUT", f"/blobs/{sha256}", body=data)

    verified = catalog.read_catalog(
        f"{server.url}/repository", root=made.root, cache_dir=tmp_path / "seen", ca_file=server.ca_file, now=now
    )
    source = catalog.RepositorySource(
        f"{server.url}/repository", lambda d: server.call("GET", f"/bundles/{d}/manifest").data, server.ca_file
    )
    signed = catalog.propose(
        verified,
        catalog.Change(add=(bundle.addition("ci"),), floors={"gas": "1.0.0"}),
        source=source,
        signer=key_files.load_signer(made.key_path("approver"), None),
        approvers=("approver",),
        now=now,
    )
    body = {"role": "catalog", "metadata": signed.metadata.decode(), "floors": signed.floors.decode()}
    server.call("POST", "/repository/metadata", json=body)

    secret = server.call(
        "POST", "/enrolment-tokens", json={"device_id": "press-7", "group": "line-1", "expires_s": 600}
    ).json()["token"]
    token = enrolment.build(
        enrolment.Enrolment(
            server_url=server.url,
            token=secret,
            ca_sha256=server.call("GET", "/info").json()["ca_sha256"],
            root_sha256=made.root_sha256,
        )
    )
    fleet = SimpleNamespace(site=SimpleNamespace(url=server.url), url=f"{server.url}/repository")
    device = make_device(fleet, "device")
    assert device.ok("enrol", token=token)["device_id"] == "press-7"
    synced = device.sync()
    assert synced["membership"]["group"] == "line-1"
    assert synced["self_error"] is None
    assert synced["floors"] == {"gas": "1.0.0"}
    # A clock at 1970 changes nothing of it, the request's token included.
    assert device.sync(now_s=0)["self_error"] is None
    manifest = device.manifest(bundle)["manifest"]

    weights = next(file["sha256"] for file in bundle.files if file["path"] == "model.onnx")
    part = device.state_dir / "slots" / ".parts" / weights
    wanted = {"digest": bundle.digest, "manifest": manifest, "files": bundle.files}
    process = device.start("fetch", **wanted, max_kib_s=200)
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 100_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    held = part.stat().st_size
    assert device.ok("fetch", **wanted)["bytes"] == 1_024_000 - held
    assert device.ok("renew")["expires_s"] > time.time()
