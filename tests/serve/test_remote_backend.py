"""A server in front of a server: ours before ours, and before ones that misbehave."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from benchmarks.serving.stub import Stub
from client import job_of, told_to
from other_server import Answer, delta, reply, stream, wire
from place import KEY, Place, make_house, served, until

from kinkajou.errors import UserError
from kinkajou.serve.backend import Began, Broken, Event, Job, Piece, Refused, Turn
from kinkajou.serve.house import House
from kinkajou.serve.remote import RemoteBackend, remote_backends
from kinkajou.serve.remote_address import root_of
from kinkajou.serve.remote_wire import shorter


def chat(text: str, **more: Any) -> Job:
    return Job(turns=(Turn("user", text),), **more)


async def said(backend: RemoteBackend, job: Job) -> tuple[list[str], list[str], list[Event]]:
    texts, finishes, events = [""] * job.n, [""] * job.n, list[Event]()
    async with backend.run(job) as found:
        async for event in found:
            events.append(event)
            if isinstance(event, Piece):
                texts[event.choice] += event.text
                finishes[event.choice] = event.finish or finishes[event.choice]
    return texts, finishes, events


@asynccontextmanager
async def behind(
    house: House | None = None, name: str = "stub", **words: Any
) -> AsyncIterator[tuple[RemoteBackend, Place]]:
    async with served(house) as place:
        backend = RemoteBackend(name, f"http://127.0.0.1:{place.port}", **words)
        try:
            yield backend, place
        finally:
            await backend.close()


def asked_of(answer: bytes | Answer, job: Job) -> tuple[list[str], list[str], list[Event]]:
    async def once() -> tuple[list[str], list[str], list[Event]]:
        async with wire(answer if callable(answer) else lambda head, asked: answer) as url:
            backend = RemoteBackend("m", url)
            try:
                return await said(backend, job)
            finally:
                await backend.close()

    return asyncio.run(once())


# --- before our own server --------------------------------------------------------------------------------


def test_an_answer_comes_through_with_its_counts() -> None:
    async def once() -> None:
        async with behind() as (backend, _):
            await backend.start()
            assert backend.state == "ready"
            texts, finishes, events = await said(backend, chat("one two three", n=2))
            assert (texts, finishes) == (["one two three"] * 2, ["stop"] * 2)
            assert isinstance(events[0], Began)
            assert [event.prompt_tokens for event in events if isinstance(event, Began)][-1] == 3
            assert {e.choice: e.num_tokens for e in events if isinstance(e, Piece)} == {0: 3, 1: 3}
            texts, finishes, _ = await said(backend, Job(text="a b c", max_tokens=2))
            assert (texts, finishes) == (["a b"], ["length"])
            assert backend.load.running == 0

    asyncio.run(once())


def test_every_field_of_a_job_arrives() -> None:
    house = told_to("x")
    more: dict[str, Any] = {"top_k": 3, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5, "temperature": 0.5}
    turns = (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v"))
    job = Job(turns=turns, max_tokens=5, stops=("x", "y"), seed=9, **more)

    async def once() -> None:
        async with behind(house, "script") as (backend, _):
            await said(backend, job)

    asyncio.run(once())
    assert job_of(house) == job


def test_log_probabilities_come_through() -> None:
    async def once() -> None:
        async with behind() as (backend, _):
            for job in (chat("ö b", logprobs=1), Job(text="ö b", logprobs=1)):
                _, _, events = await said(backend, job)
                tokens = [token for event in events if isinstance(event, Piece) for token in event.tokens]
                assert [(token.said.text, token.said.bytes, token.said.logprob) for token in tokens] == [
                    ("ö", b"\xc3\xb6", -0.5),
                    (" b", b" b", -0.5),
                ]
                assert [[other.text for other in token.likeliest] for token in tokens] == [["ö"], [" b"]]

    asyncio.run(once())


def test_leaving_an_answer_frees_the_slot_there() -> None:
    """At once: the answers would take minutes."""
    stub = Stub(pause_s=30)
    house = make_house({"stub": stub})

    async def once() -> None:
        async with behind(house) as (backend, _), asyncio.timeout(8):
            async with backend.run(chat("a b c d", n=3)) as events:
                assert await anext(events) == Began(0)
                await until(lambda: stub.load.running == 3)
            assert backend.load.running == 0
            await until(lambda: stub.load.running == 0 and not house.desk.tickets)

    asyncio.run(once())


def test_all_routes_work_in_front_of_it() -> None:
    async def once() -> None:
        async with served() as inner:
            found = await remote_backends(f"http://127.0.0.1:{inner.port}/v1")
            assert list(found) == ["stub"]
            assert found["stub"].context == 4096
            async with served(make_house(found)) as outer:
                models = (await outer.client.get("/v1/models")).json()
                assert [model["id"] for model in models["data"]] == ["stub"]
                body = {"messages": [{"role": "user", "content": "a b c"}], "n": 2}
                whole = (await outer.client.post("/v1/chat/completions", json=body)).json()
                assert [choice["message"]["content"] for choice in whole["choices"]] == ["a b c"] * 2
                assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
                old = {"max_new_tokens": 8, "history": [{"instruction": "a b"}]}
                assert (await outer.client.post("/generate", json=old)).json() == "a b"
                texts = {"prompt": ["a b", "c"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
                lines = (await outer.client.post("/v1/completions", json=texts)).text.split("\n\n")
                usage = json.loads(lines[-3].removeprefix("data: "))["usage"]
                assert usage == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
                bad = await outer.client.post("/v1/completions", json={"prompt": "x " * 5000})
                assert bad.status_code == 400
                assert "the prompt has 5001 tokens" in bad.json()["error"]["message"]
            await found["stub"].close()

    asyncio.run(once())


def test_a_key_is_sent() -> None:
    async def once() -> None:
        async with behind(make_house(key=KEY), key=KEY.decode()) as (backend, place):
            await backend.start()
            other = RemoteBackend("stub", f"http://127.0.0.1:{place.port}", "wrong")
            with pytest.raises(UserError, match="refuses the key") as caught:
                await other.start()
            assert caught.value.exit_code == 5

    asyncio.run(once())


# --- before others ----------------------------------------------------------------------------------------


def test_what_is_at_its_usual_value_is_not_sent() -> None:
    fields = list[set[str]]()

    def answer(head: str, asked: dict[str, Any]) -> bytes:
        fields.append(set(asked))
        return stream(delta("x", "stop"))

    asked_of(answer, chat("x"))
    assert fields == [{"model", "messages", "stream", "stream_options", "temperature"}]


def test_choices_are_requests_of_their_own_with_seeds_of_their_own() -> None:
    seeds = list[int]()

    def answer(head: str, asked: dict[str, Any]) -> bytes:
        seeds.append(asked["seed"])
        assert "n" not in asked
        return stream(delta(f"s{asked['seed']}", "stop"))

    texts, _, _ = asked_of(answer, chat("x", n=3, seed=7))
    assert texts == ["s7", "s8", "s9"]
    assert sorted(seeds) == [7, 8, 9]


def test_counts_are_our_own_where_none_are_told() -> None:
    _, _, events = asked_of(stream(delta("a"), delta(" b"), delta("", "length")), chat("x"))
    assert events == [Began(0), Piece(0, "a", 1), Piece(0, " b", 2), Piece(0, "", 2, "length")]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (stream(delta("a")), Broken, "before its answer was finished"),
        (stream(delta("a"), {"error": {"message": "secret"}}), Broken, "failed within its answer"),
        (stream(b"{not json"), Broken, "no sound stream"),
        (stream(b'"text"'), Broken, "no sound stream"),
        (stream(b'{"a": "\xff"}'), Broken, "no sound stream"),
        (stream(b"x" * 1_100_000), Broken, "more than 1,000,000 bytes"),
        (reply(500, b"Traceback secret"), Broken, "HTTP 500"),
        (reply(429, b"{}"), Broken, "busy"),
        (reply(401, b"{}"), Broken, "refuses the key"),
        (reply(302, b"", extra="location: http://127.0.0.1:1/\r\n"), Broken, "HTTP 302"),
        (reply(400, b'{"error": {"message": "bad\\u001b[31m n", "param": "n"}}'), Refused, "bad"),
        (reply(422, b'{"detail": "Unexpected fields"}'), Refused, "Unexpected fields"),
        (reply(400, b"<html>"), Refused, "HTTP 400"),
        (b"nonsense", Broken, "failed"),
        (b"", Broken, "failed"),
        (reply(200, b"data: {}", "text/event-stream")[:-3], Broken, "broke off"),
    ],
)
def test_faults_of_the_other_server(answer: bytes, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        asked_of(answer, chat("x"))
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_log_probabilities_that_are_not_told_are_not_passed_over() -> None:
    with pytest.raises(Refused, match="no log-probabilities"):
        asked_of(stream(delta("x", "stop")), chat("x", logprobs=0))


def test_text_that_was_held_back_may_follow_its_tokens() -> None:
    """What may have been the beginning of a stop text: the tokens were told when they came."""
    row = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    first = {"choices": [{"index": 0, "delta": {"content": ""}, "logprobs": {"content": [row, row]}}]}
    texts, finishes, events = asked_of(stream(first, delta("aa", "length")), chat("x", logprobs=0))
    assert (texts, finishes) == (["aa"], ["length"])
    assert sum(len(event.tokens) for event in events if isinstance(event, Piece)) == 2
    assert [event.num_tokens for event in events if isinstance(event, Piece)] == [2, 2, 2]


def test_half_a_character_does_not_come_through() -> None:
    texts, _, _ = asked_of(
        stream(b'{"choices": [{"delta": {"content": "a\\ud800"}, "finish_reason": "stop"}]}'), chat("x")
    )
    assert texts == ["a?"]


def test_a_chat_that_is_too_long_is_shortened_if_it_may_be() -> None:
    turns = tuple(Turn("user" if i % 2 == 0 else "assistant", f"t{i}") for i in range(9))

    def answer(head: str, asked: dict[str, Any]) -> bytes:
        words = [message["content"] for message in asked["messages"]]
        if len(words) > 4:
            return reply(400, b'{"error": {"message": "This model\'s maximum context length is 4 tokens"}}')
        return stream(delta(" ".join(words), "stop"))

    texts, _, events = asked_of(answer, Job(turns=(Turn("system", "s"), *turns), drop_oldest=True))
    assert texts == ["s t6 t7 t8"]
    assert events[0] == Began(0, 6)
    with pytest.raises(Refused, match="context length"):
        asked_of(answer, Job(turns=turns))
    with pytest.raises(Refused, match="maximum context"):
        asked_of(reply(400, b'{"error": {"message": "maximum context"}}'), Job(turns=turns, drop_oldest=True))


def test_shorter_chats_begin_with_the_user() -> None:
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    assert shorter(turns) == [Turn("user", "c")]
    assert shorter([Turn("user", "c")]) == [Turn("user", "c")]
    assert shorter([Turn("system", "s"), Turn("user", "c")]) == [Turn("system", "s"), Turn("user", "c")]


# --- which models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:8000", "http://h:8000/v1/"),
        ("http://h:8000/", "http://h:8000/v1/"),
        ("https://h/x/v1", "https://h/x/v1/"),
        ("http://[::1]:80/v1/", "http://[::1]:80/v1/"),
    ],
)
def test_addresses(url: str, root: str) -> None:
    assert root_of(url) == root


@pytest.mark.parametrize(
    "url", ["h:8000", "ftp://h", "http://", "http://u:p@h", "http://h?x=1", "http://h:99999", "http://["]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError):
        root_of(url)


@pytest.mark.parametrize(
    "answer",
    [
        reply(500, b""),
        reply(200, b"[]"),
        reply(200, b'{"data": 3}'),
        reply(200, b'{"data": [{"id": 3}, {"id": ""}, 4]}'),
        b"",
    ],
)
def test_a_server_that_lists_no_models_needs_a_name(answer: bytes) -> None:
    async def once() -> None:
        async with wire(lambda head, asked: answer) as url:
            with pytest.raises(UserError, match="does not list its models") as caught:
                await remote_backends(url)
            assert caught.value.exit_code == 5
            found = await remote_backends(url, names=["mine"])
            assert list(found) == ["mine"]

    asyncio.run(once())
