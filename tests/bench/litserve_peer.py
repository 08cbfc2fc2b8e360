"""LitServe serving an ONNX file, in its own environment and process: the second peer of the HTTP benchmarks.

It runs as its documentation has it for a CPU (one API process, one worker, its fast queue), logging off, with an API of a few lines
that calls onnxruntime with the same options as ours. Its requests are JSON objects or forms: a raw tensor goes as a file of a form.
"""

from __future__ import annotations

from pathlib import Path

from tests.bench.peer_environment import interpreter
from tests.bench.peer_server import PeerServer, free_ports

_SERVER = """
import sys

import litserve
import numpy as np
import onnxruntime as ort
from fastapi import Request

model, port, raw = sys.argv[1], int(sys.argv[2]), sys.argv[3]
shape = tuple(int(part) for part in raw.split(",")) if raw else ()


class Api(litserve.LitAPI):
    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: Request):
        if shape:
            return np.frombuffer(request["x"].file.read(), np.float32).reshape(shape)
        return np.array(request["x"], np.float32).reshape(1, -1)

    def predict(self, x):
        return self._session.run(None, {"x": x})[0]

    def encode_response(self, output):
        return {"data": output.ravel().tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
"""


class LitServe(PeerServer):
    """A running LitServe with one model at ``/predict``. Use as a context manager.

    Args:
        shape: of the raw tensor ``x`` in a form; JSON rows when empty.
    """

    def __init__(self, folder: Path, model: Path, *, shape: tuple[int, ...] = ()) -> None:
        python = interpreter("litserve")
        folder.mkdir()
        (self.port,) = free_ports(1)
        (folder / "server.py").write_text(_SERVER)
        command = [str(python), "server.py", str(model), str(self.port), ",".join(map(str, shape))]
        super().__init__(folder, command, f"http://127.0.0.1:{self.port}/health", python_path="")


def form(data: bytes) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a form whose file ``x`` holds the bytes."""
    line = "skerry-bench"
    head = f'--{line}\r\nContent-Disposition: form-data; name="x"; filename="x"\r\nContent-Type: application/octet-stream\r\n\r\n'
    body = head.encode() + data + f"\r\n--{line}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={line}"}
