"""The application: all routes of the house behind one guard."""

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from kinkajou import __version__
from kinkajou.serve import coati, openai, pages, rewards, status
from kinkajou.serve.backend import Broken, Refused
from kinkajou.serve.bodies import invalid
from kinkajou.serve.guard import Guard
from kinkajou.serve.house import House, request_id
from kinkajou.serve.problems import Problem, Unexpected, problem_of

PLAIN = {404: "there is nothing at this path", 405: "this path does not take that method"}


class App(FastAPI):
    """FastAPI with the guard around everything, its own handling of errors included."""

    def __init__(self, house: House) -> None:
        self.house = house
        # The pages that FastAPI makes of the schema load scripts from elsewhere.
        super().__init__(
            title="Kinkajou",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            openapi_url="/openapi.json",
        )

    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), self.house)


def routers(house: House) -> list[APIRouter]:
    """Those that are asked most stand first: a path is looked for in this order."""
    return [openai.router(house), coati.router(house), rewards.router(house), status.router(house), pages.router()]


def make_app(house: House) -> FastAPI:
    app = App(house)
    for router in routers(house):
        app.include_router(router)

    async def told(request: Request, fault: Exception) -> JSONResponse:
        if isinstance(fault, RequestValidationError):
            problem = invalid(fault)
        elif isinstance(fault, Problem | Refused | Broken):
            problem = problem_of(fault)
        elif isinstance(fault, HTTPException):
            problem = Problem(fault.status_code, PLAIN.get(fault.status_code, "refused"), headers=fault.headers)
        else:
            problem = Unexpected()
        return problem.response(request_id(request))

    for kind in (RequestValidationError, HTTPException, Refused, Broken, Exception):
        app.add_exception_handler(kind, told)
    return app
