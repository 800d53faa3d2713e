"""An answer as server-sent events: its status is known before its first byte, and it never just breaks off."""

import sys
from collections.abc import AsyncIterator, Callable

from fastapi import Response
from starlette.types import Receive, Scope, Send

from kinkajou.serve.backend import Backend, Broken, Event, Job, Refused
from kinkajou.serve.desk import Desk
from kinkajou.serve.problems import Problem, Unexpected, problem_of

Frames = Callable[[AsyncIterator[Event]], AsyncIterator[bytes]]


def openai_fault(problem: Problem, request_id: str) -> bytes:
    return problem.event(request_id)


class EventStream(Response):
    """Lets the job in, then sends the frames that `frames` makes of its events.

    What goes wrong before the first frame is an HTTP status; afterwards it is a last event, made by `fault`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        desk: Desk,
        backend: Backend,
        job: Job,
        frames: Frames,
        *,
        fault: Callable[[Problem, str], bytes] = openai_fault,
    ) -> None:
        self.desk, self.backend, self.job, self.frames, self.fault = desk, backend, job, frames, fault
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = str((scope.get("client") or ("", 0))[0])
        request_id = str(scope.get("kinkajou.request_id", ""))
        begun = False

        async def put(frame: bytes, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                begun = True
            await send({"type": "http.response.body", "body": frame, "more_body": more})

        try:
            async with self.desk.admitted(self.backend, self.job, client) as events:
                async for frame in self.frames(events):
                    await put(frame)
            await put(b"", False)
        except (Problem, Refused, Broken) as fault:
            if not begun:
                raise
            await put(self.fault(problem_of(fault), request_id), False)
        finally:
            # What nobody has foreseen goes on to the log, but the client is told first.
            if begun and isinstance(sys.exception(), Exception):
                await put(self.fault(Unexpected(), request_id), False)
