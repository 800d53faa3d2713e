"""The tools of benchmarks.serving: they decode as RFC 9112 says, and they find what is wrong."""

import asyncio
import json
import math

import pytest
from benchmarks.serving import figures, load, memory, overload, servers
from benchmarks.serving.client import HOST, Answer, Cut, Decoder, Line, Mangled, connect, request
from benchmarks.serving.drain import end_of
from benchmarks.serving.traffic import Crowd, good, lost

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_a_chunked_answer_is_put_together_however_it_comes(step: int) -> None:
    decoder, whole = Decoder(), [False]
    for i in range(0, len(CHUNKED), step):
        whole.append(decoder.feed(CHUNKED[i : i + step]))
    assert whole[-1]
    assert not any(whole[:-1])
    assert decoder.answer is not None
    assert (decoder.answer.status, decoder.answer.body) == (200, b"hello world")


def test_what_follows_an_answer_is_not_taken_into_it() -> None:
    decoder = Decoder()
    assert decoder.feed(b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nabHTTP/1.1")
    assert decoder.answer is not None
    assert decoder.answer.body == b"ab"
    assert bytes(decoder.pending) == b"HTTP/1.1"


@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd"]
)
def test_what_is_no_answer_is_said(data: bytes) -> None:
    with pytest.raises(Mangled):
        Decoder().feed(data)


async def told(says: bytes, ask: "object") -> "object":
    """What comes of asking a server that says these bytes to everything and closes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(says)
        writer.close()

    async with await asyncio.start_server(talk, HOST, 0) as server:
        return await ask(server.sockets[0].getsockname()[1])  # type: ignore[operator]


def test_an_answer_that_breaks_off_is_a_loss() -> None:
    async def ask(port: int) -> Line:
        line = await connect(port)
        with pytest.raises(Cut):
            await line.ask(request("GET", "/"))
        return line

    asyncio.run(told(CHUNKED[:-3], ask))


def test_a_crowd_counts_what_was_lost() -> None:
    async def ask(port: int) -> tuple[int, int]:
        sent = await Crowd(port).closed(2, lambda i: request("GET", f"/{i}"), requests=6)
        return len(good(sent)), lost(sent)

    answer = CHUNKED.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
    assert asyncio.run(told(answer, ask)) == (6, 0)
    assert asyncio.run(told(answer[:-1], ask)) == (0, 6)


def stream(*events: object, end: bytes = b"data: [DONE]\n\n") -> Answer:
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return Answer(200, {}, body + end)


def piece(text: str, finish: str | None = None, name: str = "a", index: int = 0) -> dict[str, object]:
    return {"id": name, "choices": [{"index": index, "text": text, "finish_reason": finish}]}


def test_a_stream_is_put_together_by_choice() -> None:
    answer = stream(piece("x"), piece("p", index=1), piece("y", "stop"), piece("q", "length", index=1))
    name, choices, _ = load.of_stream(answer)
    assert name == "a"
    assert [(choice["text"], choice["finish"]) for choice in choices] == [("xy", "stop"), ("pq", "length")]


@pytest.mark.parametrize(
    "answer",
    [
        stream(piece("x", "stop"), end=b""),
        stream(piece("x", "stop"), piece("again")),
        stream(piece("x"), piece("y", "stop", name="b")),
        stream(piece("x"), {"error": {"message": "no"}}),
        stream(piece("x", "stop"), end=b"data: [DONE]\n\ndata: [DONE]\n\n"),
    ],
)
def test_streams_that_are_not_as_streams_are(answer: Answer) -> None:
    with pytest.raises(ValueError, match=r"."):
        load.of_stream(answer)


def test_answers_of_others_are_told_from_answers_that_differ() -> None:
    wanted = load.material(3, seed=0)
    campaign = load.Campaign(0, wanted, 0)
    own = [[{"text": text, "finish": "stop", "logprobs": None}] for text in ("one", "two", "three")]
    campaign.alone = [(choices, 1) for choices in own]
    campaign.where = {json.dumps([choices[0]["text"]]): i for i, choices in enumerate(own)}
    for given in (own[0], own[1], [{**own[0][0], "text": "ones"}], [{**own[0][0], "finish": "length"}]):
        campaign.compare(0, given, 1)
    assert (campaign.counts.different, campaign.counts.foreign) == (3, 1)
    assert len({item.canary for item in wanted}) == 3


def test_gaps_of_logprobs() -> None:
    assert load.gap({"a": [1.0, None, "x"]}, {"a": [1.5, None, "x"]}) == 0.5
    assert load.gap({"a": [1.0]}, {"a": [1.0, 2.0]}) == math.inf
    assert load.gap("x", "y") == math.inf


def test_ends_of_streams_under_a_drain() -> None:
    assert end_of(stream({"choices": [{"finish_reason": "stop"}]})) == "done"
    assert end_of(stream({"choices": []}, {"error": {}}, end=b"")) == "error event"
    assert end_of(Answer(503, {})) == "refused"
    assert end_of(stream({"choices": [{"finish_reason": None}]}, end=b"")).startswith("cut")
    assert end_of(Cut("closed")).startswith("cut")


def looks(*values: float) -> list[dict[str, object]]:
    seen = {"handles": 5, "threads": 2}
    return [{"requests": 250 * i, "server": {"rss_mb": value, **seen}} for i, value in enumerate(values)]


def test_a_leak_has_a_slope_and_noise_has_none() -> None:
    noise = (0.1, -0.1, 0.05, -0.05, 0.1, -0.1, 0.05, -0.05) * 3
    assert memory.drift(looks(*(60 + x for x in noise)), "server")["covers_zero"]
    leak = memory.drift(looks(*(60 + x + 0.05 * i for i, x in enumerate(noise))), "server")
    assert not leak["covers_zero"]
    assert leak["slope_mb_per_1000"] == pytest.approx(0.2, abs=0.03)


def test_quantiles_and_slopes_by_hand() -> None:
    assert figures.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert figures.quantile(list(range(1, 101)), 0.99) == 99
    # y = 1, 3, 2, 4 at x = 0..3: slope 0.8, residual variance 0.9, error of the slope sqrt(0.9 / 5), t = 4.30
    rise, half = figures.slope([0, 1, 2, 3], [1, 3, 2, 4])
    assert (rise, half) == pytest.approx((0.8, 4.30 * math.sqrt(0.9 / 5)))


def test_goodput_counts_whole_answers_within_the_time() -> None:
    answer = Answer(200, {})
    ends = [(0.5, answer), (1.0, answer), (2.9, answer), (3.0, answer), (2.0, Answer(429, {})), (2.0, None)]
    sent = [overload.Sent(0, 0.0, end, found) for end, found in ends]
    assert overload.goodput(sent, began=1.0, seconds=2.0) == 1.0


def test_samples_of_prometheus_are_added_up_by_name() -> None:
    text = '# HELP x y\nx{model="a b"} 2.0\nx{model="c"} 3\nkinkajou_tasks 4.0\n'
    assert servers.samples(text) == {"x": 5.0, "kinkajou_tasks": 4.0}
