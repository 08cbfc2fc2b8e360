"""MLServer serving an ONNX file, in its own environment and process: the peer of the HTTP benchmarks.

It runs in its fastest form: in one process (``parallel_workers`` 0), logging off, and a runtime of a few lines that calls
onnxruntime with the same options as ours.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Self

from tests.bench.peer_environment import interpreter
from tests.bench.peer_server import PeerServer, free_ports

HERE = Path(__file__).parent

_RUNTIME = """
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(self.settings.parameters.uri, options, providers=["CPUExecutionProvider"])
        self._outputs = [node.name for node in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        found = self._session.run(self._outputs, feeds)
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[NumpyCodec.encode_output(name, value) for name, value in zip(self._outputs, found)],
        )
"""


class MLServer(PeerServer):
    """A running MLServer with one model, ``gas``. Use as a context manager."""

    def __init__(self, folder: Path, model: Path) -> None:
        python = interpreter("mlserver")
        folder.mkdir()
        ports = free_ports(3)
        self.port, self.grpc_port = ports[:2]
        settings = {
            "host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2],
            "parallel_workers": 0, "use_structured_logging": False, "debug": False,
        }  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(
            json.dumps({"name": "gas", "implementation": "onnx_peer.OnnxModel", "parameters": {"uri": str(model)}})
        )
        (folder / "onnx_peer.py").write_text(_RUNTIME)
        command = [str(python), "-m", "mlserver.cli.main", "start", "."]
        super().__init__(folder, command, f"http://127.0.0.1:{self.port}/v2/models/gas/ready", python_path=str(folder))


class GrpcClient:
    """Asks a running MLServer for ``gas`` over gRPC with a raw tensor ``x``. Use as a context manager.

    MLServer's REST side takes JSON only: gRPC is where it takes tensors as they are.
    """

    def __init__(self, port: int, file: Path, shape: tuple[int, ...]) -> None:
        command = [
            str(interpreter("mlserver")),
            str(HERE / "mlserver_grpc_client.py"),
            str(port),
            str(file),
            json.dumps(shape),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer: list[float] = []

    def block(self, n: int) -> list[float]:
        """Milliseconds of each of ``n`` requests; ``answer`` is the last one's tensor."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{n}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        self.answer = told["answer"]
        return list(told["took"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
