"""Whether the server lives, whether it answers, what it does."""

from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from kinkajou.serve.backend import State
from kinkajou.serve.house import House
from kinkajou.serve.problems import PROBLEMS

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["ready", "starting", "broken", "closed", "draining"]
    models: dict[str, State]


def readiness(house: House) -> Readiness:
    states: dict[str, State] = {name: backend.state for name, backend in house.backends.items()}
    if house.scorer:
        states[house.scorer.name] = house.scorer.state
    if house.desk.draining:
        return Readiness(status="draining", models=states)
    worst: tuple[State, ...] = ("broken", "closed", "starting")
    return Readiness(status=next((state for state in worst if state in states.values()), "ready"), models=states)


def router(house: House) -> APIRouter:
    routes = APIRouter(tags=["status"])

    @routes.get("/health", summary="The process lives", responses={"default": PROBLEMS["default"]})
    async def health() -> Health:
        return Health()

    @routes.get(
        "/ready",
        summary="Every model has proven its first token",
        responses={503: {"model": Readiness, "description": "Not ready"}, "default": PROBLEMS["default"]},
    )
    async def ready() -> Readiness:
        found = readiness(house)
        return found if found.status == "ready" else JSONResponse(found.model_dump(), 503)  # type: ignore[return-value]

    @routes.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=PlainTextResponse,
        responses={"default": PROBLEMS["default"]},
    )
    async def metrics() -> Response:
        return Response(house.metrics.text(), media_type=METRICS_TYPE)

    return routes
