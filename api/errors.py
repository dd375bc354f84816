"""How every failure is told to an HTTP client: one table, one envelope.

Owns the mapping from exceptions to status, type and code, and the errors that only HTTP can make.
Never decides that something failed, and never shows a traceback.
Source: the error objects of the OpenAI API, whose clients read {"error": {message, type, param, code}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from declaim.api.gate import NO_HEADERS
from declaim.engine.errors import (
    Cancelled,
    DeclaimError,
    EngineClosed,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestError,
    TooLong,
)


class ApiError(DeclaimError):
    """An error that brings its own answer, so that the table need not know it.

    headers: sent with the answer, names in lower case; they say whether and when a retry helps.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str,
        code: str | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.headers = headers


class MissingParameter(InvalidRequest):
    """A required field is absent or null."""


class InvalidBody(InvalidRequest):
    """The body is not JSON, or not an object."""


class BodyTooLarge(RequestError):
    """The body has more bytes than the server reads."""


class UnsupportedMediaType(RequestError):
    """The body's content type is not the one this path takes."""


class NotReady(EngineError):
    """The model is still loading, could not be loaded, or is being closed."""


class ClientGone(DeclaimError):
    """The client hung up; nobody will read an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of the table. retry_after_s: how long a client should wait, None where a retry cannot help."""

    status: int
    type: str
    code: str | None = None
    retry_after_s: float | None = None


# The first row whose class fits is taken, so a class stands before its base.
_TABLE: tuple[tuple[type[DeclaimError], Answer], ...] = (
    (MissingParameter, Answer(400, "invalid_request_error", "missing_required_parameter")),
    (InvalidBody, Answer(400, "invalid_request_error")),
    (TooLong, Answer(400, "invalid_request_error", "string_above_max_length")),
    (InvalidRequest, Answer(400, "invalid_request_error", "invalid_value")),  # VoiceNotFound too
    (ModelNotFound, Answer(404, "invalid_request_error", "model_not_found")),
    (BodyTooLarge, Answer(413, "invalid_request_error", "request_too_large")),
    (UnsupportedMediaType, Answer(415, "invalid_request_error")),
    (RequestError, Answer(400, "invalid_request_error")),
    (Overloaded, Answer(503, "service_unavailable_error", "server_is_overloaded", 1.0)),
    (NotReady, Answer(503, "service_unavailable_error", "server_is_overloaded", 5.0)),
    (EngineClosed, Answer(503, "service_unavailable_error", "server_is_overloaded", 5.0)),
    (ClientGone, Answer(499, "invalid_request_error")),
    (Cancelled, Answer(499, "invalid_request_error")),
    (DeclaimError, Answer(500, "server_error")),
)
_HTTP_CODES = {405: "method_not_supported", 413: "request_too_large"}
# The engine's name of a field -> the API's
_PARAMS = {"text": "input"}


def answer_for(error: DeclaimError) -> Answer:
    """The row of the table that fits `error`; an Overloaded brings its own wait, an ApiError all of it."""
    if isinstance(error, ApiError):
        return Answer(error.status, error.type, error.code)
    answer = next(row for kind, row in _TABLE if isinstance(error, kind))
    if isinstance(error, Overloaded):
        return Answer(answer.status, answer.type, answer.code, error.retry_after_s)
    return answer


def envelope(message: str, *, type: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """The body of an error, all four keys present."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_body(error: DeclaimError) -> dict[str, object]:
    """The envelope of a declaim error."""
    answer = answer_for(error)
    param = error.param if isinstance(error, InvalidRequest) else None
    return envelope(str(error), type=answer.type, param=_PARAMS.get(param or "", param), code=answer.code)


def error_response(error: DeclaimError) -> JSONResponse:
    """The whole answer to a declaim error, with the headers by which clients time a retry."""
    answer = answer_for(error)
    headers = dict(error.headers) if isinstance(error, ApiError) else {}
    if answer.retry_after_s is not None:
        headers["x-should-retry"] = "true"
        headers["retry-after"] = str(max(1, math.ceil(answer.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(answer.retry_after_s * 1000)))
    return JSONResponse(error_body(error), answer.status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of `app` answer with the envelope: ours, the router's, and the unexpected."""
    app.add_exception_handler(DeclaimError, _on_declaim_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_declaim_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, DeclaimError):
        raise error
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    message = str(error.detail)
    if error.status_code == 404:
        message = f"Invalid URL ({request.method} {request.url.path})"
    elif error.status_code == 405:
        message = f"Invalid method for URL ({request.method} {request.url.path})"
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    body = envelope(message, type=kind, code=_HTTP_CODES.get(error.status_code))
    return JSONResponse(body, error.status_code, error.headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI checks, such as query parameters. OpenAI answers 400 where FastAPI would answer 422."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    param = str(first["loc"][-1]) if first["loc"] else None
    is_missing = first["type"] == "missing"
    message = f"Missing required parameter: '{param}'" if is_missing else f"Invalid '{param}': {first['msg']}"
    code = "missing_required_parameter" if is_missing else "invalid_value"
    return JSONResponse(envelope(message, type="invalid_request_error", param=param, code=code), 400)


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
    # The server logs the traceback; a client gets only what it can report.
    message = "Internal error: the server's log has the cause under this answer's x-request-id"
    return JSONResponse(envelope(message, type="server_error"), 500)
