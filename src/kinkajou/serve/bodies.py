"""Bodies of requests: JSON as the house reads it everywhere, and faults that name their field."""

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from kinkajou.data.strict_json import JSONFault, parse
from kinkajou.serve.limits import Limits
from kinkajou.serve.problems import Problem

MAX_ERROR_CHARS = 300
LIMITS = Limits()
SIGNS = (b",", b"[", b"{")
TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A JSON text, or what has begun as one: it never fails, so it is found in one pass."""


class StrictRequest(Request):
    """Refuses what Python's parser forgives: keys given twice, NaN, lone surrogates, numbers without end."""

    async def json(self) -> Any:
        return strict_json(await self.body())


class StrictRoute(APIRoute):
    """`APIRouter(route_class=StrictRoute)`: a pydantic model as parameter is read from a strict body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly


def strict_json(body: bytes) -> Any:
    """Problem 400 for what is no JSON in UTF-8, or has more values than any request needs."""
    if many(body) and many(TEXT.sub(b"", body)):
        raise Problem(400, f"the body has more than {LIMITS.num_values:,} values", code="invalid_json")
    try:
        text = body.decode()
    except UnicodeDecodeError as fault:
        raise Problem(400, f"the body is not UTF-8: byte {fault.start}", code="invalid_json") from None
    try:
        value = parse(text)
    except JSONFault as fault:
        raise Problem(400, f"the body is {_told(fault)}", code="invalid_json") from None
    # Only an escape can write half a character: UTF-8 itself has none.
    if "\\u" in text and has_surrogate(value):
        raise Problem(400, "the body has half a surrogate pair", code="invalid_json")
    return value


def many(body: bytes) -> bool:
    return sum(map(body.count, SIGNS)) > LIMITS.num_values


def _told(fault: JSONFault) -> str:
    place = "" if fault.end is None and fault.pos == 0 else f" (character {fault.pos})"
    return f"no JSON that is accepted: {fault.problem.removeprefix('invalid JSON: ')}{place}"


def has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return any(has_surrogate(name) or has_surrogate(item) for name, item in value.items())
    return isinstance(value, list) and any(has_surrogate(item) for item in value)


def _place(parts: list[str | int], value: Any) -> list[str]:
    """Fields and numbers alone: pydantic also names the form that was tried, where several are allowed."""
    found = []
    for i, part in enumerate(parts):
        here = isinstance(part, str) and isinstance(value, dict) and (part in value or i + 1 == len(parts))
        if here or (isinstance(part, int) and isinstance(value, list)):
            found.append(str(part))
            value = value.get(part) if isinstance(value, dict) else value[part]
    return found


def invalid(fault: RequestValidationError) -> Problem:
    """The first fault of a body against its schema, without the value that was given."""
    first = fault.errors()[0]
    place = _place([part for part in first["loc"] if part != "body"], fault.body)
    message = str(first["msg"])[:MAX_ERROR_CHARS].removeprefix("Value error, ")
    if not place:
        return Problem(400, f"the body: {message}", code="invalid_body")
    name = ".".join(place)[:MAX_ERROR_CHARS]
    return Problem(400, f"{name}: {message}", param=name, code="invalid_value")
