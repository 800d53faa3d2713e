"""A worker process as this one sees it: started, spoken to in lines of JSON, started again when it dies, ended.

No request waits in here: what a line tells is handed on at once.
"""

import asyncio
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

from kinkajou.errors import UserError
from kinkajou.serve.backend import Broken, State

log = logging.getLogger("kinkajou.serve")
LINE = 1 << 26
"""Bytes of the longest line: one step's pieces of all slots."""
TRIES, WITHIN_S, PAUSE_S = 3, 300.0, 0.5
"""A worker that dies is started again that often in that many seconds, after a pause that doubles."""
END_S = 5.0
UNREAD = 1 << 26
"""Bytes of asks that may lie here because the worker has not read them."""
GONE = "the model's process ended; it is being started again"
Line = dict[str, Any]


class Child:
    """`arguments` go to `kinkajou.serve.worker`; `take` gets each line, `die` hears that open asks are lost."""

    def __init__(self, arguments: Line, *, take: Callable[[Line], None], die: Callable[[], None]) -> None:
        self.arguments, self.take, self.die = arguments, take, die
        self.state: State = "starting"
        self.facts: Line = {}
        self.lost = asyncio.Event()
        """Set when it will not be started again."""
        self.process: asyncio.subprocess.Process | None = None
        self.watch: asyncio.Task[None] | None = None
        self.deaths: deque[float] = deque(maxlen=TRIES + 1)

    async def start(self) -> None:
        """Returns once the worker is ready; UserError for what it says of its load."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.close)
            await self._spawn()
            stack.pop_all()
        self.watch = asyncio.create_task(self._watch())
        self.watch.add_done_callback(self._given_up)

    async def _spawn(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kinkajou.serve.worker", json.dumps(self.arguments)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE,
            start_new_session=True,  # ctrl-C is for this process, which drains before it ends the worker
        )
        first = await self._line()
        if first is None:
            raise UserError(
                "the model's process ended while it was loading",
                evidence=f"exit code {await self.process.wait()}; its own words stand above",
                fix="is there enough memory? try --bits 8, fewer --slots or a shorter --context",
                exit_code=5,
            )
        if fault := first.get("fault"):
            problem, evidence, fix, code = fault
            raise UserError(problem, evidence=evidence, fix=fix, exit_code=code)
        self.facts, self.state = first["ready"], "ready"

    async def _line(self) -> Line | None:
        assert self.process
        assert self.process.stdout
        try:
            line = await self.process.stdout.readline()
            found: Line | None = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # longer than LINE, or no JSON: not what our worker writes
            return None
        return found

    async def _watch(self) -> None:
        """Hands lines on until the worker has gone for good."""
        while True:
            while (line := await self._line()) is not None:
                self.take(line)
            await self._ended()
            if not await self._again():
                return

    def _given_up(self, watch: asyncio.Task[None]) -> None:
        """Nothing is heard any more: nobody may wait for what will not come."""
        if watch.cancelled():
            return
        if fault := watch.exception():  # at a line that is not what our worker writes
            log.error("a model's process was not understood", exc_info=fault)
        self.state = "broken"
        self.die()
        self.lost.set()

    async def _ended(self) -> None:
        assert self.process
        self.state = "broken"
        self.die()
        code = await ended(self.process)
        self.deaths.append(time.monotonic())
        print(f"a model's process ended with code {code}", file=sys.stderr, flush=True)

    async def _again(self) -> bool:
        """Whether it could be started again."""
        while True:
            recent = sum(time.monotonic() - at < WITHIN_S for at in self.deaths)
            if recent > TRIES:
                return False
            await asyncio.sleep(PAUSE_S * 2 ** (recent - 1))
            try:
                await self._spawn()
            except (UserError, OSError) as fault:  # what could be loaded before, or a process begun, cannot now
                print(fault, file=sys.stderr, flush=True)
                self.deaths.append(time.monotonic())
                continue
            return True

    def drop(self, number: int) -> None:
        """Nobody waits for that ask any more."""
        if self.state == "ready":
            self.write({"drop": number})

    def send(self, line: Line) -> None:
        """An ask; Broken where it cannot be made now."""
        if self.state != "ready":
            raise Broken(GONE if self.state == "broken" else "the model is not there")
        assert self.process
        assert self.process.stdin
        if self.process.stdin.transport.get_write_buffer_size() > UNREAD:
            raise Broken("the model does not take any more requests now")
        self.write(line)

    def write(self, line: Line) -> None:
        assert self.process
        assert self.process.stdin
        self.process.stdin.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    async def close(self) -> None:
        """Ends the worker: by the end of its input, by force if it does not heed it."""
        self.state = "closed"
        if self.watch is not None:
            self.watch.cancel()
            await asyncio.wait([self.watch])
        self.die()
        process = self.process
        if process is None or process.returncode is not None:
            return
        if process.stdin:
            process.stdin.close()
        await ended(process)


async def ended(process: asyncio.subprocess.Process) -> int:
    """Its exit code, by force if it does not end by itself.

    Only a process that lives is killed: to kill one that is just ending would take its exit code from asyncio.
    """
    try:
        return await asyncio.wait_for(process.wait(), END_S)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


class Owner:
    """What has a worker, and lives and dies with it."""

    child: Child

    @property
    def state(self) -> State:
        return self.child.state

    @property
    def lost(self) -> asyncio.Event:
        """Set when the worker has died too often to be started again."""
        return self.child.lost

    async def start(self) -> None:
        await self.child.start()

    async def close(self) -> None:
        await self.child.close()
