"""Runs a module of ours in a child process that may crash, hang or eat memory, and reports what became of it.

The parent: own session and process group, no inherited descriptors, a small environment, a deadline, bounded output, and
at the end the whole group is killed, whatever the child may have started. The child: ``limit_self`` before it touches
anything it was given. Both halves are needed: limits cannot be set from a threaded parent without ``preexec_fn``, which is
not safe there, and a deadline that only the child keeps is none.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_STDOUT_BYTES = 4 << 20
MAX_STDERR_BYTES = 64 << 10
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ", "TMPDIR", "SYSTEMROOT", "VIRTUAL_ENV")
_GRACE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a child.

    Attributes:
        returncode: exit status, or minus the signal that ended it.
        timed_out: the parent killed it at the deadline.
        overflowed: the parent killed it because it wrote too much to stdout.
        stdout: all of it; stderr: its last part.
        took_s: seconds from start to end.
    """

    returncode: int
    timed_out: bool
    overflowed: bool
    stdout: bytes
    stderr: bytes
    took_s: float

    @property
    def signal_name(self) -> str:
        """``SIGSEGV`` and the like when a signal ended it, else empty."""
        if self.returncode >= 0:
            return ""
        try:
            return signal.Signals(-self.returncode).name
        except ValueError:
            return f"signal {-self.returncode}"


def run_module(
    module: str, arguments: Sequence[str], *, timeout_s: float, unwanted: Callable[[], bool] = lambda: False
) -> Outcome:
    """Runs ``python -m module arguments`` to its end, its deadline, or its output limit. Never raises for what it does.

    Args:
        module: of an installed package; it should call ``limit_self`` first.
        arguments: for the module.
        timeout_s: seconds after which the group is killed.
        unwanted: asked several times a second; when it says so, the group is killed as at its deadline.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        close_fds=True,
        cwd="/",
        env=_environment(),
    )
    try:
        stdout, stderr, timed_out, overflowed = _drain(process, start + timeout_s, unwanted)
    finally:
        _end_group(process)
    return Outcome(
        returncode=process.returncode,
        timed_out=timed_out,
        overflowed=overflowed,
        stdout=bytes(stdout),
        stderr=bytes(stderr),
        took_s=time.monotonic() - start,
    )


def limit_self(*, memory_mb: int, timeout_s: float, max_files: int = 64, max_written_bytes: int = 0) -> None:
    """Limits the calling process, for good: address space, CPU and wall time, open files, no core, what it writes to disk.

    Args:
        memory_mb: address space, in MB (1e6 bytes); what a library maps counts, used or not.
        timeout_s: CPU seconds; a little later an alarm ends the process, should its parent be gone.
        max_files: open descriptors.
        max_written_bytes: of one file; 0 for none at all.
    """
    cpu_s = max(1, int(timeout_s) + 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, max_written_bytes)
    _limit(resource.RLIMIT_NOFILE, max_files)
    _limit(resource.RLIMIT_CPU, cpu_s)
    _limit(resource.RLIMIT_AS, memory_mb * 1_000_000)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)


def private_stdout() -> int:
    """Moves the real stdout to a descriptor of its own and lets ``print`` and C libraries write to stderr instead.

    Returns:
        The descriptor on which only the caller's results go.
    """
    sys.stdout.flush()
    own = os.dup(1)
    os.set_inheritable(own, False)
    os.dup2(2, 1)
    return own


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    # The child must find the same packages, also when the caller runs from a checkout.
    paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if paths:
        kept["PYTHONPATH"] = os.pathsep.join(paths)
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **one_thread, "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}


def _drain(
    process: subprocess.Popen[bytes], deadline: float, unwanted: Callable[[], bool]
) -> tuple[bytearray, bytearray, bool, bool]:
    """Reads both pipes until they close, the process is gone or unwanted, the deadline passes or stdout is too long."""
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, stdout)
        selector.register(process.stderr, selectors.EVENT_READ, stderr)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or unwanted():
                return stdout, stderr, True, False
            events = selector.select(min(left, 0.2))
            for key, _ in events:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
            if len(stdout) > MAX_STDOUT_BYTES:
                return stdout, stderr, False, True
            del stderr[:-MAX_STDERR_BYTES]
            if not events and _gone(process):
                # A grandchild may hold the pipes open for ever: the child itself is what we wait for.
                return stdout, stderr, False, False
    while not _gone(process):
        if time.monotonic() >= deadline or unwanted():
            return stdout, stderr, True, False
        time.sleep(0.01)
    return stdout, stderr, False, False


def _gone(process: subprocess.Popen[bytes]) -> bool:
    # WNOWAIT: it stays a zombie, so that its group id cannot be another's when the group is killed.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
