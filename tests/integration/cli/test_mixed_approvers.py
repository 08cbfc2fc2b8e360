"""One approver on a token, one in the environment: a real server, real tools, a catalog and a floor that both sign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from tests import models
from tests.machines import Machine, Token
from tests.rig_server import ServerRig

USAGE = 2


@pytest.mark.slow
def test_a_token_and_the_environment_approve_and_raise_a_floor_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ada = Machine(tmp_path / "ada", monkeypatch, capsys)
    token = Token(tmp_path / "token")
    ada.environment |= token.environment
    robot_key = {"ROBOT_KEY": CryptoSigner.generate_ecdsa().private_bytes.decode()}
    rig = ServerRig(tmp_path / "server").start()
    try:
        ada.environment |= {
            "SKERRY_SERVER": rig.ready["url"],
            "SKERRY_TOKEN": rig.token,
            "SKERRY_CA": str(rig.data / "ca" / "ca.pem"),
        }
        answers = tmp_path / "answers.toml"
        answers.write_text(
            f"""organiser = "Ada"
online = "{rig.data / "keys" / "online.pub.json"}"
holders = {{root = ["root"], targets = ["targets"], approver = ["ada", "robot"]}}
thresholds = {{root = 1, targets = 1, approver = 2}}
[keys]
root = {{make = true}}
targets = {{make = true}}
ada = {{token = "hsm:2?label=fleet"}}
robot = {{uri = "envvar:ROBOT_KEY"}}
"""
        )
        held = ada.apart("keys", "ceremony", "--dir", ada.keys, "--answers", answers, **robot_key)
        assert held.code == 0, held
        ada.ok("keys", "publish")
        digest = models.build_bundle(tmp_path / "b", model="gas", version="1.0.0")
        ada.ok("push", tmp_path / "b")

        # What both approve: a bundle and, in a second catalog, a floor. The token signs first, then the environment's key.
        for command in (("approve", digest), ("floor", "set", "gas", "1.0.0")):
            first = ada.apart(*command, "--as", "ada", "--with", "robot", "--yes", "--json")
            assert first.code == 0 and not first.json()["posted"], first
            waiting = first.json()["proposal"]
            expected = ("--expect", digest) if command[0] == "approve" else ()
            lacking = ada("proposal", "sign", waiting, "--as", "robot", "--yes", *expected)
            assert lacking.code != 0 and "ROBOT_KEY" in lacking.err, lacking
            done = ada("proposal", "sign", waiting, "--as", "robot", "--yes", "--json", *expected, **robot_key)
            assert done.code == 0, done
        assert rig.good("GET", f"/api/v1/bundles/{digest}")["state"] == "approved"
        catalog = json.loads(rig.ask("GET", "/repository/metadata/3.catalog.json").data)
        keyids = {
            one["keyid"]
            for one in json.loads((ada.keys / "keys.json").read_bytes())["keys"]
            if one["name"] in ("ada", "robot")
        }
        assert {one["keyid"] for one in catalog["signatures"]} == keyids and len(keyids) == 2

        # The next root and targets: signed apart, collected, and on the server; what was collected may be given again later.
        request = tmp_path / "next.json"
        ada.ok("keys", "rotate", "--root", "--targets", "--out", request)
        for name in ("root", "targets"):
            ada.ok("keys", "sign", request, "--as", name, given="y\n")
        collected = ada.ok("keys", "collect", request, "--publish", "--json").json()
        assert collected["complete"] and collected["posted"]
        for name in ("2.root.json", "2.targets.json"):
            assert rig.ask("GET", f"/repository/metadata/{name}").data == (ada.keys / name).read_bytes()
        wrong = ada("keys", "publish", ada.keys / "2.root.json", ada.keys / "keys.json")
        assert wrong.code == USAGE and "keys.json: wanted metadata of root or of targets" in wrong.err
    finally:
        rig.close()
