"""Every datatype of the protocol through a real worker and a real model that gives back what it gets, by the real tritonclient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.integration.worker.echo import ONNX, echo_bundle
from tests.integration.worker.rig import Rig

VALUES = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 255, 7]], np.uint8),
    "UINT16": np.array([[0, 65535, 7]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1, 7]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1, 7]], np.uint64),
    "INT8": np.array([[-128, 127, 7]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1, 7]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1, 7]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1, 7]], np.int64),
    "FP16": np.array([[-65504.0, 6e-8, 0.1]], np.float16),
    "FP32": np.array([[-3.4e38, 1e-45, 0.1]], np.float32),
    "FP64": np.array([[-1.7e308, 5e-324, 0.1]], np.float64),
    "BYTES": np.array([["", "grüße", "a\0b"]], np.object_),
}


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_comes_back_as_it_went(rig: Rig, tmp_path: Path, binary: bool, coding: str | None) -> None:
    worker = rig.start(rig.served(echo_bundle(tmp_path / "echo")))
    # Half precision and subnormal numbers have no exact decimal form that every JSON writer of numpy gives: binary only.
    names = [name for name in ONNX if binary or name != "FP16"]
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        given = []
        for name in ONNX:
            one = triton.InferInput(f"in_{name}", [1, 3], name)
            one.set_data_from_numpy(VALUES[name], binary_data=binary or name == "FP16")
            given.append(one)
        wanted = [triton.InferRequestedOutput(f"out_{name}", binary_data=binary) for name in names]
        result = client.infer(
            "gas",
            given,
            outputs=wanted,
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        for name in names:
            found = result.as_numpy(f"out_{name}")
            if name == "BYTES":
                texts = [v.decode() if isinstance(v, bytes) else v for v in found.ravel()]
                assert texts == VALUES[name].ravel().tolist()
            else:
                assert found.dtype == VALUES[name].dtype
                np.testing.assert_array_equal(found, VALUES[name], err_msg=name)
    rig.stop(worker)
    assert rig.total().ok == 1


def test_binary_answers_carry_the_prediction_id_in_the_header_and_in_the_json_part(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        given = triton.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(np.zeros((1, 4), np.float32))
        response = client.infer("gas", [given]).get_response()
        assert response["outputs"][0]["parameters"]["binary_data_size"] == 12
        prediction = response["parameters"]["prediction_id"]
        assert prediction.startswith("gas-")


def test_a_text_that_is_no_utf8_is_refused_by_name(rig: Rig, tmp_path: Path) -> None:
    worker = rig.start(rig.served(echo_bundle(tmp_path / "echo")))
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        given = []
        for name in ONNX:
            one = triton.InferInput(f"in_{name}", [1, 3], name)
            one.set_data_from_numpy(np.array([[b"\xff", b"", b""]], np.object_) if name == "BYTES" else VALUES[name])
            given.append(one)
        with pytest.raises(InferenceServerException, match=r"in_BYTES.*UTF-8"):
            client.infer("gas", given)
    rig.stop(worker)
    assert (rig.total().ok, rig.total().invalid) == (0, 1)
