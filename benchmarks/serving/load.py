"""64 clients, 10,000 requests: every answer beside the same request alone on the same server.

Requests differ in a name of their own (a canary), in route, in `n`, `stop`, `logprobs`, length and sampling.  Each is
first asked alone, one after the other, without streaming; then all of them, many times, by all clients at once, half of
them streamed, in random order, while other clients come and are cut off.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving import servers
from benchmarks.serving.client import DONE, Answer, Caller, Cut, Mangled, request
from benchmarks.serving.figures import Row, spread, table

CLIENTS, REQUESTS, DISTINCT, DISTURBERS = 64, 10_000, 500, 4
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vu", "we", "za")
KINDS = ("plain", "plain", "chat", "n", "stop", "logprobs", "seeded", "short")
"""Shares of the requests; `seeded` samples, the others are greedy."""


@dataclass(frozen=True)
class Wanted:
    """A request, and what it is about."""

    kind: str
    canary: str
    path: str
    body: dict[str, Any]

    def bytes(self, *, stream: bool) -> bytes:
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return request("POST", self.path, self.body | more)


def material(number: int, seed: int) -> list[Wanted]:
    """So many different requests."""
    dice = random.Random(seed)
    names: set[str] = set()
    while len(names) < number:
        names.add("".join(dice.choices(SYLLABLES, k=3)).capitalize())
    found = []
    for i, name in enumerate(sorted(names)):
        kind = KINDS[i % len(KINDS)]
        body: dict[str, Any] = {"max_tokens": dice.choice((16, 24, 32)), "temperature": 0.0}
        body |= {
            "n": {"n": 3},
            "stop": {"stop": [".", " was"]},
            "logprobs": {"logprobs": 2},
            "seeded": {"temperature": 0.9, "seed": dice.randrange(1 << 31)},
            "short": {"max_tokens": dice.choice((1, 2, 3))},
        }.get(kind, {})
        thing = dice.choice(("bird", "dog", "boat", "tree", "ball", "cake"))
        told = f"Once upon a time, there was a little {thing} named {name}. {name} liked to"
        if kind in ("chat", "n"):
            found.append(
                Wanted(kind, name, "/v1/chat/completions", body | {"messages": [{"role": "user", "content": told}]})
            )
        else:
            found.append(Wanted(kind, name, "/v1/completions", body | {"prompt": told}))
    return found


Choices = list[dict[str, Any]]


def of_plain(answer: Answer) -> tuple[str, Choices, Any]:
    """Id, choices (text, finish, log-probabilities) in order, usage."""
    told = answer.json
    choices = []
    for choice in sorted(told["choices"], key=lambda c: c["index"]):
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        choices.append({"text": text, "finish": choice["finish_reason"], "logprobs": choice.get("logprobs")})
    return told["id"], choices, told["usage"]


def of_stream(answer: Answer) -> tuple[str, Choices, Any]:
    """The same of a stream, put together; ValueError where it is not as streams are."""
    events = answer.events
    if not events or events[-1] != DONE or events.count(DONE) != 1:
        raise ValueError(f"ends with {events[-1:]!r}")
    found: dict[int, dict[str, Any]] = {}
    ids, usage = set(), None
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            raise ValueError(f"error event {event}")
        ids.add(event["id"])
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            so_far = found.setdefault(choice["index"], {"text": "", "finish": None, "logprobs": None})
            if so_far["finish"]:
                raise ValueError("a piece after the last")
            so_far["text"] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            so_far["finish"] = choice.get("finish_reason")
            if more := choice.get("logprobs"):
                so_far["logprobs"] = joined(so_far["logprobs"], more)
    if len(ids) != 1:
        raise ValueError(f"{len(ids)} ids in one stream")
    return ids.pop(), [found[index] for index in sorted(found)], usage


def joined(before: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """Lists one after the other."""
    if before is None:
        return dict(more)
    return {key: value + more[key] if isinstance(value, list) else value for key, value in before.items()}


def equal(one: Choices, other: Choices) -> str:
    """Empty where both are the same, else what differs first."""
    if len(one) != len(other):
        return "number of choices"
    for a, b in zip(one, other, strict=True):
        for key in ("text", "finish"):
            if a[key] != b[key]:
                return key
    return ""


def gap(one: Any, other: Any) -> float:
    """Largest difference of numbers at the same place of two answers; infinite if their form differs."""
    if isinstance(one, bool) or one is None or isinstance(one, str):
        return 0.0 if one == other else float("inf")
    if isinstance(one, int | float):
        return abs(one - other) if isinstance(other, int | float) else float("inf")
    if isinstance(one, list):
        if not isinstance(other, list) or len(one) != len(other):
            return float("inf")
        return max((gap(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if not isinstance(other, dict) or one.keys() != other.keys():
        return float("inf")
    return max((gap(one[key], other[key]) for key in one), default=0.0)


@dataclass
class Counts:
    answered: int = 0
    refused: int = 0
    lost: int = 0
    strange: int = 0
    different: int = 0
    foreign: int = 0
    seeded_different: int = 0
    largest_gap: float = 0.0


class Campaign:
    """All requests by all clients; `faults` keeps the first few in words."""

    def __init__(self, port: int, wanted: Sequence[Wanted], seed: int) -> None:
        self.port, self.wanted, self.dice = port, wanted, random.Random(seed)
        self.alone: list[tuple[Choices, Any]] = []
        self.where: dict[str, int] = {}
        self.ids: list[str] = []
        self.counts, self.faults = Counts(), list[str]()
        self.seconds: dict[str, list[float]] = {"plain": [], "stream": []}
        self.tokens = 0
        self.disturbed, self.going = 0, True

    async def solo(self) -> float:
        """Takes every answer alone; seconds."""
        caller, began = Caller(self.port), time.perf_counter()
        for number, item in enumerate(self.wanted):
            answer = await caller.ask(item.bytes(stream=False))
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} for {item}: {answer.body[:500]!r}")
            _, choices, usage = of_plain(answer)
            self.alone.append((choices, usage))
            self.where[json.dumps([choice["text"] for choice in choices])] = number
        caller.close()
        return time.perf_counter() - began

    async def client(self, jobs: "asyncio.Queue[tuple[int, bool]]") -> None:
        caller = Caller(self.port)
        while not jobs.empty():
            number, stream = jobs.get_nowait()
            await self.one(caller, number, stream)
        caller.close()

    async def one(self, caller: Caller, number: int, stream: bool) -> None:
        item, counts = self.wanted[number], self.counts
        try:
            answer = await caller.ask(item.bytes(stream=stream))
        except (Cut, Mangled, OSError) as fault:
            counts.lost += 1
            self.note(f"lost: {fault}")
            return
        if answer.status != 200:
            counts.refused += 1
            self.note(f"{answer.status}: {answer.body[:200]!r}")
            return
        self.seconds["stream" if stream else "plain"].append(answer.seconds)
        try:
            name, choices, usage = (of_stream if stream else of_plain)(answer)
        except (ValueError, KeyError) as fault:
            counts.strange += 1
            self.note(f"strange: {fault!r}")
            return
        counts.answered += 1
        self.ids.append(name)
        self.tokens += usage["completion_tokens"]
        self.compare(number, choices, usage)

    def compare(self, number: int, choices: Choices, usage: Any) -> None:
        counts, (alone, used) = self.counts, self.alone[number]
        what = equal(alone, choices) or ("" if used == usage else "usage")
        if what and self.wanted[number].kind == "seeded":
            counts.seeded_different += 1
        elif what:
            counts.different += 1
            other = self.where.get(json.dumps([choice["text"] for choice in choices]), number)
            counts.foreign += other != number
        if what:
            self.note(f"{self.wanted[number].kind}, {what}: {choices} for {alone}, {usage} for {used}")
            return
        for a, b in zip(alone, choices, strict=True):
            counts.largest_gap = max(counts.largest_gap, gap(a["logprobs"], b["logprobs"]))

    def note(self, text: str) -> None:
        if len(self.faults) < 20:
            self.faults.append(text[:600])

    async def disturb(self) -> None:
        """Asks and is cut off after a few bytes, again and again."""
        while self.going:
            item = self.dice.choice(self.wanted)
            caller = Caller(self.port)
            try:
                await caller.ask(item.bytes(stream=True), stop_after=self.dice.randrange(1, 1500))
            except (Cut, OSError):
                self.disturbed += 1
            caller.close()
            await asyncio.sleep(0.05)

    async def crowd(self, requests: int, clients: int, disturbers: int) -> float:
        order = [(i % len(self.wanted), i // len(self.wanted) % 2 == 0) for i in range(requests)]
        self.dice.shuffle(order)
        jobs: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()
        for job in order:
            jobs.put_nowait(job)
        beside = [asyncio.create_task(self.disturb()) for _ in range(disturbers)]
        began = time.perf_counter()
        await asyncio.gather(*(self.client(jobs) for _ in range(clients)))
        spent = time.perf_counter() - began
        self.going = False
        await asyncio.gather(*beside)
        return spent


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    requests = max(100, round(REQUESTS * given.scale))
    wanted = material(max(20, min(DISTINCT, requests // 20)), seed=given.seed)
    with servers.kinkajou(given.model, "--queue", "512") as server:
        campaign = Campaign(server.port, wanted, given.seed)

        async def both() -> tuple[float, float]:
            return await campaign.solo(), await campaign.crowd(requests, CLIENTS, DISTURBERS)

        alone_s, crowd_s = asyncio.run(both())
    counts = campaign.counts
    found = {
        "requests": requests,
        "clients": CLIENTS,
        "distinct_requests": len(wanted),
        "distinct_answers": len(campaign.where),
        "streamed": len(campaign.seconds["stream"]),
        **vars(counts),
        "doubled": len(campaign.ids) - len(set(campaign.ids)),
        "disconnects_beside": campaign.disturbed,
        "alone_s": round(alone_s, 1),
        "crowd_s": round(crowd_s, 1),
        "requests_per_s": round(counts.answered / crowd_s, 1),
        "tokens_per_s": round(campaign.tokens / crowd_s, 1),
        "latency": {name: spread(times) for name, times in campaign.seconds.items()},
    }
    wrong = ("refused", "lost", "strange", "different", "foreign", "seeded_different", "doubled")
    for fault in campaign.faults:
        print(fault)
    fine = counts.answered == requests and not any(found[name] for name in wrong)
    return {"summary": found, "faults": campaign.faults}, fine


def page(figures: Row) -> str:
    found = figures["summary"]
    whole = (
        f"{found['requests']:,} ({found['distinct_requests']} different, {found['distinct_answers']} different answers)"
    )
    rows = [
        ["requests", whole],
        [
            "clients at once; others that are cut off beside them",
            f"{found['clients']}; {found['disconnects_beside']:,} cuts",
        ],
        ["streamed", f"{found['streamed']:,}"],
        ["lost, refused, not as answers are", f"{found['lost']}, {found['refused']}, {found['strange']}"],
        ["ids that came twice", found["doubled"]],
        ["greedy answers that differ from the same request alone", found["different"]],
        ["of those, another request's answer", found["foreign"]],
        ["seeded answers that differ from the same request alone", found["seeded_different"]],
        ["largest difference of a log-probability", f"{found['largest_gap']:.1e}"],
        ["requests a second; tokens", f"{found['requests_per_s']}; {found['tokens_per_s']:,}"],
    ]
    return table(["load", ""], rows)
