"""How many cases of the public TUF conformance suite the device's updater passes, by ``tests/system/tuf_conformance_client``.

The suite is fetched at a commit into ``.bench/`` and has an environment of its own; ``faketime`` is the system's program. No case is
expected to fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.bench.peer_environment import interpreter
from tests.bench.result import Result, scratch

ADDRESS = "https://github.com/theupdateframework/tuf-conformance"
COMMIT = "eec841c186f81f2d9d8d30460c7e7deefa615f9e"
CLIENT = Path(__file__).parents[1] / "system" / "tuf_conformance_client"
_CLOSING = re.compile(r"(\d+) (passed|failed|error|errors|skipped|xfailed)\b")


def run() -> Result:
    if shutil.which("faketime") is None:
        raise RuntimeError("no program faketime, e.g. apt-get install faketime")
    # The client is a program whose first line asks the path for Python.
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    command = [str(interpreter("conformance")), "-m", "pytest", "-q", "tuf_conformance", f"--entrypoint={CLIENT}"]
    done = subprocess.run(
        command, cwd=_suite(), env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    closing = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    counts = {what: int(number) for number, what in _CLOSING.findall(closing)}
    if not counts:
        raise RuntimeError((done.stdout + done.stderr)[-500:])
    return Result(
        bench="tuf_conformance", value=counts.get("passed", 0), unit="cases", n=sum(counts.values()),
        note=f"of {sum(counts.values())}, at commit {COMMIT[:7]} of the suite: {closing}",
    )  # fmt: skip


def _suite() -> Path:
    folder = scratch() / "tuf-conformance"
    if not folder.exists():
        coming = folder.with_suffix(".coming")
        shutil.rmtree(coming, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", ADDRESS, str(coming)], check=True)
        coming.rename(folder)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", "--detach", COMMIT], check=True)
    return folder
