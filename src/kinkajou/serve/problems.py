"""What a client is told when its request fails: one body, with a status, never a traceback or a foreign text."""

import json
from collections.abc import Mapping

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from kinkajou.serve.backend import Broken, Full, Refused

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = Field(None, description="The field of the request that is to blame.")
    code: str | None = None
    request_id: str | None = Field(None, description="By which the server's log knows the request.")


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


WORDS = {
    400: "The request cannot be done as it is",
    401: "The key is missing or wrong",
    404: "There is no such model or path",
    413: "The body is too long",
    415: "The body is not application/json",
    429: "Too many requests: come again after Retry-After seconds",
    503: "The model is not there, or the server is stopping",
    504: "The deadline has passed",
}
PROBLEMS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorBody, "description": words} for status, words in WORDS.items()
} | {"default": {"model": ErrorBody, "description": "Any other fault"}}
"""For `responses=` of a route that takes a body."""


class Problem(HTTPException):
    """An answer that is no success."""

    def __init__(
        self, status: int, message: str, *, param: str = "", code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self.message, self.param, self.code = message, param, code
        super().__init__(status, message, dict(headers or {}))

    def body(self, request_id: str = "") -> dict[str, dict[str, str | None]]:
        kind = KINDS.get(self.status_code, KINDS[400] if self.status_code < 500 else KINDS[500])
        error = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": error | ({"request_id": request_id} if request_id else {})}

    def response(self, request_id: str = "") -> JSONResponse:
        return JSONResponse(self.body(request_id), self.status_code, self.headers)

    def event(self, request_id: str = "") -> bytes:
        """The same as an event of a stream that has begun."""
        return b"data: " + json.dumps(self.body(request_id), ensure_ascii=False).encode() + b"\n\n"


class Busy(Problem):
    """No room: 429."""

    def __init__(self, wait_s: int, message: str = "the queue is full", code: str = "queue_full") -> None:
        super().__init__(429, message, code=code, headers={"retry-after": str(wait_s)})


class Deadline(Problem):
    """The request took longer than it may: 504."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(504, f"not finished within {deadline_s:g} s", code="deadline")


class Stopping(Problem):
    """The server has been told to stop: 503."""

    def __init__(self, message: str = "the server is stopping") -> None:
        super().__init__(503, message, code="stopping", headers={"retry-after": "5"})


class Unexpected(Problem):
    """Our fault: 500."""

    def __init__(self) -> None:
        super().__init__(500, "the server failed at this request; its log has the reason", code="internal_error")


def problem_of(fault: Problem | Refused | Broken) -> Problem:
    if isinstance(fault, Refused):
        return Problem(400, fault.problem, param=fault.param, code=fault.code)
    if isinstance(fault, Full):
        wait = {"retry-after": str(fault.wait_s)} if fault.wait_s is not None else None
        return Problem(429, str(fault), code="backend_busy", headers=wait)
    if isinstance(fault, Broken):
        return Problem(503, str(fault), code="model_failed", headers={"retry-after": "5"})
    return fault
