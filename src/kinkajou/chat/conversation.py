"""What was said: turns, and the files they are kept in, which are records for `kinkajou sft` too."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kinkajou.data.records import Message
from kinkajou.data.sources import read_chats
from kinkajou.errors import UserError

SUFFIX = ".jsonl"


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


def save(path: Path, conversations: Sequence[tuple[str, Conversation]], *, replace: bool) -> int:
    """Writes a line for each (model, conversation) that has an answer; returns how many empty answers it leaves out.

    `replace`: the file is this session's own.  UserError where there is nothing to write, or another's file.
    """
    if path.suffix != SUFFIX:
        raise UserError("a conversation is kept in a .jsonl file", evidence=str(path), fix=f"/save {path}{SUFFIX}")
    rows, empty = [], 0
    for model, conversation in conversations:
        said = [turn for turn in conversation.turns if turn.answer.content.strip()]
        empty += len(conversation.turns) - len(said)
        if said:
            kept = Conversation(conversation.system, said).messages()
            rows.append({"messages": [as_row(message) for message in kept], "model": model})
    if not rows:
        raise UserError("nothing has been answered yet, so there is nothing to save")
    if path.exists() and not replace:
        raise UserError(f"{path} is there already", fix="give another name: no file is replaced")
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8", opener=private) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(part, path)
    except OSError as fault:
        part.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written", evidence=str(fault), exit_code=4) from None
    return empty


def private(path: str, flags: int) -> int:
    """Opens a new file that its owner alone may read: what people tell a model is theirs."""
    return os.open(path, flags, 0o600)


def as_row(message: Message) -> dict[str, str | bool]:
    row: dict[str, str | bool] = {"role": message.role, "content": message.content}
    return row if message.ended else {**row, "ended": False}


def load(path: str) -> list[Conversation]:
    """The conversations of a file that the reader of training data can read; UserError otherwise."""
    found = []
    for chat in read_chats(path).rows:
        messages = list(chat.messages)
        if messages[0].role == "text":
            raise UserError(f"{path} holds texts, not conversations", evidence=chat.place)
        system = messages.pop(0).content if messages[0].role == "system" else ""
        found.append(Conversation(system, list(turns_of(messages))))
    return found


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
