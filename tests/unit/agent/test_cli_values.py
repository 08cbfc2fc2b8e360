"""What is typed wrong is named with what was wanted, before an agent is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from skerry_agent import cli

AGENT = [sys.executable, "-m", "skerry_agent"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["throttle", "--rate", "0"], "0 is no bound: --off lifts the throttle"),
        (["throttle", "--rate", "nan"], "wanted a number of inferences per second above 0, got 'nan'"),
        (["throttle", "--rate", "inf"], "wanted a number of inferences per second above 0, got 'inf'"),
        (["throttle", "--rate", "-3"], "wanted a number of inferences per second above 0, got '-3'"),
        (["throttle", "--rate", "5", "--for", "infs"], "wanted a time as 30s, 10m, 2h or 1d, got 'infs'"),
        (["throttle", "--rate", "5", "--for", "-1h"], "--for"),
        (["logs", "--last", "-1"], "--last"),
        (["logs", "--last", "0"], "wanted a number from 1, got '0'"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert wanted in capsys.readouterr().err


def test_a_reader_that_goes_away_early_is_no_fault_with_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [*AGENT, "lifecycle", "--print"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_whoever_interrupts_a_command_gets_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text(f'state_dir = "{tmp_path / "state"}"')
    # A shell starts what runs in the background with SIGINT ignored, and that is inherited: here somebody is at the terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # It waits for the token on its standard input.
    waits = subprocess.Popen(
        [*AGENT, "enrol", "--config", str(tmp_path / "agent.toml")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, before, since = time.monotonic() + 60, "", time.monotonic()
    while time.monotonic() < min(deadline, since + 0.5):
        state, *_, user, system = Path(f"/proc/{waits.pid}/stat").read_text().rpartition(")")[2].split()[:13]
        if (now := state + user + system) != before or state != "S":
            before, since = now, time.monotonic()
        time.sleep(0.02)
    waits.send_signal(signal.SIGINT)
    _, said = waits.communicate(timeout=60)
    assert (waits.returncode, said) == (130, "skerry-agent: stopped\n")
