"""A reward that is a Python function of the user, in a process of its own so that a hang can be ended."""

from collections.abc import Sequence

from kinkajou.rewards.answer import Answer


class Function:
    def __init__(self, name: str, *, timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        raise NotImplementedError
