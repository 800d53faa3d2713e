"""The endpoints of 2023: their body, their events, their pace, their filter."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from client import job_of, told_to
from place import make_house, served

from kinkajou.serve.backend import Broken, Refused
from kinkajou.serve.coati import MAX_CLIENTS, Pace, neighbourhood
from kinkajou.serve.house import House
from kinkajou.serve.problems import Busy
from kinkajou.serve.sse import BadStream, data_of, event


def body(*pairs: Sequence[str], **changes: Any) -> dict[str, Any]:
    history = [{"instruction": a, "response": b} for a, b in pairs]
    return {"max_new_tokens": 8, "history": history, **changes}


def ask(path: str, sent: object, house: House | None = None) -> tuple[int, str, dict[str, str]]:
    async def beside() -> tuple[int, str, dict[str, str]]:
        async with served(house) as place:
            reply = await place.client.post(path, json=sent)
            return reply.status_code, reply.text, dict(reply.headers)

    return asyncio.run(beside())


def events(text: str) -> list[tuple[str, str]]:
    """By the rules of the HTML standard, as far as they matter here."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = [line.split(": ", 1) for line in block.split("\n")]
        found.append((dict(lines)["event"], "\n".join(value for name, value in lines if name == "data")))
    return found


def test_an_answer_is_a_json_string() -> None:
    status, text, headers = ask("/generate", body(("one two\nthree", "")))
    assert (status, text) == (200, '"one two\\nthree"')
    assert headers["content-type"] == "application/json"


def test_a_stream_is_generate_and_then_end() -> None:
    status, text, headers = ask("/generate/stream", body(("one two\nthree  four", "")))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    *said, last = events(text)
    assert {name for name, _ in said} == {"generate"}
    assert "".join(data for _, data in said) == "one two\nthree  four"
    assert last == ("end", "stop")


def test_the_body_becomes_a_job() -> None:
    house = told_to("x")
    sent = body(("a", "b"), ("c", ""), top_k=5, top_p=0.5, temperature=1.0, repetition_penalty=1.2)
    assert ask("/generate", sent, house)[0] == 200
    job = job_of(house)
    said = [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert [(turn.role, turn.content) for turn in job.turns] == said
    assert (job.max_tokens, job.top_k, job.top_p, job.temperature, job.repetition_penalty) == (8, 5, 0.5, 1.0, 1.2)
    assert job.drop_oldest


def test_a_last_response_may_be_left_out() -> None:
    house = told_to("x")
    assert ask("/generate", {"max_new_tokens": 1, "history": [{"instruction": "a"}]}, house)[0] == 200
    assert len(job_of(house).turns) == 1


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (body(("a", "said")), "history.0.response"),
        (body(), "history"),
        (body(("a", ""), max_new_tokens=0), "max_new_tokens"),
        (body(("a", ""), max_new_tokens=513), "max_new_tokens"),
        (body(("a", ""), temperature=-1), "temperature"),
        (body(("a", ""), top_p=0), "top_p"),
        (body(("a", ""), unheard=1), "unheard"),
        ({"history": [{"instruction": "a"}]}, "max_new_tokens"),
        ({"max_new_tokens": 1, "history": [{"instruction": 3}]}, "history.0.instruction"),
    ],
)
def test_a_body_that_is_refused(path: str, sent: object, field: str, client: Any) -> None:
    reply = client(path, sent)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


@pytest.fixture(scope="module")
def client() -> Any:
    """One server's app for all bodies that it refuses; nothing of it runs in between."""
    import httpx

    from kinkajou.serve.app import make_app

    house = make_house()
    app = make_app(house)

    def post(path: str, sent: object) -> httpx.Response:
        async def once() -> httpx.Response:
            for backend in house.backends.values():
                await backend.start()
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as asked:
                return await asked.post(path, json=sent)

        return asyncio.run(once())

    return post


# --- the word filter --------------------------------------------------------------------------------------


def test_both_routes_say_the_fixed_sentence() -> None:
    house = told_to("it is ba", "dword", "!", words=["badword"])
    assert ask("/generate", body(("x", "")), house)[1] == '"no comment"'
    house = told_to("it is ba", "dword", "!", words=["badword"])
    found = events(ask("/generate/stream", body(("x", "")), house)[1])
    assert found == [("generate", "it is "), ("generate", "no comment"), ("end", "content_filter")]


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "status"), [(Refused("no"), 400), (Broken("no"), 503)])
def test_faults(fault: Exception, status: int) -> None:
    assert ask("/generate", body(("x", "")), told_to(fault))[0] == status
    assert ask("/generate/stream", body(("x", "")), told_to(fault))[0] == status
    text = ask("/generate/stream", body(("x", "")), told_to("one", fault))[1]
    first, last = events(text)
    assert first == ("generate", "one")
    assert last[0] == "error"
    assert '"message": "no"' in last[1]


def test_a_stream_without_an_end_is_a_fault() -> None:
    (_, last) = events(ask("/generate/stream", body(("x", "")), told_to("one", finish=""))[1])
    assert last[0] == "error"


# --- the pace ---------------------------------------------------------------------------------------------


def test_one_request_a_second_on_both_routes_together() -> None:
    async def beside() -> list[Any]:
        async with served(make_house(rate=0.01)) as place:
            paths = ("/generate", "/generate/stream", "/generate")
            replies = [await place.client.post(path, json=body(("x", ""))) for path in paths]
            replies.append(await place.client.post("/v1/completions", json={"prompt": "x"}))
            return replies

    replies = asyncio.run(beside())
    assert [reply.status_code for reply in replies] == [200, 429, 429, 200]
    assert 90 <= int(replies[1].headers["retry-after"]) <= 100


def test_the_pace_by_the_clock() -> None:
    now = [0.0]
    pace = Pace(2.0, lambda: now[0])
    pace.enter("a")
    pace.enter("b")
    now[0] = 0.4
    with pytest.raises(Busy) as caught:
        pace.enter("a")
    assert caught.value.headers == {"retry-after": "1"}
    now[0] = 0.5
    pace.enter("a")
    now[0] = 0.9
    with pytest.raises(Busy):
        pace.enter("a")


def test_the_table_of_clients_does_not_grow() -> None:
    pace = Pace(1.0, lambda: 0.0)
    for i in range(MAX_CLIENTS + 50):
        pace.enter(f"client {i}")
    assert len(pace.last) == MAX_CLIENTS
    with pytest.raises(Busy):
        pace.enter(f"client {MAX_CLIENTS + 49}")


def test_whoever_came_last_is_remembered_longest() -> None:
    now = [0.0]
    pace = Pace(1.0, lambda: now[0])
    pace.enter("steady")
    now[0] = 2.0
    for i in range(MAX_CLIENTS - 1):
        pace.enter(f"client {i}")
    pace.enter("steady")
    pace.enter("one more")
    with pytest.raises(Busy):
        pace.enter("steady")


def test_one_client_has_half_of_an_ipv6_address() -> None:
    assert neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:1")
    assert neighbourhood("2001:db8::1") != neighbourhood("2001:db8:0:1::1")
    assert neighbourhood("10.0.0.1") != neighbourhood("10.0.0.2")
    assert neighbourhood("::ffff:10.0.0.1") != neighbourhood("::ffff:10.0.0.2")


# --- events -----------------------------------------------------------------------------------------------


def read(*chunks: bytes) -> list[bytes]:
    async def all_of() -> list[bytes]:
        async def come() -> Any:
            for chunk in chunks:
                yield chunk

        return [data async for data in data_of(come())]

    return asyncio.run(all_of())


@pytest.mark.parametrize(
    "text", ["data: a\n\ndata: b\ndata: c\n\n", "data:a\r\n\r\n: note\r\nevent: x\r\ndata: b\r\ndata:c\r\n\r\n"]
)
def test_events_are_read_however_they_are_cut(text: str) -> None:
    content = text.encode()
    assert read(content) == [b"a", b"b\nc"]
    for i in range(len(content)):
        assert read(content[:i], content[i:]) == [b"a", b"b\nc"]
    assert read(*(content[i : i + 1] for i in range(len(content)))) == [b"a", b"b\nc"]


def test_an_event_without_its_end_does_not_count() -> None:
    assert read(b"data: a\n\ndata: b\n") == [b"a"]


def test_an_event_without_end_is_no_event() -> None:
    for flood in ([b"data: " + b"x" * 600_000] * 2, [b"data: x\n" * 100_000] * 2):
        with pytest.raises(BadStream):
            read(*flood)


def test_line_ends_cannot_forge_an_event() -> None:
    assert event("generate", "a\r\revent: end\ndata: x") == (
        b"event: generate\ndata: a\ndata: \ndata: event: end\ndata: data: x\n\n"
    )
