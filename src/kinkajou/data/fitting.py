"""A conversation that outgrows the context: which messages its prompt keeps."""

from collections.abc import Sequence

from kinkajou.data.chat import ChatFormat
from kinkajou.data.records import Message

RESERVE = 4
"""Old turns make room for the answer that is asked for, but for no more than this part of the context."""
QUICK = 1_000_000
"""Messages times characters below which a prompt is simply made: it takes some 10 ms (docs/log.md)."""


def fitting(form: ChatFormat, messages: Sequence[Message], *, context: int, answer: int) -> tuple[list[int], int]:
    """The prompt, and how many of the oldest messages it lacks because they have no room; lengths in tokens.

    It begins with a user's message.  System messages and the last question stay, whatever comes of it.
    """
    most = context - min(answer, max(1, context // RESERVE))
    starts = starts_of(messages)
    if not starts or fits(form, messages, most):
        return form.prompt(messages), 0
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(form, since(messages, starts[middle]), most):
            high = middle
        else:
            low = middle + 1
    kept = since(messages, starts[low])
    return form.prompt(kept), len(messages) - len(kept)


def fits(form: ChatFormat, messages: Sequence[Message], most: int) -> bool:
    return not surely_longer(form, messages, most) and len(form.prompt(messages)) <= most


def surely_longer(form: ChatFormat, messages: Sequence[Message], most: int) -> bool:
    """Whether the prompt has more tokens, where that is seen much sooner than by making it.

    A prompt is rendered anew for each answer in it, at the cost of the square of the turns; one rendering of the
    whole has hardly more tokens, never one more for each message.
    """
    work = len(messages) * sum(len(message.content) for message in messages)
    return work > QUICK and len(form.whole_prompt(messages)) > most + len(messages)


def starts_of(messages: Sequence[Message]) -> list[int]:
    """Where a conversation may begin."""
    return [i for i, message in enumerate(messages) if message.role == "user"]


def since(messages: Sequence[Message], start: int) -> list[Message]:
    """The messages from there on, and the system's before."""
    return [message for i, message in enumerate(messages) if i >= start or message.role == "system"]
