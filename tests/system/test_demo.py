"""``skerry demo`` as a person runs it: its claims, its summary, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from skerry_cli.demo.processes import RECORD

DEMO = [sys.executable, "-m", "skerry_cli", "demo"]


def left_behind(folder: Path) -> list[str]:
    """Processes whose command line names the demo's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(folder) in line and process.pid != os.getpid():
            found.append(line)
    return found


def eventually(condition: Callable[[], object], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.slow
def test_the_demo_loses_nothing_refuses_what_it_must_and_cleans_up(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = subprocess.run([*DEMO, "--dir", str(folder)], capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((folder / "summary.json").read_text())
    counted = summary["inferences"]
    assert counted["answered"] == counted["counted_by_server"] > 1000
    assert (counted["lost"], counted["counted_twice"], summary["failed_requests"]["during_swaps"]) == (0, 0, 0)
    assert (
        counted["asked_by_applications"] == counted["answered"] + summary["failed_requests"]["by_the_crashing_bundle"]
    )
    assert set(summary["versions"].values()) == {"2.0.0"} and len(summary["versions"]) == 16
    assert sorted(summary["variants"].values()) == ["onnx-int8"] * 12 + ["tflite-int8"] * 4
    on_tflite = {device for device, variant in summary["variants"].items() if variant == "tflite-int8"}
    for candidates in (summary["first_stage"], summary["bad_version"]["candidates"]):
        assert (len(candidates), len(on_tflite & set(candidates))) == (4, 1)
    assert [refusal["code"] for refusal in summary["refusals"]] == [
        "mirror_wrong",
        "bad_signature",
        "below_floor",
        "trial_crashed",
    ]
    assert summary["without_network"]["answered_offline"] > 0
    assert summary["bell_to_confirmed_s"]["n"] >= 31
    labels = summary["labels"]
    assert labels["sent"] == labels["matched"] == labels["counted_by_server"] > 1000
    assert labels["differences"] == []
    assert summary["drift"]["batch_1"] == "STEADY" and summary["drift"]["raised_on_batch"] == 2
    good, bad = summary["judged"]["second-model"], summary["judged"]["third-model"]
    assert (good["verdict"], bad["verdict"]) == ("PASS", "FAIL")
    assert good["recomputed_alike"] and bad["recomputed_alike"] and good["detectable_ratio"] > 1
    assert sorted(good["candidates"]) == summary["first_stage"]
    ended = summary["bad_version"]
    assert 0 < ended["first_answer_to_verdict_s"] < ended["first_answer_to_last_online_device_back_s"]
    assert ended["offline_device"] in ended["candidates"]
    right = {(step["batch"], step["version"]): step for step in summary["accuracy"]}
    assert set(right) == {(1, "1.0.0"), (2, "1.0.0"), (5, "1.0.0"), (5, "2.0.0"), (6, "2.0.0"), (6, "3.0.0")}
    assert all(step["interval"][0] <= step["accuracy"] <= step["interval"][1] for step in right.values())
    assert right[6, "3.0.0"]["accuracy"] < right[6, "2.0.0"]["accuracy"]
    assert left_behind(folder) == []


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    # A shell starts what runs in the background with SIGINT ignored, and that is inherited: here somebody is at the terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    demo = subprocess.Popen(
        [*DEMO, "--dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        assert eventually(lambda: list(folder.glob("devices/*/state/run/serving.json")), 120)
        record = (folder / RECORD).read_text()
        for more in ((), ("--stop",)):
            second = subprocess.run([*DEMO, "--dir", str(folder), *more], capture_output=True, text=True, timeout=120)
            assert second.returncode == 2 and f"a demo runs here (pid {demo.pid})" in second.stderr, second.stderr
        assert demo.poll() is None
        assert {entry["pid"] for entry in json.loads(record)["processes"]} <= {
            entry["pid"] for entry in json.loads((folder / RECORD).read_text())["processes"]
        }, "the first one's fleet goes on"
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=90)
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)
            demo.communicate()
    assert demo.returncode == 130 and "Traceback" not in err, out + err
    assert "interrupted" in err
    assert eventually(lambda: not left_behind(folder), 5), left_behind(folder)
    assert not folder.exists()


@pytest.mark.parametrize("error", ["ImportError('numpy: something in C failed')", "SystemError('no result')"])
def test_a_demo_that_is_interrupted_while_it_imports_says_so(tmp_path: Path, error: str) -> None:
    """An interrupt in the middle of C code does not arrive as one."""
    program = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "skerry_cli.demo.runner":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise {error}
sys.meta_path.insert(0, Finder())
from skerry_cli.app import main
main(["demo"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "skerry: stopped", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_demo_takes_its_fleet_along(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with (tmp_path / "out").open("wb") as out:
        demo = subprocess.Popen([*DEMO, "--dir", str(folder)], stdout=out, stderr=out)
        try:
            assert eventually(lambda: list(folder.glob("devices/*/state/run/serving.json")), 60)
        finally:
            demo.kill()
            demo.wait()
    assert eventually(lambda: not left_behind(folder), 20), left_behind(folder)


@pytest.mark.parametrize("arguments", [("--devices", "2"), ("--dir", ".")])
def test_a_demo_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, arguments: tuple[str, str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = subprocess.run([*DEMO, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert "wanted" in done.stderr or "not a demo's folder" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert not (tmp_path / "demo").exists()
