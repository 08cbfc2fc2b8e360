"""Runs in the guest, as root, by the agent's own interpreter: an application, and somebody who looks at the device.

``boot.py`` puts it into a copy of the image. Speaks lines on the second serial port: ``# ...`` for people, one JSON object per
finding for ``boot.py``; reads what to do next from there.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

ROWS = Path(__file__).with_name("rows.json")
UNIT = "skerry-agent.service"
ASKED = 200


def said(*command: str) -> str:
    """What a program says, on both outputs; its exit code stands at the end when it is not 0."""
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return (ended.stdout + ended.stderr).rstrip() + (f"\n[exit {ended.returncode}]" if ended.returncode else "")


def shown(name: str) -> str:
    """One property of the agent's unit."""
    return said("systemctl", "show", "--value", "-p", name, UNIT)


class Application:
    """Asks the agent, one row after the other."""

    def __init__(self) -> None:
        self._rows = json.loads(ROWS.read_text())
        self.asked = self.failed = 0
        self.took_ms: list[float] = []

    def ready(self) -> bool:
        """Whether the model answers."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", 8500, timeout=10)
            connection.request("GET", "/v2/models/gas/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def ask(self) -> dict[str, Any]:
        """One inference; an empty answer when it failed."""
        row = self._rows[self.asked % len(self._rows)]
        self.asked += 1
        body = {"inputs": [{"name": "readings", "shape": [1, len(row)], "datatype": "FP32", "data": row}]}
        began = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", 8500, timeout=30)
            connection.request("POST", "/v2/models/gas/infer", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = json.loads(answer.read())
        except (OSError, ValueError, http.client.HTTPException):
            self.failed += 1
            return {}
        if answer.status != 200:
            self.failed += 1
            return {}
        self.took_ms.append((time.monotonic() - began) * 1e3)
        return dict(told)


def processes() -> list[dict[str, Any]]:
    """What runs in the agent's control group."""
    group = Path("/sys/fs/cgroup") / shown("ControlGroup").lstrip("/")
    found = []
    for pid in (group / "cgroup.procs").read_text().split():
        status = Path(f"/proc/{pid}/status").read_text()
        rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        found.append({"pid": int(pid), "rss_mb": round(rss_kib / 1024, 1), "command": " ".join(words[1:6])})
    return found


def main() -> None:
    """The guest's part of the story."""
    port = open("/dev/ttyS1", "r+b", buffering=0)  # noqa: SIM115 - until the machine is off
    lines: TextIO = open("/dev/ttyS1", encoding="utf-8")  # noqa: SIM115

    def speak(text: str) -> None:
        port.write("".join(f"# {line}\n" for line in text.splitlines()).encode())

    def tell(**finding: Any) -> None:
        port.write(json.dumps(finding).encode() + b"\n")

    def show(*command: str) -> None:
        speak(f"$ {' '.join(command)}\n{said(*command)}")

    application = Application()
    while shown("ActiveState") != "active":
        time.sleep(0.5)
    tell(step="agent up", uptime_s=float(Path("/proc/uptime").read_text().split()[0]))
    while not application.ready():
        time.sleep(0.5)
    tell(step="model ready", uptime_s=float(Path("/proc/uptime").read_text().split()[0]))
    answer: dict[str, Any] = {}
    for _ in range(ASKED):
        answer = application.ask() or answer
    ordered = sorted(application.took_ms)
    speak(f"last answer: {json.dumps(answer)[:400]}")
    tell(
        step="asked", asked=application.asked, failed=application.failed, version=answer.get("model_version"),
        p50_ms=round(ordered[len(ordered) // 2], 1), p95_ms=round(ordered[len(ordered) * 95 // 100], 1),
    )  # fmt: skip
    while said("systemctl", "is-system-running") in ("initializing\n[exit 1]", "starting\n[exit 1]"):
        time.sleep(1)
    show("systemd-analyze", "time")
    show("systemctl", "--no-pager", "--failed")
    show("systemctl", "--no-pager", "--lines=0", "status", "skerry-agent-enrol.service", UNIT)
    show("skerry-agent", "status")
    show("skerry-agent", "doctor")
    show("df", "-h", "/")
    show("head", "-n", "3", "/proc/meminfo")
    show("ls", "-ln", "/var/lib/skerry-agent")
    speak(said("systemd-analyze", "--no-pager", "security", UNIT).splitlines()[-1])
    tell(step="looked", processes=processes(), memory_mb=round(int(shown("MemoryCurrent")) / 2**20, 1))

    lines.readline()
    first = shown("MainPID")
    before = application.failed
    began = time.monotonic()
    os.kill(int(first), signal.SIGSTOP)
    asked = 0
    while shown("MainPID") == first:
        application.ask()
        asked += 1
        time.sleep(0.5)
    killed_s = time.monotonic() - began
    tell(step="watchdog", killed_after_s=round(killed_s, 1), asked=asked, failed=application.failed - before,
         result=shown("Result"))  # fmt: skip
    while shown("ActiveState") != "active" or not application.ready():
        time.sleep(0.5)
    tell(
        step="back", after_s=round(time.monotonic() - began, 1), restarts=int(shown("NRestarts")),
        version=application.ask().get("model_version"), asked=application.asked, failed=application.failed,
    )  # fmt: skip
    show("journalctl", "--no-pager", "-o", "short-monotonic", "-u", "skerry-agent*")

    lines.readline()
    said("systemctl", "--no-block", "poweroff")


if __name__ == "__main__":
    sys.exit(main())
