"""What was said: turns, and the files they are kept in, which are records for `kinkajou sft` too."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from kinkajou.data.formats import build_chat
from kinkajou.data.records import Message, RowFault
from kinkajou.data.sources import OR_SKIP, read_chats
from kinkajou.errors import UserError

SUFFIX = ".jsonl"
EMPTY = "empty answer{s}"
NUL = "turn{s} with a NUL character, which no record may hold"


@dataclass(frozen=True)
class Turn:
    """What was asked, usually one message of the user's, and the answer; `number` counts the questions."""

    number: int
    asked: tuple[Message, ...]
    answer: Message

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.asked, self.answer)


@dataclass
class Conversation:
    """The turns with one model."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, *asked: Message) -> list[Message]:
        """All of it from the system message on, then what is asked now."""
        opening = [Message("system", self.system)] if self.system else []
        return [*opening, *(message for turn in self.turns for message in turn.messages), *asked]

    def take_back(self, number: int) -> None:
        """Forgets the turn of that number, if it is the last one here."""
        if self.turns and self.turns[-1].number == number:
            self.turns.pop()


def save(path: Path, conversations: Sequence[tuple[str, Conversation]], *, replace: bool) -> str:
    """Writes a line for each (model, conversation) that has an answer; returns in words what it leaves out.

    `replace`: the file is this session's own.  UserError where there is nothing to write, or another's file.
    """
    if path.suffix != SUFFIX:
        raise UserError("a conversation is kept in a .jsonl file", evidence=str(path), fix=f"/save {path}{SUFFIX}")
    rows, left = [], Counter[str]()
    for model, conversation in conversations:
        faults = [unfit(turn) for turn in conversation.turns]
        left.update(fault for fault in faults if fault)
        said = [turn for turn, fault in zip(conversation.turns, faults, strict=True) if not fault]
        if said:
            rows.append(record(model, Conversation(conversation.system, said)))
    words = " and ".join(f"{count} {fault.format(s='s' * (count > 1))}" for fault, count in sorted(left.items()))
    if not rows and left[NUL]:
        raise UserError("nothing that a record may hold has been said, so there is nothing to save", evidence=words)
    if not rows:
        raise UserError("nothing has been answered yet, so there is nothing to save")
    if os.path.lexists(path) and not replace:
        raise UserError(f"{path} is there already", fix="give another name: no file is replaced")
    put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return words


def unfit(turn: Turn) -> str:
    """Why neither /load nor training would take it, as a count's noun; "" where they do."""
    if any("\0" in message.content for message in turn.messages):
        return NUL
    return "" if turn.answer.content.strip() else EMPTY


def record(model: str, conversation: Conversation) -> dict[str, Any]:
    """As training reads it; UserError where it could not."""
    row = {
        "messages": [as_row(message) for message in conversation.messages()],
        "model": model.encode(errors="backslashreplace").decode(),
    }
    try:
        build_chat(row, "")
    except RowFault as fault:
        raise UserError(f"no record can hold this conversation: {fault.problem}", evidence=fault.evidence) from None
    return row


def put(path: Path, text: str) -> None:
    """Whole or not at all, in a file that its owner alone may read: what people tell a model is theirs.

    The name that it has until then is nobody else's, so no link that lies there is followed.
    """
    try:
        file, part = tempfile.mkstemp(dir=path.parent, prefix=".kinkajou-", suffix=".part")
        try:
            with open(file, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as fault:
        raise UserError(f"{path} could not be written", evidence=str(fault), exit_code=4) from None


def as_row(message: Message) -> dict[str, str | bool]:
    row: dict[str, str | bool] = {"role": message.role, "content": message.content}
    return row if message.ended else {**row, "ended": False}


def load(path: str) -> list[Conversation]:
    """The conversations of a file that the reader of training data can read; UserError otherwise."""
    try:
        chats = read_chats(path).rows
    except UserError as fault:  # a conversation has no --bad-rows
        raise UserError(fault.problem, evidence=fault.evidence, fix=fault.fix.removesuffix(OR_SKIP)) from None
    found = []
    for chat in chats:
        messages = list(chat.messages)
        if messages[0].role == "text":
            raise UserError(f"{path} holds texts, not conversations", evidence=chat.place)
        system = messages.pop(0).content if messages[0].role == "system" else ""
        found.append(Conversation(system, list(turns_of(messages))))
    return found


def aligned(one: Conversation, other: Conversation) -> list[Conversation]:
    """The two with the same numbers where they were asked the same; what one alone was asked has its own number."""
    asked = [[turn.asked for turn in x.turns] for x in (one, other)]
    numbers: list[list[int]] = [[], []]
    last = 0
    for kind, *ends in SequenceMatcher(None, asked[0], asked[1], autojunk=False).get_opcodes():
        counts = ends[1] - ends[0], ends[3] - ends[2]
        for own, count in zip(numbers, counts, strict=True):
            own += range(last + 1, last + 1 + count)
            last += count if kind != "equal" else 0
        last += counts[0] if kind == "equal" else 0
    return [
        Conversation(x.system, [replace(turn, number=number) for turn, number in zip(x.turns, own, strict=True)])
        for x, own in zip((one, other), numbers, strict=True)
    ]


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Messages that end with an answer, cut behind each answer."""
    turns: list[Turn] = []
    asked: list[Message] = []
    for message in messages:
        if message.role == "assistant":
            turns.append(Turn(len(turns) + 1, tuple(asked), message))
            asked = []
        else:
            asked.append(message)
    return turns
