"""Which fields make which format of chats, pairs and prompts; a row -> one record."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from kinkajou.data.records import (
    Chat,
    Message,
    Messages,
    Pair,
    Prompt,
    Role,
    Row,
    RowFault,
    as_row,
    kind,
    listed,
    shown,
)

T = TypeVar("T")
Compared: TypeAlias = tuple[Messages, Messages, Messages]
"""Prompt, chosen, rejected."""


@dataclass(frozen=True, slots=True)
class Format(Generic[T]):
    """`build` takes a row that has every field of `needs` and not the field `unless`."""

    needs: tuple[str, ...]
    build: Callable[[Row], T]
    unless: str | None = None


def build_chat(value: object, place: str) -> Chat:
    """RowFault when the row is no conversation that ends with an answer."""
    row = as_row(value)
    messages = match(row, CHATS).build(row)
    if messages[-1].role == "user":
        raise RowFault("the conversation ends with the user, not with an answer")
    if messages[0].role != "text" and all(message.role != "user" for message in messages):
        raise RowFault("the conversation has no user message")
    return Chat(messages, place)


def build_pair(value: object, place: str) -> Pair:
    """RowFault when the row is no prompt with two different answers."""
    row = as_row(value)
    found = match(row, PAIRS)
    return Pair(*found.build(row), place, _rest(row, found.needs))


def build_prompt(value: object, place: str) -> Prompt:
    """RowFault when the row holds nothing to answer."""
    row = as_row({"prompt": value} if isinstance(value, str) else value)
    found = match(row, PROMPTS)
    messages = found.build(row)
    if not messages or messages[-1].role != "user":
        last = f"the {messages[-1].role}" if messages else "nobody"
        raise RowFault(f'field "{found.needs[0]}" ends with {last}, not with the user')
    return Prompt(messages, _rest(row, found.needs), place)


def _rest(row: Row, needs: tuple[str, ...]) -> Row:
    """The fields that the format does not read."""
    used = {*needs, "system", *(("input", "history") if "instruction" in needs else ())}
    return {name: item for name, item in row.items() if name not in used}


def match(row: Row, formats: tuple[Format[T], ...]) -> Format[T]:
    """The first format whose fields the row has; RowFault names the field that the likeliest one lacks."""
    for form in formats:
        if all(name in row for name in form.needs) and form.unless not in row:
            return form
    raise _missing(row, formats)


def _missing(row: Row, formats: tuple[Format[T], ...]) -> RowFault:
    """Names the field that the likeliest format lacks, and the misspelt one that may stand for it."""
    known = {name for form in formats for name in form.needs}
    spare = [name for name in row if name not in known and not name.endswith("_id")]
    has = "the row has: " + (listed(row) or "no fields")
    best: tuple[tuple[int, int], str, list[str]] | None = None
    for form in formats:
        absent = [name for name in form.needs if name not in row]
        near = {name: difflib.get_close_matches(name, spare, n=1, cutoff=0.7) for name in absent}
        unexplained = sum(not guess for guess in near.values())
        if absent and unexplained < len(form.needs):
            name = min(absent, key=lambda name: not near[name])
            rank = (unexplained, len(absent))
            if best is None or rank < best[0]:
                best = (rank, name, near[name])
    formats_known = "; ".join(dict.fromkeys(" + ".join(form.needs) for form in formats))
    if best is None:
        return RowFault("none of the known fields", evidence=has, fix=f"a row needs one of: {formats_known}")
    _, name, guess = best
    fix = f'rename {shown(guess[0])} to "{name}"' if guess else f"a row needs one of: {formats_known}"
    return RowFault(f'missing field "{name}"', evidence=has, fix=fix)


# --- parts of a row ---------------------------------------------------------------------------------------

ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatbot": "assistant",
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def _string(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f'field "{field}" is {kind(value)}' + (", not text" if value is not None else ""))
    return value


def _text(value: object, field: str) -> str:
    text = _string(value, field)
    if not text.strip():
        raise RowFault(f'field "{field}" is empty')
    return text


def _object(value: object, field: str) -> Row:
    if not isinstance(value, dict):
        raise RowFault(f'field "{field}" is {kind(value)}, not an object')
    return value


def _list(value: object, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowFault(f'field "{field}" is {kind(value)}, not a list')
    if not value:
        raise RowFault(f'field "{field}" is an empty list')
    return value


def _content(value: object, field: str) -> object:
    """A list of text parts joined; anything else as it is."""
    if not isinstance(value, list):
        return value
    joined = ""
    for number, item in enumerate(_list(value, field)):
        name = f"{field}[{number}]"
        part = _object(item, name)
        if part.get("type") != "text":
            raise RowFault(f'field "{name}" is a part of type {shown(str(part.get("type")))}, not "text"')
        key = "text" if "text" in part else "value"
        joined += _string(part.get(key), f"{name}.{key}")
    return joined


def _message(value: object, field: str) -> Message | None:
    """None for a system message without text, which says nothing."""
    item = _object(value, field)
    role_key = "role" if "role" in item else "from"
    content_key = "content" if "content" in item else "value"
    for key in (role_key, content_key):
        if key not in item:
            either = {"from": '"role" or "from"', "value": '"content" or "value"'}[key]
            raise RowFault(f'field "{field}" has no {either}', evidence=f"it has: {listed(item)}")
    word = _text(item[role_key], f"{field}.{role_key}")
    role = ROLES.get(word)
    if role is None:
        fix = f"roles known: {', '.join(ROLES)}"
        raise RowFault(f'field "{field}.{role_key}" is the unknown role {shown(word)}', fix=fix)
    if item.get("tool_calls"):
        raise RowFault(f'field "{field}" holds tool_calls, which cannot be trained on')
    content = _content(item[content_key], f"{field}.{content_key}")
    if role == "system" and isinstance(content, str) and not content.strip():
        return None
    ended = item.get("ended", True)
    if not isinstance(ended, bool):
        raise RowFault(f'field "{field}.ended" is {shown(str(ended))}, not true or false')
    return Message(role, _text(content, f"{field}.{content_key}"), ended)


def _messages(value: object, field: str) -> Messages:
    turns = [_message(item, f"{field}[{number}]") for number, item in enumerate(_list(value, field))]
    made = tuple(turn for turn in turns if turn is not None)
    if not made:
        raise RowFault(f'field "{field}" holds no message with text')
    return made


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _transcript(text: str, field: str, *, open_end: bool = False) -> Messages:
    """Anthropic's `\\n\\nHuman: ... \\n\\nAssistant: ...`; `open_end` drops a last bare `Assistant:`."""
    before, *parts = HH_TURN.split(text)
    if before.strip() or not parts:
        raise RowFault(f'field "{field}" is a dialogue that does not begin with "\\n\\nHuman:"')
    if open_end and parts[-2] == "Assistant" and not parts[-1].strip():
        parts = parts[:-2]
    made = []
    for number, (speaker, said) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        if not said.strip():
            raise RowFault(f'field "{field}": turn {number} of the dialogue ({speaker}) is empty')
        made.append(Message("user" if speaker == "Human" else "assistant", said.strip()))
    return tuple(made)


def _with_system(row: Row, turns: Messages) -> Messages:
    system = row.get("system")
    if system is None or system == "" or (turns and turns[0].role == "system"):
        return turns
    return (Message("system", _text(system, "system")), *turns)


def _history(row: Row) -> Messages:
    """LLaMA-Factory's `history`: earlier turns as [question, answer] lists."""
    made: list[Message] = []
    earlier = row.get("history")
    for number, item in enumerate(_list(earlier, "history") if earlier else ()):
        name = f"history[{number}]"
        turn = _list(item, name)
        if len(turn) != 2:
            raise RowFault(f'field "{name}" has {len(turn)} items, not a question and an answer')
        made += [Message("user", _text(turn[0], name)), Message("assistant", _text(turn[1], name))]
    return tuple(made)


def _instance(row: Row) -> Row:
    return _object(_list(row["instances"], "instances")[0], "instances[0]")


def _instruction(row: Row) -> Messages:
    asked = _text(row["instruction"], "instruction")
    name, extra = "input", row.get("input")
    if extra is None and "instances" in row:
        name, extra = "instances[0].input", _instance(row).get("input")
    if extra is not None and extra != "" and _text(extra, name):
        asked += "\n\n" + extra
    return (*_history(row), Message("user", asked))


def _opening(row: Row, field: str) -> Messages:
    """What comes before the answer, from whichever field and shape it has."""
    value = row[field]
    if field == "instruction":
        turns = _instruction(row)
    elif field == "turns":
        turns = (Message("user", _text(_list(value, field)[0], "turns[0]")),)
    elif isinstance(value, list) or field in ("messages", "conversations"):
        turns = _messages(value, field)
    elif _is_transcript(value):
        turns = _transcript(value, field, open_end=True)
    else:
        turns = (Message("user", _text(value, field)),)
    return _with_system(row, turns)


def _reply(value: object, field: str, *, trim: bool = False) -> Messages:
    if isinstance(value, dict):
        return _messages([value], field)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _messages(value, field)
    text = _text(value, field)
    return (Message("assistant", text.strip() if trim else text),)


# --- the formats ------------------------------------------------------------------------------------------


def _answered(opening: str, answer: str) -> Format[Messages]:
    def build(row: Row) -> Messages:
        return (*_opening(row, opening), *_reply(row[answer], answer, trim=_is_transcript(row[opening])))

    return Format((opening, answer), build)


def _seed_task(row: Row) -> Messages:
    answer = _text(_instance(row).get("output"), "instances[0].output")
    return (*_opening(row, "instruction"), Message("assistant", answer))


def _continued(row: Row, opening: str, answer: str) -> Messages:
    """The whole dialogue with this answer; an answer may be a dialogue that repeats the prompt."""
    value = row[answer]
    if not opening:
        if isinstance(value, str) and not HH_TURN.search(value):
            raise _missing(row, PAIRS[:2])
        return _with_system(row, _transcript(value, answer) if isinstance(value, str) else _reply(value, answer))
    lead = _opening(row, opening)
    if _is_transcript(value):
        reply = _transcript(value, answer)
    else:
        reply = _reply(value, answer, trim=_is_transcript(row[opening]))
    if reply[0].role == "assistant":
        return (*lead, *reply)
    if lead[-1] not in reply:
        raise RowFault(f'field "{answer}" is a dialogue that does not repeat the field "{opening}"')
    return _with_system(row, reply)


def _compared(opening: str, good: str, bad: str) -> Format[Compared]:
    def build(row: Row) -> Compared:
        chosen, rejected = _continued(row, opening, good), _continued(row, opening, bad)
        for name, whole in ((good, chosen), (bad, rejected)):
            if whole[-1].role != "assistant":
                raise RowFault(f'field "{name}" ends with the {whole[-1].role}, not with an answer')
        if chosen == rejected:
            raise RowFault(f'fields "{good}" and "{bad}" are the same')
        shared = _shared(chosen, rejected)
        if not shared:
            raise RowFault(f'fields "{good}" and "{bad}" have no prompt in common')
        return chosen[:shared], chosen[shared:], rejected[shared:]

    return Format((opening, good, bad) if opening else (good, bad), build)


def _shared(chosen: Messages, rejected: Messages) -> int:
    """How many messages both begin with, up to the last of the user's."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1].role != "user":
        shared -= 1
    return shared


def _prompt_of_pair(row: Row) -> Messages:
    chosen = _continued(row, "", "chosen")
    return chosen[: _shared(chosen, _continued(row, "", "rejected"))]


def _asked(field: str) -> Format[Messages]:
    def build(row: Row) -> Messages:
        turns = _opening(row, field)
        if field in ("messages", "conversations") and turns[-1].role == "assistant":
            turns = turns[:-1]
        return turns

    return Format((field,), build)


CHATS: tuple[Format[Messages], ...] = (
    Format(("messages",), lambda row: _opening(row, "messages")),
    Format(("conversations",), lambda row: _opening(row, "conversations")),
    _answered("instruction", "output"),
    Format(("instruction", "instances"), _seed_task),
    _answered("prompt", "response"),
    _answered("prompt", "completion"),
    _answered("prompt", "output"),
    _answered("question", "answer"),
    # A text with a role is one message torn out of a dialogue (OpenAssistant's export), not a document.
    Format(("text",), lambda row: (Message("text", _text(row["text"], "text")),), unless="role"),
)
PAIRS: tuple[Format[Compared], ...] = (
    _compared("prompt", "chosen", "rejected"),
    _compared("instruction", "chosen", "rejected"),
    _compared("conversations", "chosen", "rejected"),
    _compared("messages", "chosen", "rejected"),
    _compared("question", "chosen", "rejected"),
    _compared("question", "response_j", "response_k"),
    _compared("", "chosen", "rejected"),
)
PROMPTS: tuple[Format[Messages], ...] = (
    *(_asked(field) for field in ("messages", "conversations", "instruction", "prompt", "question", "turns")),
    Format(("chosen", "rejected"), _prompt_of_pair),
)
