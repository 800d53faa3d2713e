"""OpenAI's endpoints."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from kinkajou.serve.backend import Backend, Event, Job, Refused
from kinkajou.serve.bodies import StrictRoute
from kinkajou.serve.house import House
from kinkajou.serve.openai_answers import Chunks, Head, clean, collected, whole_answer
from kinkajou.serve.openai_jobs import chat_job, completion_jobs
from kinkajou.serve.openai_several import Several
from kinkajou.serve.problems import PROBLEMS
from kinkajou.serve.schema import Asked, ChatRequest, CompletionRequest, kinds, takes
from kinkajou.serve.schema_answers import ChatCompletion, ModelCard, ModelList, TextCompletion, answers
from kinkajou.serve.stream import EventStream


def router(house: House) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["OpenAI"])
    _add_models(routes, house)
    _add_answers(routes, house)
    return routes


def _add_models(routes: APIRouter, house: House) -> None:
    shared: dict[int | str, dict[str, Any]] = {401: PROBLEMS[401], "default": PROBLEMS["default"]}

    @routes.get("/v1/models", summary="The models that are here", response_model=ModelList, responses=shared)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(found) for found in house.backends.values()]})

    @routes.get(
        "/v1/models/{model:path}",
        summary="One model",
        response_model=ModelCard,
        responses={**shared, 404: PROBLEMS[404]},
    )
    async def one_model(model: str) -> Response:
        return JSONResponse(card(house.backend(model)))


def card(backend: Backend) -> dict[str, object]:
    return {
        "id": backend.name,
        "object": "model",
        "created": backend.created,
        "owned_by": "kinkajou",
        "max_model_len": backend.context,
    }


def _add_answers(routes: APIRouter, house: House) -> None:
    taken = kinds(house.limits)

    @routes.post(
        "/v1/chat/completions",
        summary="Answers to a chat",
        response_model=ChatCompletion,
        responses=answers(stream=True),
    )
    @takes(taken.chat)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        job = chat_job(body, house.limits)
        return await answered(house, request, body, [job], chat=True)

    @routes.post(
        "/v1/completions",
        summary="Continuations of texts",
        response_model=TextCompletion,
        responses=answers(stream=True),
    )
    @takes(taken.completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        jobs = completion_jobs(body, house.limits)
        return await answered(house, request, body, jobs, chat=False)


async def answered(house: House, request: Request, body: Asked, jobs: Sequence[Job], *, chat: bool) -> Response:
    backend, job = house.backend(body.model), jobs[0]
    if len(jobs) > 1:
        several = Several(backend, jobs)
        backend, job = several, several.as_one()
    asked = job.logprobs is not None
    if asked and house.words:
        raise Refused("log-probabilities are not given by a server with a word filter", param="logprobs")
    head = Head(backend.name, chat, asked)
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = Chunks(head, job.n, usage=usage)

        def frames(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
            return chunks.frames(clean(events, job.n, house.words) if house.words else events)

        return EventStream(house.desk, backend, job, frames)
    async with house.desk.admitted(backend, job, client_of(request)) as events:
        found = await collected(clean(events, job.n, house.words), job.n)
    return Response(whole_answer(head, found), media_type="application/json")


def client_of(request: Request) -> str:
    return request.client.host if request.client else ""
