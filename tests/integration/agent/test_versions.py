"""The agent is updated and put back, by two versions of its package: the state folder keeps what it holds, and the device serves."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.integration.agent.rig import ROOT, Device, Server, wait_for

ADDS = """(
        "ALTER TABLE outbox ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey'",
        "CREATE TABLE paint (name TEXT PRIMARY KEY)",
    ),
)
LEAST = {least}"""


def newer_package(folder: Path, least: int) -> Path:
    """The present package with another version and one more migration."""
    shutil.copytree(
        ROOT / "agent" / "skerry_agent", folder / "skerry_agent", ignore=shutil.ignore_patterns("__pycache__")
    )
    module = folder / "skerry_agent" / "migrations.py"
    text, n = re.subn(r"\)\nLEAST = \d+", ADDS.format(least=least), module.read_text())
    assert n == 1
    module.write_text(text)
    init = folder / "skerry_agent" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "9.'))
    return folder


def use(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    before = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and "newer" not in part]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*([str(folder)] if folder else []), *before]))


def schema(device: Device) -> int:
    with sqlite3.connect(device.state_dir / "state.db") as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def test_an_update_of_the_agent_and_the_way_back_keep_models_counts_and_outbox(
    device: Device, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    old, epoch, present = device.status()["agent"], device.status()["outbox"]["epoch"], schema(device)
    server.deaf = True
    device.infer(10)
    assert device.stop() == 0

    use(monkeypatch, newer_package(tmp_path / "newer", least=1))
    device.start()
    device.wait_running("1.0.0")
    assert device.status()["agent"] == "9." + old
    assert schema(device) == present + 1
    device.infer(10)
    device.kill()

    use(monkeypatch, None)
    device.start()
    device.wait_running("1.0.0")
    assert device.status()["agent"] == old
    device.infer(10)
    server.deaf = False
    wait_for(lambda: server.inferences() == 25 + 30, why="everything that was counted")
    assert schema(device) == present + 1
    assert device.status()["outbox"]["epoch"] == epoch
    assert device.status()["outbox"]["lost"] == {}
    assert device.stop() == 0

    use(monkeypatch, tmp_path / "newer")
    device.start()
    device.wait_running("1.0.0")
    device.infer(5)
    wait_for(lambda: server.inferences() == 25 + 35, why="the rest")


@pytest.mark.slow
def test_a_store_that_an_older_agent_would_misread_is_left_alone(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.publish(device.bundle("1.0.0"))
    use(monkeypatch, newer_package(tmp_path / "newer", least=99))
    device.start()
    device.wait_running("1.0.0", "trial")
    assert device.stop() == 0
    use(monkeypatch, None)
    with pytest.raises(AssertionError):
        device.start(timeout_s=5)
    assert "store_too_new" in device.log()
    assert schema(device) > 1, "nothing was moved aside"
