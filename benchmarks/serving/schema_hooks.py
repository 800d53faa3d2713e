"""What the schema cannot say, for schemathesis: rules on a chat's last turn, on ids, on all answers of a request.

JSON Schema has no word for the last item of a list, so that bodies that are right by the schema would be refused by
these rules.  Only such a body is changed; the rules themselves have tests of their own in tests/serve/.

Beside the phase that tries exact bounds texts are shortened, of those that are too long all but one: schemathesis
likes to fill them to 200,000 characters and more, and keeps all that it has sent (30 GB for 4,000 cases).
"""

from typing import Any

import schemathesis

from kinkajou.serve.limits import Limits

SHORT = 4000
ALLOWED = Limits().content_chars


class Shortener:
    """Of the texts of one field that are too long one stays so: it makes the body as wrong as all of them."""

    def __init__(self) -> None:
        self.kept = set[tuple[str, ...]]()

    def of(self, value: Any, field: tuple[str, ...] = ()) -> Any:
        if isinstance(value, str):
            stays = len(value) > ALLOWED and field not in self.kept
            self.kept |= {field} if stays else set()
            return value if stays else value[:SHORT]
        if isinstance(value, dict):
            return {key: self.of(inner, (*field, key)) for key, inner in value.items()}
        return [self.of(inner, field) for inner in value] if isinstance(value, list) else value


def ends(turns: Any, **change: str) -> Any:
    """The same turns with the last one changed, where they are a list of objects."""
    whole = isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
    return [*turns[:-1], {**turns[-1], **change}] if whole else turns


@schemathesis.hook
def before_call(context: Any, case: Any, **kwargs: Any) -> None:
    """Bodies that were meant to be right end as they must; long ones are short."""
    if case.meta is not None and case.meta.phase.name.value != "coverage":
        case.body = Shortener().of(case.body)
    body = case.body
    if case.meta is None or case.meta.generation.mode.value != "positive" or not isinstance(body, dict):
        return
    if "history" in body:
        case.body = {**body, "history": ends(body["history"], response="")}
    if isinstance(body.get("prompt"), list) and len(body["prompt"]) > 1:  # n answers to each may be more than fit
        case.body = {**body, "n": 1}
    if case.path == "/v1/rewards" and isinstance(body.get("input"), list):
        case.body = {**body, "input": [answered(chat) for chat in body["input"]]}
    if case.path == "/v1/rewards" and isinstance(body.get("samples"), list):
        numbered = [{**row, "id": i} if isinstance(row, dict) else row for i, row in enumerate(body["samples"])]
        case.body = {**case.body, "samples": numbered}


def answered(chat: Any) -> Any:
    """The same chat, its last turn the assistant's."""
    told = isinstance(chat, dict) and "messages" in chat
    return {**chat, "messages": ends(chat["messages"], role="assistant")} if told else chat
