"""Deltas of pairs of models, ours and five others': bytes, seconds and peak memory to make and to apply.

Every tool runs as a process of its own, so that its memory is its own; what it makes is applied and compared.
``python -m tests.bench.delta_measuring`` prints the table of docs/explanation/deltas.md.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import real_models
from tests.bench import finetunes
from tests.bench.peer_environment import interpreter
from tests.bench.result import scratch
from tests.real_models import Source

OURS = "skerry"
SLACK_BYTES = 256
"""What a patch may hold beside the smallest peer's: digests and sizes, which a pair of equal files shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one tool on one pair."""

    size_bytes: int
    make_s: float
    make_mb: float
    apply_s: float
    apply_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two versions of a model."""

    name: str
    base: Path
    target: Path


def _release(distribution: str, version: str, folder: str, **files: str) -> Source:
    paths = {folder + name.replace("__", "."): sha256 for name, sha256 in files.items()}
    return Source(distribution=distribution, version=version, files=paths)


_SILERO = "silero_vad/data/"
_WAKEWORD = "pymicro_wakeword/models/"
_KEPT = {
    "alexa__tflite": "9011a8155b04de858c48038529235cbc0e42e9fca05a55bf588cb80a653a723b",
    "hey_mycroft__tflite": "c2a9b6ed51182db72e014781d5a4ece1929dc232a40b5b4be384f0295f0e1571",
}
RELEASES = (
    (
        _release("silero-vad", "5.1.2", _SILERO, silero_vad__onnx="2623a2953f6ff3d2c1e61740c6cdb7168133479b267dfef114a4a3cc5bdd788f"),
        _release(
            "silero-vad", "6.0.0", _SILERO, silero_vad__onnx="597d30b3ec076608d059477bb14cfeffdf951bf5cae370d38f65d33bbfe82004",
            silero_vad_16k_op15__onnx="794ed8a51d4f37faf0555383aa34dbaeeb83e3031a1df1e0351c457e1142bd3e",
        ),
        _release(
            "silero-vad", "6.2.0", _SILERO, silero_vad__onnx="1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            silero_vad_16k_op15__onnx="7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        ),
    ),
    (
        _release("magika", "0.5.1", "magika/models/standard_v1/", model__onnx="71892ac28ffe028b9512561584970417f8cee1f2fbb7624634f4032cb92a0a5a"),
        _release("magika", "0.6.1", "magika/models/standard_v3_2/", model__onnx="ba4f372744331c0088d7c9b8b4fd702f4bc2bdddbeecde27488fceeadf71c3ce"),
        _release("magika", "0.6.2", "magika/models/standard_v3_3/", model__onnx="fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"),
    ),
    (
        _release("pymicro-wakeword", "2.0.0", _WAKEWORD, okay_nabu__tflite="0689abe1912a95a3318a0d8cb2e67bad0cbcfe3e24dd6e050c75debddfb6f891", **_KEPT),
        _release("pymicro-wakeword", "2.5.0", _WAKEWORD, okay_nabu__tflite="d89128c4d16a72de429119fb2254ce46649553c2a24f5dd840175c80d7b9d094", **_KEPT),
    ),
)  # fmt: skip


def releases() -> Iterator[Pair]:
    """Models of public wheels, from each version to the next."""
    for versions in RELEASES:
        found = [real_models.fetch(source, real_models.FOLDER / source.version) for source in versions]
        for (old, before), (new, after) in zip(
            zip(versions, found, strict=True), list(zip(versions, found, strict=True))[1:], strict=False
        ):
            for name in sorted(before.keys() & after.keys()):
                label = f"{new.distribution} {name} {old.version} -> {new.version}"
                yield Pair(name=label, base=before[name], target=after[name])


def fine_tunes() -> Iterator[Pair]:
    """Those that are trained here."""
    for name, old, new in finetunes.pairs(real_models.FOLDER / "fine-tunes"):
        yield Pair(name=name, base=old, target=new)


def measure(pair: Pair) -> dict[str, Cost]:
    """Every tool's cost on a pair.

    Raises:
        RuntimeError: a program is missing or failed, or gave another file.
    """
    missing = [program for program in ("zstd", "xdelta3") if not shutil.which(program)]
    if missing:
        raise RuntimeError(f"install {' and '.join(missing)}, e.g. apt-get install {' '.join(missing)}")
    costs = {}
    with tempfile.TemporaryDirectory(dir=scratch(), prefix="deltas-") as name:
        patch, made = Path(name) / "patch", Path(name) / "made"
        for tool, (make, apply) in _tools(pair.base, pair.target, patch, made).items():
            make_s, make_mb = _run(make)
            size = patch.stat().st_size
            apply_s, apply_mb = _run(apply)
            if made.read_bytes() != pair.target.read_bytes():
                raise RuntimeError(f"{tool} did not give back {pair.target}")
            costs[tool] = Cost(size_bytes=size, make_s=make_s, make_mb=make_mb, apply_s=apply_s, apply_mb=apply_mb)
            patch.unlink()
            made.unlink()
    return costs


def smallest_peer(costs: dict[str, Cost]) -> int:
    """Bytes of the best of the others."""
    return min(cost.size_bytes for tool, cost in costs.items() if tool != OURS)


def imported_mb() -> float:
    """Of a process that imports what ours does to apply, and applies nothing."""
    return _run(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from skerry_runtime import delta; import skerry_runtime.delta.applying",
        ]
    )[1]


def _tools(base: Path, target: Path, patch: Path, made: Path) -> dict[str, tuple[list[str], list[str]]]:
    b, t, p, m = map(str, (base, target, patch, made))
    python = str(interpreter("deltas"))
    apply = (
        "import sys; from pathlib import Path; from skerry_runtime import delta; b, p, m, d, n = sys.argv[1:]; "
        "delta.apply(Path(b), Path(p), Path(m), sha256=d, size=int(n))"
    )
    make = (
        "import sys; from pathlib import Path; from skerry_runtime import delta; delta.make(*map(Path, sys.argv[1:]))"
    )
    bsdiff = "import sys, bsdiff4; getattr(bsdiff4, sys.argv[1])(*sys.argv[2:])"
    digest, size = hashlib.sha256(target.read_bytes()).hexdigest(), str(target.stat().st_size)
    return {
        OURS: ([sys.executable, "-c", make, b, t, p], [sys.executable, "-c", apply, b, p, m, digest, size]),
        "zstd -19": (["zstd", "-q", "-19", "-f", t, "-o", p], ["zstd", "-qdf", p, "-o", m]),
        "zstd --patch-from": (
            ["zstd", "-q", "--ultra", "-22", f"--patch-from={b}", "-f", t, "-o", p],
            ["zstd", "-qdf", f"--patch-from={b}", p, "-o", m],
        ),
        "bsdiff4": ([python, "-c", bsdiff, "file_diff", b, t, p], [python, "-c", bsdiff, "file_patch", b, m, p]),
        "detools": (
            [python, "-m", "detools", "create_patch", "-c", "lzma", b, t, p],
            [python, "-m", "detools", "apply_patch", b, p, m],
        ),
        "xdelta3": (
            ["xdelta3", "-e", "-9", "-S", "lzma", "-f", "-s", b, t, p],
            ["xdelta3", "-d", "-f", "-s", b, p, m],
        ),
    }


_LAUNCHER = """
import os, sys, time
started = time.monotonic()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print("launched", time.monotonic() - started, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds, and MB at the peak.

    A process begins with the peak of the one that started it, so a small one stands between.
    """
    launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    done = subprocess.run(launched, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stdout + done.stderr)[-400:]}")
    _, seconds, peak = done.stdout.splitlines()[-1].split()
    return float(seconds), float(peak)


def main(words: list[str]) -> None:
    """The table, of the pairs whose name has one of the words; costs on standard error."""
    tools: list[str] = []
    for pair in itertools.chain(releases(), fine_tunes()):
        if words and not any(word in pair.name for word in words):
            continue
        costs = measure(pair)
        if not tools:
            tools = list(costs)
            print(f"| pair | file | {' | '.join(tools)} | ours / smallest |\n|---|{'---:|' * (len(tools) + 2)}")
        cells = [f"{costs[tool].size_bytes}" for tool in tools]
        ratio = costs[OURS].size_bytes / smallest_peer(costs)
        print(f"| {pair.name} | {pair.target.stat().st_size} | {' | '.join(cells)} | {ratio:.3f} |", flush=True)
        for tool in tools:
            one = costs[tool]
            cost = f"make {one.make_s:.2f} s {one.make_mb:.0f} MB, apply {one.apply_s:.2f} s {one.apply_mb:.0f} MB"
            print(f"{pair.name}: {tool}: {cost}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
