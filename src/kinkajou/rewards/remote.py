"""A reward service asked over HTTP.  The protocol is in docs/rewards.md; the host is one that the user trusts."""

import email.utils
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from kinkajou.data import strict_json
from kinkajou.data.records import kind, shown
from kinkajou.errors import UserError
from kinkajou.exchange import FAULTS, Host, TooMuch, reason_of
from kinkajou.rewards import wire
from kinkajou.rewards.answer import Answer, sample_of

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
SPARE_BYTES, BYTES_PER_SAMPLE = 65_536, 1_024


class Service:
    """Asked for a batch at once; tried again with growing pauses while it is down or busy."""

    def __init__(
        self, url: str, *, timeout_s: float, retries: int, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.url, self.timeout_s, self.retries, self.sleep = url, timeout_s, retries, sleep
        self.host = Host(url)
        self.dice = random.Random()  # its own: the run's random numbers do not depend on a service's faults

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        body = wire.encode({"samples": wire.samples(answers)})
        text = self.ask(body, SPARE_BYTES + BYTES_PER_SAMPLE * len(answers))
        return read_scores(text, answers, self.url)

    def ask(self, body: bytes, limit: int) -> bytes:
        """The body of a good reply; UserError (exit code 5) when none comes."""
        last, named = "", ""
        for tried in range(self.retries + 1):
            if tried:
                self.sleep(self.pause(tried, named))
            try:
                reply = self.host.ask("", body, limit=limit, timeout_s=self.timeout_s)
            except FAULTS as fault:
                last, named = reason_of(fault), ""
                continue
            except TooMuch as fault:
                fix = "is this a reward service? docs/rewards.md has the protocol"
                raise self.fault("sends too much", str(fault), fix) from None
            if reply.good:
                return reply.body
            if not reply.passing:
                raise self.fault("refuses the request", f"{reply}", "look at the service's log; is the path right?")
            last, named = f"{reply}", reply.retry_after
        tries = f"{self.retries + 1} {'try' if self.retries == 0 else 'tries'}, the last: {last}"
        raise self.fault("gives no answer", tries, "start it again, or see --reward_timeout_s and --reward_retries")

    def fault(self, problem: str, evidence: str, fix: str) -> UserError:
        return UserError(f"the reward service {self.url} {problem}", evidence=evidence, fix=fix, exit_code=5)

    def pause(self, tried: int, retry_after: str) -> float:
        """Doubles from try to try, shortened by chance so that many ranks do not come back at once."""
        doubled = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(tried - 1, 10))
        return max(doubled * self.dice.uniform(0.5, 1), min(seconds_named(retry_after), self.timeout_s))


def seconds_named(retry_after: str) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or a date; 0 for anything else."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def read_scores(text: bytes, answers: Sequence[Answer], url: str) -> list[float]:
    """Scores in the order of the answers: objects are matched by id, bare numbers are taken as they come."""
    fix = 'it must reply {"scores": [{"id": 0, "score": 1.5}, ...]}, one for each sample (docs/rewards.md)'

    def fault(problem: str, evidence: str = "") -> UserError:
        return UserError(f"the reward service {url} {problem}", evidence=evidence, fix=fix)

    try:
        found = strict_json.parse(text.decode())
    except (UnicodeDecodeError, strict_json.JSONFault) as broken:
        beginning = shown(text[:200].decode(errors="replace"), 200)
        raise fault(f"sends no sound JSON: {broken}", beginning) from None
    scores = found.get("scores") if isinstance(found, dict) else found
    if not isinstance(scores, list):
        raise fault(f"sends no list of scores but {kind(scores)}", shown(text[:200].decode(), 200))
    if len(scores) != len(answers):
        raise fault("sends the wrong number of scores", f"{len(scores)} for {len(answers)} samples")
    if any(isinstance(item, dict) for item in scores):
        scores = by_id(scores, answers, fault)
    numbers = [as_number(score) for score in scores]
    for score, number, answer in zip(scores, numbers, answers, strict=True):
        if number is None:
            raise fault(f"gives {shown(repr(score))[1:-1]} instead of a number", sample_of(answer))
    return [number for number in numbers if number is not None]


def by_id(items: Sequence[Any], answers: Sequence[Answer], fault: Callable[[str, str], UserError]) -> list[Any]:
    """The scores sorted by sample; each must come once."""
    found: dict[int, Any] = {}
    for item in items:
        i = item.get("id") if isinstance(item, dict) else None
        if type(i) is not int or not 0 <= i < len(answers):
            raise fault("names a sample that was not asked about", shown(repr(item)))
        if i in found:
            raise fault(f"scores sample {i} twice", sample_of(answers[i]))
        if "score" not in item:
            raise fault(f"gives no score for sample {i}", sample_of(answers[i]))
        found[i] = item["score"]
    return [found[i] for i in range(len(answers))]  # as many as asked, and none twice: none is missing


def as_number(value: object) -> float | None:
    """None for what is no number, or none that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        return float(value)
    return None
