"""A bundle validated in a child process: the verdict is a value, whatever the bundle does to the process that looks at it.

``validate_bundle`` is what the server and the CLI call. ``python -m skerry_runtime.validation FOLDER`` is the child; what it
checks stands in ``examination``. It writes one JSON object per line: where it has got to, and at the end the result. If it
dies, the last place it reported is where the bundle killed it.

Run by hand, it prints those lines too, and exits 0 when the bundle is valid, 1 when it is not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import msgspec
from skerry_contract.reading import ready

from skerry_runtime import child
from skerry_runtime.errors import ADVICE
from skerry_runtime.proof import Proof

MODULE = "skerry_runtime.validation"


class VariantResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one variant.

    Attributes:
        status: ``passed``, ``failed``, or ``skipped`` when this machine cannot run it.
        code, detail: why not.
        load_ms, latency_p50_us, latency_p95_us: measured here, one row, transforms included.
        rss_mb: memory that loading and running it added, in MB (1e6 bytes); process_rss_mb: the whole process at its peak.
        proof: cases, passed, max_abs_diff, recall, failures of the replay; None when it did not come to it.
    """

    id: str
    runtime: str
    status: Literal["passed", "failed", "skipped"]
    code: str = ""
    detail: str = ""
    runtime_version: str = ""
    load_ms: float = 0.0
    latency_p50_us: float = 0.0
    latency_p95_us: float = 0.0
    rss_mb: float = 0.0
    process_rss_mb: float = 0.0
    proof: Proof | None = None


class ValidationResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The verdict on a bundle, ready for JSON.

    Attributes:
        ok: every variant that could run here passed, and at least one did.
        code, detail, advice: why not; empty when ok.
        digest, model, version: of the bundle, empty when it could not be opened.
        machine: architecture and runtimes of the machine that looked.
        took_s: seconds.
    """

    ok: bool
    code: str = ""
    detail: str = ""
    advice: str = ""
    digest: str = ""
    model: str = ""
    version: str = ""
    variants: tuple[VariantResult, ...] = ()
    machine: dict[str, str] = {}
    took_s: float = 0.0

    def to_json(self) -> bytes:
        """One JSON object."""
        return msgspec.json.encode(self)


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the child has got to."""

    stage: str
    digest: str = ""
    model: str = ""
    version: str = ""


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the child's output."""

    progress: Progress | None = None
    result: ValidationResult | None = None


ready(Line)


def validate_bundle(
    folder: str | Path, timeout_s: float = 60.0, memory_mb: int = 4000, digest: str | None = None
) -> ValidationResult:
    """Validates a bundle in a child process. Never raises for anything that the bundle does.

    Args:
        folder: the bundle's folder.
        timeout_s: seconds for all of it, the start of Python included.
        memory_mb: address space of the child in MB (1e6 bytes); Python and a runtime map about 250 before they load anything.
        digest: the identity it must have; None takes what is there.

    Returns:
        The verdict. A crash has code ``runtime_crashed``, a hang ``timeout``, memory ``out_of_memory``.
    """
    arguments = [os.path.abspath(folder), f"--timeout-s={timeout_s}", f"--memory-mb={memory_mb}"]
    outcome = child.run_module(MODULE, [*arguments, *([f"--digest={digest}"] if digest else [])], timeout_s=timeout_s)
    progress, result = _read_lines(outcome.stdout)
    if result is None or outcome.returncode not in (0, 1):
        code, detail = _explain_death(outcome, progress.stage)
        result = ValidationResult(
            ok=False, code=code, detail=detail, digest=progress.digest, model=progress.model, version=progress.version
        )
    return msgspec.structs.replace(result, took_s=round(outcome.took_s, 3), advice=ADVICE.get(result.code, ""))


def _read_lines(stdout: bytes) -> tuple[Progress, ValidationResult | None]:
    progress, result = Progress(stage="start"), None
    for line in stdout.splitlines():
        try:
            found = msgspec.json.decode(line, type=Line)
        except msgspec.DecodeError:
            continue  # cut off by death
        progress, result = found.progress or progress, found.result or result
    return progress, result


def _explain_death(outcome: child.Outcome, stage: str) -> tuple[str, str]:
    last_words = " ".join(outcome.stderr.decode("utf-8", "replace").split())[-300:]
    said = f"; its last words: {last_words}" if last_words else ""
    if outcome.timed_out or outcome.signal_name in ("SIGXCPU", "SIGALRM"):
        return "timeout", f"not done after {outcome.took_s:.1f} s, in {stage}"
    if outcome.overflowed:
        return "runtime_crashed", f"wrote more than {child.MAX_STDOUT_BYTES} bytes, in {stage}"
    memory = any(word in last_words for word in ("bad_alloc", "MemoryError", "Cannot allocate memory", "out of memory"))
    if memory or outcome.signal_name == "SIGKILL":
        return "out_of_memory", f"no memory left, in {stage}{said}"
    if outcome.signal_name:
        return "runtime_crashed", f"killed by {outcome.signal_name}, in {stage}{said}"
    return "runtime_crashed", f"exit {outcome.returncode}, in {stage}{said}"


if __name__ == "__main__":
    from skerry_runtime import examination

    sys.exit(examination.main(sys.argv[1:]))
