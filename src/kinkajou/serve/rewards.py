"""/v1/rewards: a reward model's scores of chats, for programs and for `--reward http://.../v1/rewards`."""

import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, Request, Response

from kinkajou.serve.backend import Backend, Began, Broken, Event, Job, Load, Piece, Refused, Scorer, State, Turn
from kinkajou.serve.bodies import StrictRoute
from kinkajou.serve.house import House
from kinkajou.serve.openai import client_of
from kinkajou.serve.openai_jobs import turns_of
from kinkajou.serve.problems import Problem
from kinkajou.serve.schema_answers import SampleScores, ScoreList, answers
from kinkajou.serve.schema_rewards import RewardRequest, SamplesRequest, Scored


class Scoring:
    """A scorer's work as a backend's, so that the desk bounds it as it bounds answers; the scores are left behind."""

    created = 0
    context: int | None = None

    def __init__(self, scorer: Scorer, chats: Sequence[tuple[Turn, ...]]) -> None:
        self.scorer, self.chats, self.name = scorer, chats, scorer.name
        self.load = Load(slots=1)
        self.scores: list[float] = []

    @property
    def state(self) -> State:
        return self.scorer.state

    async def start(self) -> None:
        """Begun already."""

    async def close(self) -> None:
        """Not ours to end."""

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
        yield self._events()

    async def _events(self) -> AsyncIterator[Event]:
        self.scores = await self.scorer.score(self.chats)
        if len(self.scores) != len(self.chats) or not all(map(math.isfinite, self.scores)):
            raise Broken("the reward model gave no number")
        yield Began(0)
        yield Piece(0, "", 0, "stop")


def router(house: House) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["rewards"])

    @routes.post(
        "/v1/rewards",
        summary="Scores of chats by a reward model",
        response_model=ScoreList | SampleScores,
        responses=answers(),
    )
    async def score(body: Scored, request: Request) -> Response:
        scorer = house.scorer
        if scorer is None:
            raise Problem(404, "this server has no reward model: it was started without --reward", code="no_reward")
        if body.model not in (None, scorer.name):
            known = f"the reward model here is {scorer.name}"
            raise Problem(404, f"there is no such reward model; {known}", param="model", code="model_not_found")
        if isinstance(body, SamplesRequest):
            scores = await scored(house, scorer, sample_chats(body, house), request, field="samples")
            rows = [{"id": sample.id, "score": x} for sample, x in zip(body.samples, scores, strict=True)]
            return reply({"scores": rows})
        scores = await scored(house, scorer, chats_of(body, house), request)
        data = [{"object": "score", "index": i, "score": x} for i, x in enumerate(scores)]
        return reply({"object": "list", "model": scorer.name, "data": data})

    return routes


async def scored(
    house: House, scorer: Scorer, chats: Sequence[tuple[Turn, ...]], request: Request, *, field: str = "input"
) -> list[float]:
    """`field`: of the request, that holds the chats."""
    if not chats:
        return []
    work: Scoring = Scoring(scorer, chats)
    backend: Backend = work
    try:
        async with house.desk.admitted(backend, Job(), client_of(request)) as events:
            async for _ in events:
                continue
    except Refused as fault:
        fault.param = fault.param and field
        raise
    return work.scores


def chats_of(body: RewardRequest, house: House) -> list[tuple[Turn, ...]]:
    found = []
    for i, item in enumerate(body.input):
        turns = turns_of(item.messages, house.limits)
        if turns[-1].role != "assistant":
            raise Refused(f"input.{i}.messages must end with the assistant", param=f"input.{i}.messages")
        found.append(turns)
    return found


def sample_chats(body: SamplesRequest, house: House) -> list[tuple[Turn, ...]]:
    ids = [sample.id for sample in body.samples]
    if len(set(ids)) < len(ids):
        raise Refused("two samples have the same id", param="samples")
    return [
        (*turns_of(sample.messages, house.limits), Turn("assistant", sample.response, sample.ended))
        for sample in body.samples
    ]


def reply(value: object) -> Response:
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")
