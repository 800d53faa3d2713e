"""A backend whose model is a process: what it says, what it does with readers that leave, and when the process dies."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kinkajou.errors import UserError
from kinkajou.serve import child as child_module
from kinkajou.serve.backend import Began, Broken, Job, Piece, Refused, Turn
from kinkajou.serve.local import Hosting, LocalBackend
from kinkajou.serve.reward_local import LocalScorer
from small import Small

HOSTING = Hosting(slots=3, context=60, template="plain", threads=1)
LONG = Job((Turn("user", "w3 w4"),), max_tokens=50, temperature=1.0, seed=2)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


@asynccontextmanager
async def started(source: str, hosting: Hosting = HOSTING) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend("tiny", source, hosting)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def answered(backend: LocalBackend, job: Job) -> list[Piece]:
    async with backend.run(job) as events:
        first, *pieces = [event async for event in events]
    assert isinstance(first, Began)
    return [piece for piece in pieces if isinstance(piece, Piece)]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_jobs_beside_each_other_say_what_each_says_alone(small: Small) -> None:
    jobs = [Job((Turn("user", f"w{3 + i} w{50 - i}"),), max_tokens=16, temperature=0.0, logprobs=1) for i in range(12)]

    async def work() -> None:
        async with started(small.policy) as backend:
            alone = [await answered(backend, job) for job in jobs]
            together = await asyncio.gather(*[answered(backend, job) for job in jobs])
            for one, other in zip(alone, together, strict=True):
                assert text_of(one) == text_of(other)
                assert [token for piece in one for token in piece.tokens] == [
                    t for piece in other for t in piece.tokens
                ]
            assert len({text_of(pieces) for pieces in alone}) > 6
            with pytest.raises(Refused) as caught:
                await answered(backend, Job(text="w3 " * 70))
            assert caught.value.code == "context_length_exceeded"
            await until(lambda: backend.load.running == backend.load.waiting == 0)
            assert (backend.load.slots, backend.load.room_tokens, backend.context) == (3, 180, 60)
            assert not backend.open
            assert len(asyncio.all_tasks()) == 3  # this one, its limit of time, and the one that reads

    run(work())


def test_whoever_leaves_frees_the_slot(small: Small) -> None:
    async def leave(backend: LocalBackend, after: int) -> None:
        async with backend.run(LONG) as events:
            for _ in range(after):
                await anext(events)

    async def work() -> None:
        async with started(small.policy) as backend:
            await asyncio.gather(*[leave(backend, i % 4) for i in range(20)])
            task = asyncio.create_task(answered(backend, LONG))
            await until(lambda: backend.load.running == 1)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await until(lambda: backend.load.running == backend.load.waiting == 0)
            assert not backend.open
            assert (await answered(backend, LONG))[-1].finish

    run(work())


def test_a_step_that_fails_breaks_what_is_open_and_the_worker_comes_back(
    small: Small, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINKAJOU_FAULT", "worker.step:4:raise")
    monkeypatch.setattr(child_module, "PAUSE_S", 0.01)

    async def work() -> None:
        async with started(small.policy) as backend:
            monkeypatch.delenv("KINKAJOU_FAULT")
            found = await asyncio.gather(*[answered(backend, LONG) for _ in range(4)], return_exceptions=True)
            assert all(isinstance(fault, Broken) for fault in found)
            assert not any("asked for" in str(fault) for fault in found)
            await until(lambda: backend.state == "broken")
            with pytest.raises(Broken):
                await answered(backend, LONG)
            await until(lambda: backend.state == "ready")
            assert (await answered(backend, LONG))[-1].finish
            assert not backend.lost.is_set()

    run(work())
    told = capfd.readouterr().err
    assert "RuntimeError" in told
    assert "ended with code 70" in told


@pytest.mark.slow
def test_a_worker_that_dies_too_often_is_given_up(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(child_module, "TRIES", 1)

    async def work() -> None:
        async with started(small.policy) as backend:
            for _ in range(2):
                await until(lambda: backend.state == "ready")
                assert backend.child.process
                process = backend.child.process.pid
                task = asyncio.create_task(answered(backend, LONG))
                await asyncio.sleep(0)
                os.kill(process, signal.SIGKILL)
                with pytest.raises(Broken):
                    await task
            await asyncio.wait_for(backend.lost.wait(), 30)
            assert backend.state == "broken"

    run(work())


def test_a_process_that_cannot_be_begun_again_is_given_up(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "PAUSE_S", 0.001)

    async def no_files(*arguments: object, **words: object) -> None:
        raise OSError(24, "Too many open files")

    async def work() -> None:
        async with started(small.policy) as backend:
            assert backend.child.process
            monkeypatch.setattr(asyncio, "create_subprocess_exec", no_files)
            os.kill(backend.child.process.pid, signal.SIGKILL)
            await asyncio.wait_for(backend.lost.wait(), 30)
            assert backend.state == "broken"

    run(work())


def test_a_line_that_is_not_understood_ends_the_waiting(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with started(small.policy) as backend:
            backend.child.take = lambda line: line["nothing"]
            with pytest.raises(Broken):
                await answered(backend, LONG)
            await asyncio.wait_for(backend.lost.wait(), 30)
            assert backend.state == "broken"

    run(work())
    assert "not understood" in caplog.text


@pytest.mark.slow
def test_a_load_that_fails_is_the_users_to_mend(tmp_path: Path, small: Small) -> None:
    async def work() -> None:
        for source, hosting in ((str(tmp_path), HOSTING), (small.policy, Hosting(context=100_000, template="plain"))):
            with pytest.raises(UserError) as caught:
                async with started(source, hosting):
                    pass
            assert caught.value.problem
            assert caught.value.exit_code == 2
        assert len(asyncio.all_tasks()) == 2

    run(work())


@pytest.mark.slow
def test_the_worker_dies_with_its_server(small: Small) -> None:
    """Killed, so that nothing of it can tell the worker; in the middle of an answer."""
    code = (
        "import asyncio, sys\n"
        "from kinkajou.serve.local import Hosting, LocalBackend\n"
        "async def work():\n"
        "    backend = LocalBackend('tiny', sys.argv[1], Hosting(template='plain', threads=1))\n"
        "    await backend.start()\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(backend.child.process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(work())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, small.policy], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        worker = int(server.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        server.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_reward_model_scores_and_is_asked_in_turn(small: Small) -> None:
    async def work() -> None:
        scorer = LocalScorer("judge", small.judge, HOSTING)
        chats = [(Turn("user", f"w{i}"), Turn("assistant", f"w{2 * i}")) for i in range(3, 9)]
        with pytest.raises(Broken):
            await scorer.score(chats)
        await scorer.start()
        try:
            together = await scorer.score(chats)
            alone = await asyncio.gather(*[scorer.score([chat]) for chat in chats])
            assert together == [score for (score,) in alone]
            assert len(set(together)) == 6
            task = asyncio.create_task(scorer.score(chats * 20))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(Refused):
                await scorer.score([(Turn("user", "w3 " * 200), Turn("assistant", "w3"))])
            assert not scorer.open
        finally:
            await scorer.close()

    run(work())
