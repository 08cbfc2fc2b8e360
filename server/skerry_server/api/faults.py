"""Every failure in one shape: ``{"error": {"code", "message", "details"?}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from skerry_contract.errors import ContractError, Malformed
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from skerry_server.db.engine import is_unavailable
from skerry_server.errors import Refused

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5

_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}


def answer(status: int, code: str, message: str, details: dict[str, Any] | None = None) -> JSONResponse:
    """The response of a failure."""
    error: dict[str, Any] = {"code": code, "message": message}
    if details:
        error["details"] = jsonable_encoder(details)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_AFTER_S)}}.get(status)
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return answer(error.status, error.code, error.message, error.details)


async def _contract(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ContractError)
    details = {"where": error.where} if isinstance(error, Malformed) and error.where else None
    return answer(422, error.code, str(error), details)


async def _validation(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # Without the inputs: they may be secrets.
    faults = [{"where": ".".join(map(str, fault["loc"])), "message": fault["msg"]} for fault in error.errors()[:50]]
    said = "; ".join(f"{fault['where']}: {fault['message']}" for fault in faults[:5])
    return answer(422, "bad_request", said, {"faults": faults})


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return answer(error.status_code, _CODES.get(error.status_code, "refused"), str(error.detail))


async def _unstorable(_request: Request, _error: Exception) -> JSONResponse:
    return answer(422, "bad_request", "wanted text that is UTF-8 (no lone surrogates) and numbers of at most 64 bits")


async def _database(request: Request, error: Exception) -> JSONResponse:
    if not is_unavailable(error):
        return await _bug(request, error)
    log.error("database busy or away method=%s path=%s error=%s", request.method, request.url.path, error)
    return answer(503, "database_busy", "the database does not take this now; try again later")


async def _bug(request: Request, error: Exception) -> JSONResponse:
    log.error("request failed method=%s path=%s", request.method, request.url.path, exc_info=error)
    return answer(500, "internal", "the server failed; its log says more")


def install(app: FastAPI) -> None:
    """Makes the application answer every failure in our shape."""
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(ContractError, _contract)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(UnicodeEncodeError, _unstorable)
    app.add_exception_handler(OverflowError, _unstorable)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(PoolTimeout, _database)
    app.add_exception_handler(Exception, _bug)
