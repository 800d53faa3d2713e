"""The two endpoints of 2023: /generate and /generate/stream, as their programs call them."""

import ipaddress
import json
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from kinkajou.serve.backend import Event, Piece
from kinkajou.serve.bodies import StrictRoute
from kinkajou.serve.house import House
from kinkajou.serve.openai import client_of
from kinkajou.serve.openai_answers import clean, collected
from kinkajou.serve.openai_jobs import generate_job
from kinkajou.serve.problems import Busy, Problem
from kinkajou.serve.schema import GenerateRequest, kinds, takes
from kinkajou.serve.schema_answers import answers, stream_answers
from kinkajou.serve.sse import event
from kinkajou.serve.stream import EventStream

MAX_CLIENTS = 10_000


class Pace:
    """At most `rate` requests a second from one client, in a table that does not grow; 0: any number."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.gap_s, self.clock = 1 / rate if rate else 0.0, clock
        self.last: OrderedDict[str, float] = OrderedDict()
        """When each client was last let in, the longest ago first."""

    def enter(self, client: str) -> None:
        """Busy for one that comes too soon."""
        if not self.gap_s:
            return
        name, now = neighbourhood(client), self.clock()
        wait_s = self.last.get(name, -math.inf) + self.gap_s - now
        if wait_s > 0:
            raise Busy(math.ceil(wait_s), f"one request every {self.gap_s:g} s for each client", "too_soon")
        self.last[name] = now
        self.last.move_to_end(name)
        while len(self.last) > MAX_CLIENTS:
            self.last.popitem(last=False)


def neighbourhood(client: str) -> str:
    """The address; of IPv6 the first half, since one client has all of the other."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address) and not address.ipv4_mapped:
        return str(ipaddress.IPv6Network((address.packed[:8] + bytes(8), 64)))
    return client


class Events(Response):
    """What the description of the API says of /generate/stream."""

    media_type = "text/event-stream"


def router(house: House) -> APIRouter:
    pace = Pace(house.rate)

    async def paced(request: Request) -> None:
        pace.enter(client_of(request))

    routes = APIRouter(route_class=StrictRoute, tags=["2023"], dependencies=[Depends(paced)])
    taken = kinds(house.limits)

    @routes.post(
        "/generate",
        summary="An answer, as a JSON string",
        response_model=str,
        responses=answers(),
    )
    @takes(taken.generate)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        job, words = generate_job(body, house.limits), house.words
        async with house.desk.admitted(house.backend(None), job, client_of(request)) as events:
            found = await collected(clean(events, 1, words), 1)
        return JSONResponse(found.choices[0].text)

    @routes.post(
        "/generate/stream",
        summary="An answer, as events `generate`, then `end`",
        response_class=Events,
        responses=stream_answers("generate", "end", "error"),
    )
    @takes(taken.generate)
    async def generate_stream(body: GenerateRequest) -> Response:
        job, words = generate_job(body, house.limits), house.words

        def frames(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
            return events_of_2023(clean(events, 1, words))

        return EventStream(house.desk, house.backend(None), job, frames, fault=fault_of_2023)

    return routes


async def events_of_2023(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    """Each piece of text as `generate`; how it ended as the data of `end`."""
    async for found in events:
        if isinstance(found, Piece):
            if found.text:
                yield event("generate", found.text)
            if found.finish:
                yield event("end", found.finish)
                return
    raise Problem(503, "the model stopped before its answer was finished", code="model_failed")


def fault_of_2023(problem: Problem, request_id: str) -> bytes:
    return event("error", json.dumps(problem.body(request_id), ensure_ascii=False))
