"""How a request that is not served is answered over HTTP: OpenAI's form, one line, a status."""

import logging
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cairn.errors import InputError
from cairn.observe.log import log_once
from cairn.serve.base import RequestError

logger = logging.getLogger(__name__)

JSON_TYPE: Final = "application/json"


class ErrorBody(BaseModel):
    """message: one line. type: the status in words."""

    message: str
    type: str
    code: int


class ErrorResponse(BaseModel):
    """What every request is answered that is not served."""

    error: ErrorBody


def refusal(message: str, status: int) -> Response:
    """The answer. What is refused before its body was read ends the connection: the rest of it is not waited for."""
    kind = HTTPStatus(status).phrase.lower().replace(" ", "_")
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "code": status}})
    early = status in (401, 408, 413, 415, 503)
    return Response(body, status, media_type=JSON_TYPE, headers={"connection": "close"} if early else None)


def first_of(error: ValidationError | RequestValidationError) -> str:
    """The first thing that is wrong, in one line; values are left out, as they may be long or secret."""
    first, *others = error.errors()
    place = ".".join(str(part) for part in first["loc"])
    rule = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    more = f" (and {len(others)} more)" if others else ""
    return f"{place}: {rule}{more}" if place else f"{rule}{more}"


def install(app: FastAPI) -> None:
    """Makes an app answer so, whatever went wrong."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, InputError)
        return refusal(str(error), error.status if isinstance(error, RequestError) else 400)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, ValidationError | RequestValidationError)
        return refusal(first_of(error), 400)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = refusal(f"{request.method} {request.url.path[:200]}: {error.detail}", error.status_code)
        answer.headers.update(error.headers or {})
        return answer

    async def failed(_: Request, error: Exception) -> Response:
        log_once(logger, f"request {type(error).__name__}", f"a request failed: {error!r}")
        return refusal("this request failed inside; the service's log has it", 500)

    handlers: dict[type[Exception], Any] = {InputError: refused, ValidationError: invalid, HTTPException: http}
    handlers[RequestValidationError] = invalid
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, failed)
