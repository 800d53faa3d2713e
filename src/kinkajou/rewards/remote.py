"""A reward service asked over HTTP.  The protocol is in docs/rewards.md."""

from collections.abc import Sequence

from kinkajou.rewards.answer import Answer


class Service:
    def __init__(self, url: str, *, timeout_s: float, retries: int) -> None:
        self.url, self.timeout_s, self.retries = url, timeout_s, retries

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        raise NotImplementedError
