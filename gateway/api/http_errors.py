"""Errors as clients of the OpenAI API expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from ...messages.errors import (
    EngineClosedError,
    InvalidRequestError,
    ModelNumericsError,
    OctavoError,
    QueueFullError,
    RequestQuarantinedError,
)
from ...messages.request import RequestEnded

MAX_MESSAGE_CHARS = 500
"""An error never gives back more of what a client sent than this."""

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_STATUS_OF_CODE: Final = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "queue_full": 429,
    "engine_closed": 503,
    "executor_lost": 503,
    "engine_oom": 503,
    "request_quarantined": 422,  # when it comes again; 500 the first time: see `from_ended`
}

_PUBLIC_TEXT_OF_CODE: Final = {
    "engine_oom": "there is not enough memory for this request: send a shorter one, or try again later",
    "executor_lost": "the model is not available at the moment: try again later",
    "engine_closed": "the server is shutting down: try again later",
    "model_numerics": "the model computed values for this request that are no numbers; others are not affected",
    "request_quarantined": "the model's process failed each time at this request; it is refused for ten minutes",
}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of the HTTP response.
        message: what was asked, what is possible, what to change.
        param: the request's field, as a dotted path.
        code: stable name of the kind of error; the type's name if not given.
        headers: of the response, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "..."
        self.param = param
        self.type = _TYPES.get(status, "invalid_request_error")
        self.code = code or self.type
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON object that stands for this error, in a response or inside a stream."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def response(self) -> web.Response:
        response = web.Response(
            status=self.status, body=self.body(), content_type="application/json", headers=self.headers or None
        )
        if "Connection" in self.headers:
            response.force_close()
        return response


def bad_request(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_public_error(error: OctavoError) -> ApiError:
    """The HTTP side of an error that the engine raised at once."""
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code=error.code, headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code=error.code, headers={"Retry-After": "5"})
    return from_code(error.code, "")


def from_ended(ended: RequestEnded | None) -> ApiError:
    """The HTTP side of a request that was refused or failed later on."""
    if ended is None:
        return from_code("request_failed", "")
    # A refusal always comes from the request itself unless its code says otherwise.
    code = ended.error_code or ("invalid_request" if ended.reason == "refused" else "request_failed")
    if code in (RequestQuarantinedError.code, ModelNumericsError.code) and ended.reason == "error":
        return ApiError(500, _PUBLIC_TEXT_OF_CODE[code], code=code)
    return from_code(code, ended.error, ended.error_param or None)


def from_code(code: str, text: str, param: str | None = None) -> ApiError:
    status = _STATUS_OF_CODE.get(code, 500)
    if status == 500:
        # What went wrong inside is for the log, not for whoever sent the request.
        return ApiError(500, "the engine could not finish this request; others are not affected", code="request_failed")
    headers = {"Retry-After": "1"} if status == 429 else {"Retry-After": "5"} if status == 503 else None
    public_text = text if status < 500 else _PUBLIC_TEXT_OF_CODE.get(code, text)
    return ApiError(status, public_text, param=param, code=code, headers=headers)
