"""JSON bodies: what holds the server up is refused before it is parsed."""

import json

import pytest

from kinkajou.serve.bodies import many, strict_json
from kinkajou.serve.limits import Limits
from kinkajou.serve.problems import Problem

MANY = Limits().num_values + 1


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"1," * MANY + b"1]",
        b"[" * MANY,
        b'{"a":"' + b'\\"' * 9 + b'",' + b'"b":1,' * MANY + b'"c":1}',
        b'["\\\\",' + b"[]," * MANY + b"[]]",
    ],
)
def test_more_values_than_any_request_needs(body: bytes) -> None:
    with pytest.raises(Problem, match="more than 30,000 values") as told:
        strict_json(body)
    assert told.value.status_code == 400


@pytest.mark.parametrize("text", ["," * MANY, '",[{' * MANY, '\\",' * MANY, "[" * MANY + '"'])
def test_a_text_may_say_anything(text: str) -> None:
    body = json.dumps({"prompt": text}).encode()
    assert many(body)  # so its texts are looked at
    assert strict_json(body) == {"prompt": text}


def test_a_text_without_end_is_read_once() -> None:
    """Were each of its quotes tried as a beginning, this would take hours."""
    with pytest.raises(Problem, match="no JSON"):
        strict_json(b'["' + b'\\",' * 500_000)
