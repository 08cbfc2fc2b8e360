"""``kserve.InferenceRESTClient`` with ``kserve.protocol.infer_type``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import httpx
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

from tests.integration.worker.clients import asking as a

T = TypeVar("T")


class Client:
    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._loop = asyncio.new_event_loop()
        self._client = InferenceRESTClient(RESTConfig(protocol="v2"))

    def live(self) -> bool:
        return bool(self._run(self._client.is_server_live(self._base)))

    def ready(self) -> bool:
        return bool(self._run(self._client.is_server_ready(self._base)))

    def model_ready(self, model: str) -> bool:
        try:
            return bool(self._run(self._client.is_model_ready(self._base, model)))
        except httpx.HTTPStatusError:
            return False

    def metadata(self, model: str) -> dict[str, Any]:
        # It has no call for that; its connection has.
        found: dict[str, Any] = self._run(self._client._client.get(f"{self._base}/v2/models/{model}")).json()
        return found

    def infer(self, asked: a.Asked) -> a.Answered:
        return self._run(self._infer(self._client, asked))

    async def _infer(self, client: Any, asked: a.Asked) -> a.Answered:
        headers: dict[str, str] = {}
        response = await client.infer(self._base, _request(asked), model_name=asked.model, response_headers=headers)
        return a.Answered(response.id, {o.name: o.as_numpy() for o in response.outputs}, headers)

    def many(self, asked: Sequence[a.Asked], at_once: int) -> list[a.Answered]:
        async def all_of_them() -> list[a.Answered]:
            gate = asyncio.Semaphore(at_once)

            async def one(what: a.Asked) -> a.Answered:
                async with gate:
                    return await self._infer(self._client, what)

            return list(await asyncio.gather(*map(one, asked)))

        return self._run(all_of_them())

    def close(self) -> None:
        self._run(self._client.close())
        self._loop.close()

    def _run(self, work: Awaitable[T]) -> T:
        async def waited() -> T:
            return await work

        return self._loop.run_until_complete(waited())


def _request(asked: a.Asked) -> Any:
    inputs = []
    for name, array in asked.inputs.items():
        one = InferInput(name, list(array.shape), a.datatype_of(array))
        one.set_data_from_numpy(array, binary_data=asked.binary_in)
        inputs.append(one)
    outputs = None
    if asked.outputs is not None:
        outputs = [RequestedOutput(name, {"binary_data": asked.binary_out}) for name in asked.outputs]
    parameters = {"binary_data_output": True} if asked.binary_out and outputs is None else None
    return InferRequest(
        asked.model, inputs, request_id=asked.id or None, request_outputs=outputs, parameters=parameters
    )
