"""Processes of the product that start by forking one which has imported it already.

A fresh interpreter spends up to two seconds of a core on imports, and the tests start hundreds. ``start`` and ``run`` are what
``subprocess.Popen`` and ``subprocess.run`` are: the process has an environment, arguments, descriptors, signals and an end of its own. What an
import loads, and that a program starts from nothing, is shown by tests that do start it so: the architecture's and the whole systems'.

``python -m tests.warm MODULE...`` is the process that forks, one per pytest process, set of modules and PYTHONPATH. Its standard input is a socket. For each
message with four descriptors (standard input, output and error, and a pipe for the exit status) it answers with a process id.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
MOST_BYTES = 1 << 20
COURIER = tuple(f"skerry_agent.courier.{verb}" for verb in ("download", "enrolment", "logs", "lookup", "unsealing"))
PRELOADED = {
    "agent_process.py": (
        "skerry_agent.supervisor",
        "skerry_agent.config",
        "skerry_agent.logring",
        "skerry_agent.workers",
    ),
    "killed_courier.py": COURIER,
    "killed_repository.py": ("skerry_server.repository", "skerry_server.metadata"),
    "skerry_agent.courier": COURIER,
    "skerry_cli": ("skerry_cli.app", "pydantic.type_adapter", "zoneinfo"),
    "skerry_server": ("skerry_server.app", "skerry_server.cli", "skerry_server.folder"),
}
"""By a module's name, or a script's."""


class Forked:
    """A process as ``subprocess.Popen`` shows one."""

    def __init__(self, pid: int, status: int, stdout: IO[bytes] | None) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = stdout
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        if self.returncode is None and self._ended(0.0):
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._ended(timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> bool:
        # Not select(): a test may have opened more than a thousand descriptors.
        status = select.poll()
        status.register(self._status, select.POLLIN)
        return bool(status.poll(None if timeout_s is None else timeout_s * 1000))

    def _end(self) -> None:
        with self._lock:
            if self.returncode is None:
                told = os.read(self._status, 32)
                assert told, f"who started process {self.pid} is gone"
                self.returncode = int(told)
                os.close(self._status)


class _Source:
    """The process that forks, and the way to it. ``path``: its PYTHONPATH; what it has imported came from there."""

    def __init__(self, modules: Sequence[str], path: str) -> None:
        self._mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        self._lock = threading.Lock()
        command = [sys.executable, "-m", "tests.warm", *modules]
        self._process = subprocess.Popen(command, stdin=its, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
        its.close()
        atexit.register(self._close)

    def fork(self, asked: dict[str, Any], descriptors: Sequence[int]) -> int:
        with self._lock:
            socket.send_fds(self._mine, [json.dumps(asked).encode()], descriptors)
            told = self._mine.recv(32)
        assert told, "the process that forks is gone"
        return int(told)

    def _close(self) -> None:
        self._mine.close()
        self._process.wait(10)


@functools.cache
def _source(modules: tuple[str, ...], path: str) -> _Source:
    return _Source(modules, path)


def start(
    module: str,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int,
    stdout: int,
    stderr: int,
    cwd: Path | None = None,
) -> Forked:
    """``python -m module arguments``, or ``python script.py arguments``. The streams are descriptors; stdout may be ``subprocess.PIPE``."""
    ours: IO[bytes] | None = None
    theirs = stdout
    if stdout == subprocess.PIPE:
        end, theirs = os.pipe()
        ours = os.fdopen(end, "rb")
    status, its_status = os.pipe()
    asked = {"module": module, "arguments": list(arguments), "env": dict(env), "cwd": str(cwd or Path.cwd())}
    try:
        pid = _source(PRELOADED[module.rpartition("/")[2]], env.get("PYTHONPATH", "")).fork(
            asked, [stdin, theirs, stderr, its_status]
        )
    finally:
        os.close(its_status)
        if ours is not None:
            os.close(theirs)
    return Forked(pid, status, ours)


def run(
    module: str, arguments: Sequence[str], *, env: Mapping[str, str], given: str = "", timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, with all that it says."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(given.encode())
        stdin.seek(0)
        process = start(module, arguments, env=env, stdin=stdin.fileno(), stdout=out.fileno(), stderr=err.fileno())
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess([module, *arguments], code, *said)


# --- the process that forks ----------------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Forks as asked. Returns in each new process what it is to do, and None in the old one when nobody will ask any more."""
    children: dict[int, tuple[int, int]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not control:
                    pidfd = key.fd
                    selector.unregister(pidfd)
                    os.close(pidfd)
                    pid, status = children.pop(pidfd)
                    _tell(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    continue
                message, descriptors, _, _ = socket.recv_fds(control, MOST_BYTES, 4)
                if not message:
                    return None
                pid = os.fork()
                if pid == 0:
                    for pidfd, (_, status) in children.items():
                        os.close(pidfd)
                        os.close(status)
                    return {**json.loads(message), "streams": descriptors[:3], "status": descriptors[3]}
                for descriptor in descriptors[:3]:
                    os.close(descriptor)
                pidfd = os.pidfd_open(pid)
                children[pidfd] = (pid, descriptors[3])
                selector.register(pidfd, selectors.EVENT_READ)
                control.send(str(pid).encode())


def _tell(status: int, code: int) -> None:
    try:
        os.write(status, str(code).encode())
    except BrokenPipeError:
        pass
    os.close(status)


def _become(asked: dict[str, Any]) -> None:
    """Makes this process what a fresh interpreter would be, and runs the module."""
    os.close(asked["status"])
    for number, descriptor in enumerate(asked["streams"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - they live as long as the process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    more = [entry for entry in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if entry not in {*sys.path, ""}]
    sys.path[1:1] = more
    sys.argv = [asked["module"], *asked["arguments"]]
    if asked["module"].endswith(".py"):
        sys.path[0] = str(Path(asked["module"]).parent)
        runpy.run_path(asked["module"], run_name="__main__")
    else:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


def main() -> None:
    """Forks until the other end of its standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if "skerry_cli.app" in sys.modules:
        # What typer makes of the program anew at each start; it takes longer than most commands.
        program = sys.modules["skerry_cli.app"]
        program.app = importlib.import_module("typer.main").get_command(program.app)
    gc.freeze()
    asked = _serve(control)
    control.close()
    if asked is not None:
        _become(asked)


if __name__ == "__main__":
    main()
