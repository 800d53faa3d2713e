"""A conversation that outgrows the context: which messages its prompt keeps."""

from collections.abc import Sequence

from kinkajou.data.chat import ChatFormat
from kinkajou.data.records import Message

RESERVE = 4
"""Old turns make room for the answer that is asked for, but for no more than this part of the context."""


def fitting(form: ChatFormat, messages: Sequence[Message], *, context: int, answer: int) -> tuple[list[int], int]:
    """The prompt, and how many of the oldest messages it lacks because they have no room; lengths in tokens.

    It begins with a user's message.  System messages and the last question stay, whatever comes of it.
    """
    prompt = form.prompt(messages)
    most = context - min(answer, max(1, context // RESERVE))
    starts = starts_of(messages)
    if len(prompt) <= most or not starts:
        return prompt, 0
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if len(form.prompt(since(messages, starts[middle]))) <= most:
            high = middle
        else:
            low = middle + 1
    kept = since(messages, starts[low])
    return form.prompt(kept), len(messages) - len(kept)


def starts_of(messages: Sequence[Message]) -> list[int]:
    """Where a conversation may begin."""
    return [i for i, message in enumerate(messages) if message.role == "user"]


def since(messages: Sequence[Message], start: int) -> list[Message]:
    """The messages from there on, and the system's before."""
    return [message for i, message in enumerate(messages) if i >= start or message.role == "system"]
