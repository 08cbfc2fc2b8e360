"""``tritonclient.http``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tritonclient.http as triton

from tests.integration.worker.clients import asking as a


class Client:
    def __init__(self, port: int) -> None:
        self._address = f"127.0.0.1:{port}"
        self._client = triton.InferenceServerClient(self._address)

    def live(self) -> bool:
        return bool(self._client.is_server_live())

    def ready(self) -> bool:
        return bool(self._client.is_server_ready())

    def model_ready(self, model: str) -> bool:
        return bool(self._client.is_model_ready(model))

    def metadata(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get_model_metadata(model)
        return found

    def infer(self, asked: a.Asked) -> a.Answered:
        inputs, outputs = _tensors(asked)
        return _answered(self._client.infer(asked.model, inputs, outputs=outputs, request_id=asked.id))

    def many(self, asked: Sequence[a.Asked], at_once: int) -> list[a.Answered]:
        with triton.InferenceServerClient(self._address, concurrency=at_once) as client:
            flying = []
            for one in asked:
                inputs, outputs = _tensors(one)
                flying.append(client.async_infer(one.model, inputs, outputs=outputs, request_id=one.id))
            return [_answered(future.get_result()) for future in flying]

    def close(self) -> None:
        self._client.close()

    # --- what only this client has ------------------------------------------------------------------------------------

    def index(self) -> Any:
        return self._client.get_model_repository_index()

    def statistics(self, model: str = "", version: str = "") -> Any:
        return self._client.get_inference_statistics(model, version)

    def load(self, model: str) -> None:
        self._client.load_model(model)

    def extensions(self) -> list[str]:
        found: list[str] = self._client.get_server_metadata()["extensions"]
        return found

    def infer_version(self, asked: a.Asked, version: str) -> a.Answered:
        inputs, outputs = _tensors(asked)
        return _answered(self._client.infer(asked.model, inputs, outputs=outputs, model_version=version))

    def infer_packed(self, asked: a.Asked, request: str | None, response: str | None) -> a.Answered:
        inputs, outputs = _tensors(asked)
        return _answered(
            self._client.infer(
                asked.model, inputs, outputs=outputs, request_compression_algorithm=request,
                response_compression_algorithm=response,
            )
        )  # fmt: skip


def _tensors(asked: a.Asked) -> tuple[list[Any], list[Any] | None]:
    inputs = []
    for name, array in asked.inputs.items():
        datatype = a.datatype_of(array)
        one = triton.InferInput(name, list(array.shape), datatype)
        one.set_data_from_numpy(array, binary_data=asked.binary_in)
        inputs.append(one)
    if asked.outputs is None:
        return inputs, None
    return inputs, [triton.InferRequestedOutput(name, binary_data=asked.binary_out) for name in asked.outputs]


def _answered(result: Any) -> a.Answered:
    response = result.get_response()
    return a.Answered(response.get("id", ""), {o["name"]: result.as_numpy(o["name"]) for o in response["outputs"]})
