"""How many, how long, how they end: the desk over HTTP and by itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from benchmarks.serving.stub import Stub
from place import make_house, served, until

from kinkajou.serve.backend import Began, Broken, Event, Job, Piece, Refused
from kinkajou.serve.desk import Desk
from kinkajou.serve.limits import Limits
from kinkajou.serve.metrics import Metrics
from kinkajou.serve.problems import Busy

LONG = {"text": " ".join("word" for _ in range(2000))}


class Failing(Stub):
    """Fails as told, before or after its first piece."""

    def __init__(self, fault: Exception, late: bool) -> None:
        super().__init__()
        self.fault, self.late = fault, late

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
        yield self.failing()

    async def failing(self) -> AsyncIterator[Event]:
        if self.late:
            yield Began(1)
            yield Piece(0, "first", 1)
        raise self.fault


FAULTS = [
    (Refused("too long", param="text", code="long"), 400),
    (Broken("the process ended"), 503),
    (OSError("0x7f"), 500),
]


@pytest.mark.parametrize(("fault", "status"), FAULTS)
@pytest.mark.parametrize("stream", [False, True])
def test_faults_before_the_first_piece_are_a_status(fault: Exception, status: int, stream: bool) -> None:
    async def ask() -> None:
        async with served(make_house({"stub": Failing(fault, late=False)})) as place:
            answer = await place.client.post("/echo", json={"text": "a", "stream": stream})
            assert answer.status_code == status
            error = answer.json()["error"]
            assert error["param"] == ("text" if status == 400 else None)
            assert error["request_id"] == answer.headers["x-request-id"]
            assert "0x7f" not in answer.text
            assert not place.house.desk.tickets

    asyncio.run(ask())


@pytest.mark.parametrize(("fault", "status"), FAULTS)
def test_faults_in_a_stream_are_its_last_event(fault: Exception, status: int) -> None:
    async def ask() -> None:
        async with served(make_house({"stub": Failing(fault, late=True)})) as place:
            answer = await place.client.post("/echo", json={"text": "a", "stream": True})
            assert answer.status_code == 200
            first, last = answer.text.strip().split("\n\n")
            assert first == "data: first"
            error = json.loads(last.removeprefix("data: "))["error"]
            kinds = {400: "invalid_request_error", 503: "service_unavailable_error", 500: "server_error"}
            assert error["type"] == kinds[status]
            assert error["request_id"] == answer.headers["x-request-id"]
            assert "0x7f" not in answer.text

    asyncio.run(ask())


def test_a_route_that_fails_in_a_stream_tells_its_reader() -> None:
    async def ask() -> str:
        async with served() as place:
            return (await place.client.post("/burst", json={"text": "a", "stream": True})).text

    text = asyncio.run(ask())
    assert text.startswith("data: first\n\n")
    assert json.loads(text.strip().rpartition("data: ")[2])["error"]["code"] == "internal_error"
    assert "secret" not in text


def test_beyond_slots_and_queue_is_429() -> None:
    async def ask() -> None:
        stub = Stub(pause_s=0.01, slots=2)
        async with served(make_house({"stub": stub}, queue=3)) as place:
            open_ones = [asyncio.create_task(place.client.post("/echo", json=LONG)) for _ in range(5)]
            await until(lambda: (stub.running, stub.waiting) == (2, 3))
            for stream in (False, True):
                answer = await place.client.post("/echo", json=LONG | {"stream": stream})
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "queue_full"
                assert int(answer.headers["retry-after"]) >= 1
            open_ones[0].cancel()
            await until(lambda: stub.running + stub.waiting == 4)
            several = await place.client.post("/echo", json=LONG | {"n": 2})
            assert several.status_code == 429  # one place is free, it asks for two
            for task in open_ones:
                task.cancel()
            await until(lambda: not place.house.desk.tickets)
            assert (await place.client.post("/echo", json={"text": "a", "n": 5})).status_code == 200
            assert (await place.client.post("/echo", json={"text": "a", "n": 6})).status_code == 400

    asyncio.run(ask())


def test_where_all_models_are_full_nothing_is_read() -> None:
    async def ask() -> None:
        full, free = Stub("full", pause_s=10, slots=1), Stub("free", slots=1)
        house = make_house({"full": full, "free": free}, queue=0)
        async with served(house) as place, house.desk.admitted(full, Job(text="a")):
            broken = await place.client.post("/v1/completions", json={"model": "full", "prompt": 1.5})
            assert broken.status_code == 400  # one could be asked: so the body is read, and is no request
            async with house.desk.admitted(free, Job(text="a")):
                answer = await place.client.post("/v1/completions", json={"model": "full", "prompt": 1.5})
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
                assert "retry-after" in answer.headers
                assert (await place.client.get("/ready")).status_code == 200

    asyncio.run(ask())


def test_retry_after_follows_what_answers_take() -> None:
    async def ask() -> None:
        stub = Stub(slots=1)
        await stub.start()
        desk = Desk(Limits(), Metrics({"stub": stub}), queue=0)
        told = []
        for took_s in (0.5, 20.0, 10_000.0):
            desk.choice_s["stub"] = took_s
            async with desk.admitted(stub, Job(text="a")):
                with pytest.raises(Busy) as refused:
                    async with desk.admitted(stub, Job(text="a")):
                        pass
                told.append(int((refused.value.headers or {})["retry-after"]))
        assert told[0] == 1
        assert 15 <= told[1] <= 25  # less what the last answer, quickly done, has taken away
        assert told[2] == 60

    asyncio.run(ask())


def test_one_client_from_elsewhere_leaves_room_for_others() -> None:
    async def ask() -> None:
        stub = Stub(slots=2)
        await stub.start()
        desk = Desk(Limits(open_share=0.5), Metrics({"stub": stub}), queue=2)
        async with desk.admitted(stub, Job(text="a", n=2), "192.0.2.7"):
            with pytest.raises(Busy) as refused:
                async with desk.admitted(stub, Job(text="a"), "192.0.2.7"):
                    pass
            assert refused.value.code == "too_many_open"
            async with desk.admitted(stub, Job(text="a"), "192.0.2.8"):
                pass
        async with desk.admitted(stub, Job(text="a", n=3), "192.0.2.7"):  # one request that is more by itself
            pass
        async with (
            desk.admitted(stub, Job(text="a", n=2), "127.0.0.1"),
            desk.admitted(stub, Job(text="a"), "127.0.0.1"),
        ):
            pass
        assert not desk.by_client
        assert desk.choices.total() == 0

    asyncio.run(ask())


@pytest.mark.parametrize("waiting", [False, True])
def test_the_deadline_counts_waiting_and_saying(waiting: bool) -> None:
    async def ask() -> None:
        stub = Stub(pause_s=0.01, slots=1)
        async with served(make_house({"stub": stub}, limits=Limits(deadline_s=0.2))) as place:
            if waiting:
                await stub.free.acquire()
            plain = await place.client.post("/echo", json=LONG)
            assert plain.status_code == 504
            assert plain.json()["error"]["code"] == "deadline"
            stream = await place.client.post("/echo", json=LONG | {"stream": True})
            if waiting:
                assert stream.status_code == 504
            else:
                assert stream.status_code == 200
                assert json.loads(stream.text.strip().rpartition("data: ")[2])["error"]["code"] == "deadline"
            assert (stub.running, stub.waiting) == (0, 0)

    asyncio.run(ask())


def test_a_model_that_is_not_ready_is_503() -> None:
    async def ask() -> None:
        stub = Stub()
        async with served(make_house({"stub": stub})) as place:
            stub.state = "broken"
            answer = await place.client.post("/echo", json={"text": "a"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert "retry-after" in answer.headers

    asyncio.run(ask())


def test_what_is_counted() -> None:
    async def ask() -> str:
        async with served() as place:
            await place.client.post("/echo", json={"text": "a b c", "n": 2})
            await place.client.post("/echo", json={"text": "a"})
            await place.client.get("/nothing/at/all")
            return (await place.client.get("/metrics")).text

    lines = asyncio.run(ask()).splitlines()
    for line in (
        'kinkajou_tokens_total{model="stub"} 7.0',
        'kinkajou_prompt_tokens_total{model="stub"} 4.0',
        'kinkajou_jobs_total{model="stub",outcome="done"} 2.0',
        'kinkajou_time_to_first_token_seconds_count{model="stub"} 2.0',
        'kinkajou_time_per_token_seconds_count{model="stub"} 4.0',
        'kinkajou_queue_time_seconds_count{model="stub"} 2.0',
        'kinkajou_requests_total{method="POST",route="/echo",status="200"} 2.0',
        'kinkajou_requests_total{method="GET",route="none",status="404"} 1.0',
        'kinkajou_running{model="stub"} 0.0',
        'kinkajou_slots{model="stub"} 16.0',
    ):
        assert line in lines
