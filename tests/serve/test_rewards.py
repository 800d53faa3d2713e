"""/v1/rewards: chats in, scores out; and what `--reward http://.../v1/rewards` gets of it."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
from answers import answer, rollout_of
from place import make_house, served, until

from kinkajou.data.chat import ChatFormat
from kinkajou.data.records import Message
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.rewards.judges import ModelJudge
from kinkajou.rewards.load import load_reward_model
from kinkajou.rewards.remote import Service
from kinkajou.serve.backend import Broken, Refused, State, Turn
from kinkajou.serve.house import House
from kinkajou.serve.local import Hosting
from kinkajou.serve.reward_local import LocalScorer
from small import Small


class Lengths:
    """A score is the number of letters of a chat, half a point less if it was cut off."""

    name = "judge"
    state: State = "ready"

    def __init__(self, fault: Exception | None = None, scores: list[float] | None = None, pause_s: float = 0.0) -> None:
        self.fault, self.scores, self.pause_s = fault, scores, pause_s
        self.asked = list[tuple[Turn, ...]]()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def score(self, chats: Sequence[tuple[Turn, ...]]) -> list[float]:
        self.asked += chats
        await asyncio.sleep(self.pause_s)
        if self.fault:
            raise self.fault
        own = [sum(len(turn.content) - 0.5 * (not turn.ended) for turn in chat) for chat in chats]
        return own if self.scores is None else self.scores


def chat(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(said)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}


def ask(house: House, body: object) -> tuple[int, Any]:
    async def once() -> tuple[int, Any]:
        async with served(house) as place:
            reply = await place.client.post("/v1/rewards", json=body)
            return reply.status_code, reply.json()

    return asyncio.run(once())


def beside(house: House, work: Callable[[str], Any]) -> Any:
    """What a thread does with the address while the server runs."""

    async def once() -> Any:
        async with served(house) as place:
            return await asyncio.to_thread(work, f"http://127.0.0.1:{place.port}/v1/rewards")

    return asyncio.run(once())


def test_chats_are_scored_in_their_order() -> None:
    scorer = Lengths()
    status, found = ask(
        make_house(scorer=scorer), {"input": [chat("ab", "cde"), chat("", "f"), chat("a", "b", "c", "")]}
    )
    assert status == 200
    assert (found["object"], found["model"]) == ("list", "judge")
    assert [(row["index"], row["score"]) for row in found["data"]] == [(0, 5.0), (1, 1.0), (2, 3.0)]
    assert scorer.asked[0] == (Turn("user", "ab"), Turn("assistant", "cde"))


def test_what_a_run_sends_is_scored_by_id() -> None:
    answers = [answer("abc", "why?", label="x", weight=1.5), answer("ab", "so?", ended=False)]
    house = make_house(scorer=Lengths())
    assert beside(house, lambda url: Service(url, timeout_s=10, retries=0)(answers)) == [7.0, 4.5]


def test_the_name_of_the_model() -> None:
    assert ask(make_house(scorer=Lengths()), {"model": "judge", "input": [chat("a", "b")]})[0] == 200
    status, found = ask(make_house(scorer=Lengths()), {"model": "other", "input": [chat("a", "b")]})
    assert (status, found["error"]["code"]) == (404, "model_not_found")
    status, found = ask(make_house(), {"input": [chat("a", "b")]})
    assert (status, found["error"]["code"]) == (404, "no_reward")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": []}, "input"),
        ({"input": [{"messages": []}]}, "input.0.messages"),
        ({"input": [chat("a")]}, "input.0.messages"),
        ({"input": [chat("a", "b")] * 257}, "input"),
        ({"input": [chat("a", "b")], "unheard": 1}, "unheard"),
        ({"samples": [{"id": 0, "messages": chat("a")["messages"], "response": 3}]}, "samples.0.response"),
        ({"samples": [{"id": "0", "messages": chat("a")["messages"], "response": ""}]}, "samples.0.id"),
        ({"samples": [{"id": 1, "messages": chat("a")["messages"], "response": ""}] * 2}, "samples"),
        ({}, "input"),
    ],
)
def test_a_body_that_is_refused(body: object, field: str) -> None:
    scorer = Lengths()
    status, found = ask(make_house(scorer=scorer), body)
    assert (status, found["error"]["param"]) == (400, field)
    assert not scorer.asked


@pytest.mark.parametrize(
    ("scorer", "status"),
    [
        (Lengths(Refused("too long", param="input")), 400),
        (Lengths(Broken("gone")), 503),
        (Lengths(scores=[float("nan")]), 503),
        (Lengths(scores=[]), 503),
    ],
)
def test_faults(scorer: Lengths, status: int) -> None:
    house = make_house(scorer=scorer)
    assert ask(house, {"input": [chat("a", "b")]})[0] == status
    if status == 400:
        samples = [{"id": 1, "messages": [{"role": "user", "content": "a"}], "response": "b"}]
        assert ask(make_house(scorer=scorer), {"samples": samples})[1]["error"]["param"] == "samples"
    assert not house.desk.tickets


def test_scoring_is_bounded_as_answers_are() -> None:
    house = make_house(scorer=Lengths(pause_s=0.5), queue=1)

    async def once() -> list[int]:
        async with served(house) as place:
            sent = [place.client.post("/v1/rewards", json={"input": [chat("a", "b")]}) for _ in range(4)]
            replies = await asyncio.gather(*sent)
            await until(lambda: not house.desk.tickets)
            return sorted(reply.status_code for reply in replies)

    assert asyncio.run(once()) == [200, 200, 429, 429]


def test_a_model_behind_http_is_the_model_of_the_run(small: Small) -> None:
    """Scores of the service are those that a run gets of the same folder, cut answers included."""
    answers = [
        answer("w5 w6 w7", "w3 w4"),
        answer("w5", "w8 w9 w10"),
        answer("w5 w6", "w3", ended=False),
        answer("w5 w6", "w3"),
    ]
    tokenizer, _ = load_tokenizer(small.judge, template="plain")
    form = ChatFormat(tokenizer)
    rows = [
        form.conversation([*found.prompt.messages, Message("assistant", found.text, found.ended)]).tokens
        for found in answers
    ]
    judge = ModelJudge(load_reward_model(small.judge, tokenizer, "fp32", torch.nn.Module.cpu), tokens_per_microbatch=64)
    wanted = judge(answers, rollout_of(rows)).scores.tolist()
    assert len({round(score, 6) for score in wanted}) == 4

    async def once() -> list[float]:
        scorer = LocalScorer("judge", small.judge, Hosting(template="plain", threads=1))
        await scorer.start()
        try:
            async with served(make_house(scorer=scorer)) as place:
                service = Service(f"http://127.0.0.1:{place.port}/v1/rewards", timeout_s=60, retries=0)
                return await asyncio.to_thread(service, answers)
        finally:
            await scorer.close()

    assert asyncio.run(once()) == pytest.approx(wanted, abs=1e-5)
