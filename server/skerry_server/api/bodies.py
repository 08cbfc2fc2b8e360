"""How a request's JSON is read: as everywhere, but that no object may name a key twice."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from skerry_contract import canonical
from skerry_contract.errors import Malformed
from starlette.exceptions import HTTPException


class _OneReading(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            data = await self.body()
            try:
                self._json = canonical.refuse_repeated_keys(data, what="body")
            except Malformed as error:
                raise HTTPException(400, str(error)) from None
        return self._json


class Route(APIRoute):
    """A route of the API. Nothing but JSON is read differently: a body that streams still does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI says."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_OneReading(request.scope, request.receive))

        return strict
