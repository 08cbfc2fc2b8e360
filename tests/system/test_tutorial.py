"""The tutorial works as it is written: its commands run, in order, in one shell."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
BLOCK = re.compile(r"(<!-- by hand -->\n)?```sh\n(.*?)```", re.DOTALL)


def commands() -> str:
    blocks = [body for by_hand, body in BLOCK.findall((TUTORIAL / "first-fleet.md").read_text()) if not by_hand]
    return "\n".join(["set -euo pipefail", *blocks])


@pytest.mark.slow  # two rollouts with their trials
def test_the_commands_of_the_first_tutorial_do_what_they_say(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SKERRY")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "TUTORIAL": str(TUTORIAL),
        "HOME": str(tmp_path),
    }
    shell = subprocess.Popen(
        ["bash", "-c", commands()],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done in time; last words: {_tail(tmp_path)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, f"{said[-3000:]}\n{_tail(tmp_path)}"
    assert "Rollout iris-1 is completed." in said
    assert "Rollout iris-2 is completed." in said
    assert said.count("iris 1.1.0 (confirmed)") == 3
    answers = (tmp_path / "application.log").read_text().splitlines()[-1]
    assert "1.0.0" in answers
    assert "1.1.0" in answers
    assert "failed" not in answers


def _tail(folder: Path) -> str:
    logs = [folder / "server.log", *folder.glob("devices/*/agent.log")]
    return "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in logs if path.exists())
