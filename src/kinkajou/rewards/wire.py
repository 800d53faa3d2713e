"""Answers as JSON for whoever scores them in another process."""

import json
import math
from collections.abc import Sequence
from typing import Any

from kinkajou.rewards.answer import Answer

OWN = ("prompts", "completions", "messages", "ended")
"""Arguments of a reward function that a row's field of the same name does not replace."""


def encode(value: Any) -> bytes:
    """One line of strict JSON; what JSON lacks is null (NaN) or its text (a date)."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def messages(answer: Answer) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in answer.prompt.messages]


def samples(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For a service: one object for each answer."""
    return [
        {
            "id": i,
            "prompt": answer.question,
            "messages": messages(answer),
            "response": answer.text,
            "ended": answer.ended,
            "meta": dict(answer.prompt.meta),
        }
        for i, answer in enumerate(answers)
    ]


def columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """For a function: one list for each argument, TRL's way; a field that a row lacks is None."""
    names = dict.fromkeys(str(name) for answer in answers for name in answer.prompt.meta)
    fields = {name: [answer.prompt.meta.get(name) for answer in answers] for name in names if name not in OWN}
    return {
        "prompts": [answer.question for answer in answers],
        "completions": [answer.text for answer in answers],
        "messages": [messages(answer) for answer in answers],
        "ended": [answer.ended for answer in answers],
        **fields,
    }
