"""Doctor tells an operator why an application cannot come."""

from __future__ import annotations

import socket
from pathlib import Path

from skerry_agent import config
from skerry_agent.doctor.applications import check_applications
from skerry_agent.doctor.finding import Patient


def found(tmp_path: Path, status: dict[str, object] | None = None, **apps: object) -> list[tuple[str, str]]:
    tree = config.build({"state_dir": str(tmp_path), "apps": apps}, {})
    patient = Patient(config=tree, status=status)
    return [(finding.verdict, finding.detail) for finding in check_applications(patient)]


def test_what_keeps_applications_out_is_named(tmp_path: Path) -> None:
    assert found(tmp_path, clients=0) == [("ok", "no socket is wanted: apps.clients is 0")]
    assert "no such user: nobody-of-that-name" in found(tmp_path, users=["nobody-of-that-name"])[0][1]
    assert "folder of the agent's user alone" in found(tmp_path, users=["1"])[0][1]
    assert "keeps out" in found(tmp_path, users=["1"], socket="/x/y", socket_mode="0600")[0][1]
    assert found(tmp_path, users=["1"], socket="/x/y") == []
    ((verdict, detail),) = found(tmp_path, {}, socket=str(tmp_path / "a"))
    assert (verdict, detail) == ("fail", f"the agent runs and {tmp_path / 'a'} is not there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as there:
        there.bind(str(tmp_path / "a"))
        status = {"applications": {"connected": [{"pid": 7, "uid": 1}]}}
        assert found(tmp_path, status, socket=str(tmp_path / "a")) == [
            ("ok", f"{tmp_path / 'a'}; connected: pid 7 (user 1)")
        ]
        assert found(tmp_path, status, socket=str(tmp_path / "a"), clients=1)[0][0] == "warn"
