"""The demo leaves nothing behind, and never touches a process that is not its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from skerry_cli.demo.processes import RECORD, Processes, start_time, stop_recorded

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
PARENT_PROGRAM = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
PARENT = [sys.executable, "-c", PARENT_PROGRAM]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def test_stopping_ends_children_of_children_too(tmp_path: Path) -> None:
    processes = Processes(tmp_path, leashed=True)
    parent = processes.start("parent", PARENT, stdout=True)
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    assert start_time(grandchild) is not None
    processes.stop()
    assert eventually(lambda: start_time(grandchild) is None)
    assert json.loads((tmp_path / RECORD).read_bytes()) == {"processes": []}


def test_a_process_that_ignores_the_polite_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skerry_cli.demo.processes._GRACE_S", 0.3)
    processes = Processes(tmp_path, leashed=False)
    process = processes.start("stubborn", STUBBORN, stdout=True)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    processes.stop()
    assert process.returncode == -signal.SIGKILL


def test_leashed_processes_end_when_the_demo_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom skerry_cli.demo.processes import Processes\n"
        "started = Processes(Path(sys.argv[1]), leashed=True).start('sleeper', sys.argv[2:])\n"
        "print(started.pid, flush=True)\ntime.sleep(60)\n"
    )
    demo = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), *SLEEPER], stdout=subprocess.PIPE)
    assert demo.stdout is not None
    sleeper = int(demo.stdout.readline())
    # The leash is set by the child itself: wait until it has become the sleeper.
    assert eventually(lambda: b"leash.py" not in Path(f"/proc/{sleeper}/cmdline").read_bytes())
    demo.kill()
    demo.wait()
    demo.stdout.close()
    assert eventually(lambda: start_time(sleeper) is None)


def test_the_next_run_ends_what_a_killed_run_left(tmp_path: Path) -> None:
    left = Processes(tmp_path, leashed=False).start("left", SLEEPER)
    assert stop_recorded(tmp_path) == ["left"]
    assert left.wait(5) == -signal.SIGTERM
    assert not (tmp_path / RECORD).exists()
    assert stop_recorded(tmp_path) == []


def test_a_pid_that_now_belongs_to_another_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(SLEEPER, start_new_session=True)
    try:
        since = start_time(stranger.pid)
        assert since is not None
        entry = {"name": "ours", "pid": stranger.pid, "since": since - 100}
        (tmp_path / RECORD).write_text(json.dumps({"processes": [entry]}))
        assert stop_recorded(tmp_path) == []
        time.sleep(0.2)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize(
    "record", ["", "{}", '{"processes": [{"pid": 1}]}', '{"processes": [{"name": "a", "pid": 1, "since": 0}]}']
)
def test_a_damaged_record_stops_nothing(tmp_path: Path, record: str) -> None:
    (tmp_path / RECORD).write_text(record)
    assert stop_recorded(tmp_path) == []
    assert start_time(os.getpid()) is not None
