"""The official client against the server with the stand-in backend, which says the last message word by word."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from benchmarks.serving.stub import Stub
from client import job_of, talk, told_to, user
from place import KEY, make_house, served

from kinkajou.serve.backend import Broken, Event, Job, Refused
from kinkajou.serve.limits import Limits

# --- models -----------------------------------------------------------------------------------------------


def test_models_are_listed_and_looked_up() -> None:
    house = make_house({"a": Stub("a"), "b": Stub("b")})

    def work(client: openai.OpenAI) -> Any:
        assert [model.id for model in client.models.list()] == ["a", "b"]
        assert client.models.retrieve("b").id == "b"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("d")
        return caught.value

    found = talk(work, house)
    assert (found.code, found.param) == ("model_not_found", "model")


def test_a_request_names_its_model_or_gets_the_first() -> None:
    house = make_house({"a": Stub("a"), "b": Stub("b")})

    def work(client: openai.OpenAI) -> Any:
        assert client.chat.completions.create(model="b", messages=user("x")).model == "b"
        assert client.chat.completions.create(model=None, messages=user("x")).model == "a"  # type: ignore[call-overload]
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="c", messages=user("x"))
        return caught.value

    assert talk(work, house).code == "model_not_found"


# --- answers ----------------------------------------------------------------------------------------------


def test_an_answer() -> None:
    found = talk(lambda client: client.chat.completions.create(model="stub", messages=user("one two three"), n=2))
    assert [choice.index for choice in found.choices] == [0, 1]
    assert {choice.message.content for choice in found.choices} == {"one two three"}
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    assert found.usage
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 6, 9)
    assert found.object == "chat.completion"
    assert found.id.startswith("chatcmpl-")


def test_ids_are_unique() -> None:
    def work(client: openai.OpenAI) -> set[str]:
        return {client.completions.create(model="stub", prompt="x").id for _ in range(20)}

    assert len(talk(work)) == 20


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer(name: str) -> None:
    def work(client: openai.OpenAI) -> Any:
        return client.chat.completions.create(model="stub", messages=user("a b c"), **{name: 2})  # type: ignore[call-overload]

    (choice,) = talk(work).choices
    assert (choice.message.content, choice.finish_reason) == ("a b", "length")


def test_a_stream_with_usage() -> None:
    def work(client: openai.OpenAI) -> list[Any]:
        stream = client.chat.completions.create(
            model="stub", messages=user("one two three"), n=2, stream=True, stream_options={"include_usage": True}
        )
        return list(stream)

    *chunks, last = talk(work)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant"] * 2
    for choice in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice]
        assert "".join(found.delta.content or "" for found in own) == "one two three"
        assert [found.finish_reason for found in own if found.finish_reason] == ["stop"]
        assert own[-1].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 6, 9)


def test_a_stream_without_usage_and_its_end() -> None:
    async def raw() -> str:
        async with served() as place:
            body = {"messages": user("a b"), "stream": True}
            reply = await place.client.post("/v1/chat/completions", json=body)
            assert reply.headers["content-type"].startswith("text/event-stream")
            return reply.text

    text = asyncio.run(raw())
    assert text.endswith("data: [DONE]\n\n")
    assert all(line.startswith("data: {") for line in text.split("\n\n")[:-2])
    assert "usage" not in text


def test_several_prompts_are_numbered_prompt_after_prompt() -> None:
    def plain(client: openai.OpenAI) -> Any:
        return client.completions.create(model="stub", prompt=["a b c", "d e"], n=2, max_tokens=2)

    def stream(client: openai.OpenAI) -> Any:
        options: Any = {"include_usage": True}
        return list(
            client.completions.create(
                model="stub", prompt=["a b c", "d e"], n=2, max_tokens=2, stream=True, stream_options=options
            )
        )

    found = talk(plain)
    assert [(x.index, x.text, x.finish_reason) for x in found.choices] == [
        *((0, "a b", "length"), (1, "a b", "length"), (2, "d e", "stop"), (3, "d e", "stop"))
    ]
    assert found.usage
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 8)
    chunks = talk(stream)
    said = [""] * 4
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert said == ["a b", "a b", "d e", "d e"]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 8)


def test_prompts_wait_for_slots_side_by_side() -> None:
    house = make_house({"stub": Stub(slots=1)})
    texts = [f"p{i} q" for i in range(4)]
    found = talk(lambda client: client.completions.create(model="stub", prompt=texts), house)
    assert [choice.text for choice in found.choices] == texts
    assert house.backends["stub"].load.running == 0


# --- log-probabilities ------------------------------------------------------------------------------------


def test_log_probabilities_of_a_chat() -> None:
    def work(client: openai.OpenAI, stream: bool) -> list[Any]:
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "stream": stream}
        found = client.chat.completions.create(model="stub", messages=user("ö b"), **options)
        kept = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
        return [row for choice in kept if choice.logprobs for row in choice.logprobs.content]

    for stream in (False, True):
        rows = talk(lambda client, stream=stream: work(client, stream))  # type: ignore[misc]
        assert [(row.token, row.logprob, row.bytes) for row in rows] == [
            ("ö", -0.5, [0xC3, 0xB6]),
            (" b", -0.5, [0x20, 0x62]),
        ]
        assert [[other.token for other in row.top_logprobs] for row in rows] == [["ö"], [" b"]]


def test_log_probabilities_of_a_text() -> None:
    def work(client: openai.OpenAI, stream: bool) -> list[Any]:
        found: Any = client.completions.create(model="stub", prompt="aa b c", logprobs=1, stream=stream)
        kept = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
        return [choice.logprobs for choice in kept if choice.logprobs]

    (plain,) = talk(lambda client: work(client, False))
    assert plain.tokens == ["aa", " b", " c"]
    assert plain.token_logprobs == [-0.5, -0.5, -0.5]
    assert plain.top_logprobs == [{"aa": -0.5}, {" b": -0.5}, {" c": -0.5}]
    assert plain.text_offset == [0, 2, 4]
    streamed = talk(lambda client: work(client, True))
    assert [row.text_offset for row in streamed] == [[0], [2], [4]]
    assert [row.tokens for row in streamed] == [["aa"], [" b"], [" c"]]


# --- what becomes of a request ----------------------------------------------------------------------------


def test_every_field_reaches_the_job() -> None:
    house = told_to("x")
    extra = {"top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5}
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d"},
    ]

    def work(client: openai.OpenAI) -> None:
        client.chat.completions.create(
            model="script",
            messages=messages,
            n=3,
            max_tokens=9,
            max_completion_tokens=8,
            temperature=0.5,
            top_p=0.75,
            stop=["s", "t"],
            seed=-4,
            logprobs=True,
            top_logprobs=2,
            user="u",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            presence_penalty=0,
            frequency_penalty=0.0,
            logit_bias={},
            response_format={"type": "text"},
            tools=[],
            extra_body=extra,
        )

    talk(work, house)
    job = job_of(house)
    assert [(turn.role, turn.content) for turn in job.turns] == [
        *(("system", "be brief"), ("user", "a b"), ("assistant", "c"), ("user", "d"))
    ]
    assert (job.n, job.max_tokens, job.temperature, job.top_p, job.stops) == (3, 8, 0.5, 0.75, ("s", "t"))
    assert (job.seed, job.logprobs, job.top_k, job.min_p, job.repetition_penalty) == (-4, 2, 5, 0.25, 1.5)
    assert not job.drop_oldest


def test_what_is_left_out_is_openais_default() -> None:
    house = told_to("x")
    talk(lambda client: client.chat.completions.create(model="script", messages=user("x"), stop="s"), house)
    assert job_of(house) == Job(turns=job_of(house).turns, stops=("s",))
    house = told_to("x")
    talk(lambda client: client.completions.create(model="script", prompt="p"), house)
    assert job_of(house) == Job(text="p")


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_is_refused_is_a_bad_request(stream: bool) -> None:
    house = told_to(Refused("too long for me", param="messages", code="context_length_exceeded"))

    def work(client: openai.OpenAI) -> Any:
        with pytest.raises(openai.BadRequestError) as caught:
            list(client.chat.completions.create(model="script", messages=user("x"), stream=stream))
        return caught.value

    # The stand-in refuses after its prompt has been read: a stream has begun then.
    if stream:
        with pytest.raises(BaseException, match="too long for me"):
            talk(work, house)
    else:
        found = talk(work, house)
        assert (found.param, found.code) == ("messages", "context_length_exceeded")
        assert "too long for me" in str(found)


def test_a_fault_within_a_stream_is_told_and_ends_it() -> None:
    house = told_to("one", Broken("the model fell over"))

    def work(client: openai.OpenAI) -> Any:
        stream = client.chat.completions.create(model="script", messages=user("x"), stream=True)
        said = [next(stream).choices[0].delta.content, next(stream).choices[0].delta.content]
        with pytest.raises(openai.APIError) as caught:
            next(stream)
        return said, caught.value

    said, fault = talk(work, house)
    assert said == ["", "one"]
    assert "the model fell over" in str(fault)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_stops_without_an_end_is_a_fault(stream: bool) -> None:
    house = told_to("one", "two", finish="")

    def work(client: openai.OpenAI) -> Any:
        with pytest.raises(openai.APIError, match="before its answer was finished"):
            list(client.completions.create(model="script", prompt="x", stream=stream))

    talk(work, house)


def test_faults_have_the_clients_classes() -> None:
    class Full(Stub):
        @asynccontextmanager
        async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
            raise Broken("gone")
            yield

    def denied(client: openai.OpenAI) -> None:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="stub", prompt="x")

    def allowed(client: openai.OpenAI) -> None:
        assert client.completions.create(model="stub", prompt="x").choices[0].text == "x"

    def broken(client: openai.OpenAI) -> None:
        with pytest.raises(openai.InternalServerError, match="gone"):
            client.completions.create(model="full", prompt="x")

    talk(denied, make_house(key=KEY))
    talk(allowed, make_house(key=KEY), KEY.decode())
    talk(broken, make_house({"full": Full("full")}))


@pytest.mark.parametrize(("value", "status"), [(False, 200), (None, 200), (0, 400), (0.0, 400), (True, 400)])
def test_a_number_is_no_false(value: object, status: int) -> None:
    async def ask() -> int:
        async with served() as place:
            answer = await place.client.post("/v1/completions", json={"prompt": "a", "echo": value})
            return answer.status_code

    assert asyncio.run(ask()) == status


def test_a_full_server_is_a_rate_limit() -> None:
    house = make_house({"stub": Stub(slots=1, pause_s=30)}, queue=0)

    def work(client: openai.OpenAI) -> Any:
        with client.completions.create(model="stub", prompt="a b", stream=True), pytest.raises(openai.RateLimitError):
            client.completions.create(model="stub", prompt="x")

    # An empty prompt chunk does not come for texts: the stream is open once its headers are, after the first token.
    house.backends["stub"].pause_s = 0.3  # type: ignore[attr-defined]
    talk(work, house)


def test_the_bounds_of_the_server_are_in_its_schema() -> None:
    house = make_house(limits=Limits(max_tokens=10, n=2))

    def work(client: openai.OpenAI) -> None:
        client.completions.create(model="stub", prompt="x", max_tokens=10, n=2)
        for name, value in (("max_tokens", 11), ("n", 3)):
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(model="stub", prompt="x", **{name: value})  # type: ignore[call-overload]
            assert caught.value.param == name

    talk(work, house)
