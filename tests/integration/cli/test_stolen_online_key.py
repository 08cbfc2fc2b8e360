"""A thief had the server's online key and ran its versions far ahead: the operator replaces the key, with the real tools."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from skerry_agent.courier import safe_updater, transport, updater
from skerry_contract import layout
from skerry_server.metadata import load_online_signer
from skerry_server.repository import Repository
from tuf.api import exceptions as tuf_errors

from tests.integration.cli.conftest import Cli, CliHere
from tests.rig_server import ServerRig

OK = 0
FAR = 1 << 31


def synced(server: ServerRig, root: bytes, cache: Path) -> dict[str, int]:
    """What a device with this cache holds after a sync; the courier's own updater."""
    now_s = time.time()
    web = transport.Web(server_url=server.url, ca_pem=server.ca_file.read_text(), now_s=now_s, gap_s=10)
    fresh = updater.DeviceUpdater(
        cache, f"{server.url}/repository", fetcher=safe_updater.Fetcher(web), bootstrap=root, now_s=now_s
    )
    try:
        fresh.refresh()
        assert fresh.document(layout.FLOORS_TARGET, 1 << 20) is not None
        return fresh.versions()
    finally:
        web.close()


@pytest.mark.slow
@pytest.mark.attack("fast-forwarded versions")
def test_a_thiefs_versions_are_left_behind_by_a_root_with_another_online_key(
    cli: Cli, server: ServerRig, folder: Path, tmp_path: Path
) -> None:
    cli = CliHere(cli.folder, cli.environment)
    root = (folder / "keys" / "root.json").read_bytes()
    before = synced(server, root, tmp_path / "tuf")
    # The thief publishes from a copy, which the device once sees.
    repository = server.data / "repository"
    honest = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    stolen = load_online_signer(server.data / "keys" / "online.pem")
    thief = Repository(repository, stolen, lambda: dt.datetime.now(dt.UTC))
    thief.raise_versions({"timestamp": FAR, "snapshot": FAR, "fleet": FAR})
    assert synced(server, root, tmp_path / "tuf")["timestamp"] == FAR + 1
    assert server.stop() == 0
    for path in [path for path in repository.rglob("*") if path.is_file()]:
        path.unlink()
    for path, data in honest.items():
        path.write_bytes(data)

    made = subprocess.run(
        [sys.executable, "-m", "skerry_server", "new-online-key", "--data", server.data],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    new = json.loads(made.stdout)
    (old,) = {*json.loads(Path(new["online_keys"]).read_text())["keys"]} - {new["keyid"]}
    server.start()
    with pytest.raises(tuf_errors.BadVersionNumberError):
        synced(server, root, tmp_path / "tuf")

    request = tmp_path / "next.json"
    asked = cli(
        "keys", "rotate", "--out", request, "--add-online", new["online_keys"], "--remove-online", old, "--json"
    )
    assert asked.code == OK, asked.err
    for name in ("root", "targets"):
        digest = cli("keys", "review", request, "--json").json()["sha256"]
        signed = cli("keys", "sign", request, "--as", name, "--sha256", digest, "--yes")
        assert signed.code == OK, signed.err
    done = cli("keys", "collect", request, "--publish", "--json")
    assert done.code == OK, done.err
    assert done.json()["posted"]

    after = synced(server, root, tmp_path / "tuf")
    assert (after["root"], after["targets"]) == (before["root"] + 1, before["targets"] + 1)
    assert before["timestamp"] < after["timestamp"] < FAR
    with pytest.raises(Exception, match="cannot sign"):
        Repository(repository, stolen, lambda: dt.datetime.now(dt.UTC)).raise_versions({"timestamp": FAR})
