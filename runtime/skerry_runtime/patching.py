"""A delta made in a child process with limits, and tried before anyone gets it.

``make_patch`` is what the server calls. ``python -m skerry_runtime.patching BASE TARGET PATCH ...`` is the child: it reads two files of
models, writes the patch, applies it and compares, and says on stdout what came of it in one line of JSON. Files of bundles are what
people pushed: taking them apart may need much memory or time, and costs neither anybody else.

The child ends with the thread that started it: a server that is killed leaves none behind.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from skerry_contract.reading import ready

from skerry_runtime import child

MODULE = "skerry_runtime.patching"
_PR_SET_PDEATHSIG = 1
_NICE = 10
_SLACK_BYTES = 1 << 20


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of it.

    Attributes:
        size: bytes of the patch; 0 when there is none.
        methods: bytes of the target by the method that gives them.
        code, detail: why there is none: ``no_delta``, ``wrong_base``, ``wrong_result``, ``timeout``, ``out_of_memory`` or ``crashed``.
        took_s: seconds, the trial included.
    """

    size: int = 0
    methods: dict[str, int] = {}
    code: str = ""
    detail: str = ""
    took_s: float = 0.0


ready(Outcome)


def make_patch(
    base: Path,
    target: Path,
    patch: Path,
    *,
    base_sha256: str,
    sha256: str,
    size: int,
    timeout_s: float,
    memory_mb: int,
    unwanted: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Makes and tries the delta from ``base`` to ``target``. Never raises for anything that the files do to the child.

    Args:
        patch: where it is written; what lies there without a size in the answer is worth nothing.
        base_sha256: of the base, which devices have; sha256, size: of the target, which the trial must come to.
        timeout_s: seconds for all of it, the start of Python included.
        memory_mb: address space of the child in MB (1e6 bytes).
        unwanted: as for ``child.run_module``.
    """
    arguments = [os.path.abspath(path) for path in (base, target, patch)]
    arguments += [
        f"--base-sha256={base_sha256}",
        f"--sha256={sha256}",
        f"--size={size}",
        f"--timeout-s={timeout_s}",
        f"--memory-mb={memory_mb}",
    ]
    arguments.append(f"--parent={os.getpid()}")
    ended = child.run_module(MODULE, arguments, timeout_s=timeout_s, unwanted=unwanted)
    try:
        found = msgspec.json.decode(ended.stdout, type=Outcome)
    except msgspec.DecodeError:
        found = _explain(ended)
    return msgspec.structs.replace(found, took_s=round(ended.took_s, 3))


def _explain(ended: child.Outcome) -> Outcome:
    words = " ".join(ended.stderr.decode("utf-8", "replace").split())[-300:]
    if ended.timed_out or ended.signal_name in ("SIGXCPU", "SIGALRM"):
        return Outcome(code="timeout", detail=f"not done after {ended.took_s:.1f} s")
    if "MemoryError" in words or "Cannot allocate memory" in words or ended.signal_name == "SIGKILL":
        return Outcome(code="out_of_memory", detail=f"no memory left: {words}" if words else "no memory left")
    return Outcome(code="crashed", detail=f"{ended.signal_name or f'exit {ended.returncode}'}: {words}")


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before the request was made.
    if os.getppid() != parent:
        raise SystemExit(3)


def main(arguments: Sequence[str]) -> int:
    """The child."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    for name in ("base", "target", "patch"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--base-sha256", required=True)
    parser.add_argument("--sha256", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--memory-mb", type=int, default=4096)
    parser.add_argument("--parent", type=int, default=0)
    wish = parser.parse_args(arguments)
    if wish.parent:
        _die_with(wish.parent)
    os.nice(_NICE)
    child.limit_self(memory_mb=wish.memory_mb, timeout_s=wish.timeout_s, max_written_bytes=2 * wish.size + _SLACK_BYTES)
    own = child.private_stdout()
    os.write(own, msgspec.json.encode(_make(wish)))
    return 0


def _make(wish: argparse.Namespace) -> Outcome:
    from skerry_runtime import delta

    base, target, patch, sha256, size = wish.base, wish.target, wish.patch, wish.sha256, wish.size
    began = time.monotonic()
    with base.open("rb") as file:
        held = hashlib.file_digest(file, "sha256").hexdigest()
    if held != wish.base_sha256:
        # A disk that rots. The patch would fit no device's file.
        return Outcome(code="wrong_base", detail=f"the file {wish.base_sha256} has sha256 {held} on this server")
    try:
        summary = delta.make(base, target, patch)
    except delta.DeltaError as error:
        return Outcome(code="no_delta", detail=str(error)[:300])
    tried = patch.with_name(patch.name + ".tried")
    try:
        delta.apply(base, patch, tried, sha256=sha256, size=size)
    except delta.DeltaError as error:
        return Outcome(code="wrong_result", detail=str(error)[:300])
    finally:
        tried.unlink(missing_ok=True)
    return Outcome(
        size=patch.stat().st_size, methods=summary.bytes_by_method(), took_s=round(time.monotonic() - began, 3)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
