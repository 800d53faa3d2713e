"""How a server ends: open answers finish or are told, new ones are turned away, nothing is left."""

import asyncio
import contextlib
import json
import os
import signal

import httpx
import pytest
from benchmarks.serving.stub import Stub
from place import Place, make_house, served, until


async def streams(place: Place, words: int, count: int) -> list["asyncio.Task[str]"]:
    async def one() -> str:
        body = {"text": " ".join("word" for _ in range(words)), "stream": True}
        return (await place.client.post("/echo", json=body)).text

    return [asyncio.create_task(one()) for _ in range(count)]


def test_open_answers_end_and_new_ones_are_turned_away() -> None:
    async def ask() -> None:
        stub = Stub(pause_s=0.02)
        async with served(make_house({"stub": stub})) as place:
            asked = await streams(place, 30, 16)
            await until(lambda: stub.running == 16)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: place.house.desk.draining)
            ready = await place.client.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            for stream in (False, True):
                new = await place.client.post("/echo", json={"text": "a", "stream": stream})
                assert (new.status_code, new.json()["error"]["code"]) == (503, "stopping")
                assert "retry-after" in new.headers
            for text in await asyncio.gather(*asked):
                assert text.count("word") == 30
                assert text.endswith("data: [DONE]\n\n")
            await asyncio.wait_for(place.running, 5)
            assert place.server.exit_code == 0
            with pytest.raises(httpx.ConnectError):
                await httpx.AsyncClient(trust_env=False).get(f"http://127.0.0.1:{place.port}/health")

    asyncio.run(ask())


@pytest.mark.parametrize("again", [False, True])
def test_what_is_still_open_at_the_end_is_told(again: bool) -> None:
    """At --drain-s, or at a second signal, whose number is the exit code."""

    async def ask() -> None:
        stub = Stub(pause_s=0.02)
        async with served(make_house({"stub": stub}), drain_s=60 if again else 0.2) as place:
            asked = await streams(place, 4000, 16)
            plain = asyncio.create_task(place.client.post("/echo", json={"text": "a " * 4000}))
            await until(lambda: stub.running == 16 and stub.waiting == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            if again:
                await until(lambda: place.house.desk.draining)
                os.kill(os.getpid(), signal.SIGINT)
            for text in await asyncio.gather(*asked):
                *said, last = text.strip().split("\n\n")
                assert set(said) <= {"data: word", "data:  word"}
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
            assert (await plain).status_code == 503
            await asyncio.wait_for(place.running, 5)
            assert place.server.exit_code == (130 if again else 0)
            assert (stub.running, stub.waiting) == (0, 0)

    asyncio.run(ask())


def test_a_client_that_never_reads_does_not_hold_the_end() -> None:
    async def ask() -> None:
        async with served(drain_s=0.1) as place:
            _, half = await place.line(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            _, idle = await place.line()
            place.server.stop(0)
            await asyncio.wait_for(place.running, 5)
            half.close()
            idle.close()

    asyncio.run(ask())


def test_a_model_that_cannot_be_kept_alive_ends_the_server() -> None:
    async def ask() -> int:
        lost = asyncio.Event()
        async with served(vital={"stub": lost}) as place:
            lost.set()
            await asyncio.wait_for(place.running, 5)
            return place.server.exit_code

    assert asyncio.run(ask()) == 5


def test_nothing_is_left_of_a_server() -> None:
    async def ask() -> None:
        before = asyncio.all_tasks()
        async with served() as place:
            asked = await streams(place, 5, 4)
            await asyncio.gather(*asked)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)
        assert asyncio.all_tasks() == before

    asyncio.run(ask())
