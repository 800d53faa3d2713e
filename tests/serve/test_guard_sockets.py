"""Raw connections: slow, half-open, broken, too many, reading nothing."""

import asyncio
import gzip
import json
import socket

import pytest
from benchmarks.serving.stub import Stub
from place import Place, head, make_house, served, until

from kinkajou.serve.limits import Limits

BODY = json.dumps({"text": "a b c"}).encode()
JSON = "Content-Type: application/json"
LENGTH = f"Content-Length: {len(BODY)}"
QUICK = Limits(head_s=0.2, body_s=0.2, idle_s=0.2, send_s=0.3, head_bytes=4096, body_bytes=20_000)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (b"", 408),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", 408),
        (head("/echo", JSON, "Content-Length: 10") + b"{", 408),
        (head("/echo", JSON, "Transfer-Encoding: chunked") + b"5\r\nab", 408),
        (head("/echo", JSON, "Content-Length: 10", "Expect: 100-continue"), 100),
    ],
)
def test_slow_senders_are_told_and_ended(sent: bytes, wanted: int) -> None:
    async def ask() -> bytes:
        async with served(make_house(limits=QUICK)) as place:
            answer = await place.raw(sent)
            await until(lambda: not place.server.server_state.connections)
            return answer

    answer = asyncio.run(ask())
    assert status(answer) == wanted
    assert wanted != 100 or b" 408 " in answer


def test_an_idle_connection_is_ended_without_a_word() -> None:
    async def ask() -> bytes:
        async with served(make_house(limits=QUICK)) as place:
            return await place.raw(head("/health", method="GET"))

    answer = asyncio.run(ask())
    assert status(answer) == 200
    assert answer.count(b"HTTP/1.1") == 1


NO_HTTP = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    b"NONSENSE\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Header: 1\r\n\r\n",
    b"GET /hea\0lth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    head("/echo", JSON, "Content-Length: x") + BODY,
    head("/echo", JSON, "Content-Length: -1") + BODY,
    head("/echo", JSON, LENGTH, "Content-Length: 3") + BODY,
    head("/echo", JSON, "Transfer-Encoding: chunked") + b"zz\r\nabc\r\n",
    head("/echo", JSON, "Transfer-Encoding: gzip, chunked") + gzip.compress(BODY),
)


def test_what_is_no_http_is_refused() -> None:
    async def ask() -> list[bytes]:
        async with served(make_house(limits=QUICK)) as place:
            return [await place.raw(sent) for sent in NO_HTTP]

    for sent, answer in zip(NO_HTTP, asyncio.run(ask()), strict=True):
        assert status(answer) in (400, 501), sent
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"], sent


def test_a_head_without_end_is_refused() -> None:
    async def ask() -> bytes:
        async with served(make_house(limits=QUICK)) as place:
            return await place.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " + b"a" * 100_000)

    answer = asyncio.run(ask())
    assert status(answer) == 431
    assert b"x-content-type-options: nosniff" in answer


def test_a_body_without_end_is_answered_while_it_comes() -> None:
    async def ask() -> bytes:
        async with served(make_house(limits=QUICK)) as place:
            reader, writer = await place.line(head("/echo", JSON, "Transfer-Encoding: chunked"))
            sending = asyncio.create_task(pour(writer))
            answer = await asyncio.wait_for(reader.read(), 10)
            sending.cancel()
            writer.close()
            return answer

    assert status(asyncio.run(ask())) == 413


def test_a_refusal_reaches_a_client_that_sends_first_and_reads_then() -> None:
    """A socket that is closed over unread bytes is reset, and the answer is lost with it."""

    async def ask() -> bytes:
        async with served(make_house(limits=QUICK)) as place:
            reader, writer = await place.line(head("/echo", JSON, "Content-Length: 400000"))
            for _ in range(20):
                writer.write(b" " * 20_000)
                await writer.drain()
                await asyncio.sleep(0.005)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return answer

    assert status(asyncio.run(ask())) == 413


async def pour(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


def test_old_and_pipelined_requests() -> None:
    async def ask() -> tuple[bytes, bytes]:
        async with served(make_house(limits=QUICK)) as place:
            old = await place.raw(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            many = await place.raw((head("/echo", JSON, LENGTH) + BODY) * 3 + head("/health", method="GET"))
            return old, many

    old, many = asyncio.run(ask())
    assert status(old) == 200
    assert many.count(b"HTTP/1.1 200 OK") == 4
    assert many.count(b"a b c") == 3


def test_length_and_chunks_at_once_are_no_way_in() -> None:
    """Two readings of one request: the chunked one holds (RFC 9112, 6.3), and what follows is no second request."""

    async def ask() -> bytes:
        async with served(make_house(limits=QUICK)) as place:
            chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
            return await place.raw(head("/echo", JSON, "Content-Length: 3", "Transfer-Encoding: chunked") + chunk)

    answer = asyncio.run(ask())
    assert status(answer) in (200, 400)
    assert answer.count(b"HTTP/1.1") == 1


def test_connections_are_bounded_and_come_free() -> None:
    async def ask() -> None:
        async with served(make_house(limits=Limits(connections=3))) as place:
            lines = [await place.line() for _ in range(3)]
            await until(lambda: len(place.server.server_state.connections) == 3)
            refused = await place.raw()
            assert status(refused) == 503
            assert b"too_many_connections" in refused
            for _, writer in lines:
                writer.close()
            await until(lambda: not place.server.server_state.connections)
            assert status(await place.raw(head("/health", "Connection: close", method="GET"))) == 200

    asyncio.run(ask())


def ask_long(stream: bool) -> bytes:
    body = json.dumps({"text": " ".join("word" for _ in range(4000)), "stream": stream}).encode()
    return head("/echo", JSON, f"Content-Length: {len(body)}") + body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("abort", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream: bool, abort: bool) -> None:
    async def ask() -> None:
        stub = Stub(pause_s=0.01, slots=1)
        async with served(make_house({"stub": stub}, queue=1)) as place:
            lines = [await place.line(ask_long(stream)), await place.line(ask_long(stream))]
            await until(lambda: (stub.running, stub.waiting) == (1, 1))
            for _, writer in lines:
                if abort:
                    writer.transport.abort()
                writer.close()
            await until(lambda: (stub.running, stub.waiting, len(place.house.desk.tickets)) == (0, 0, 0))
            assert not place.house.desk.by_client
            assert "kinkajou_disconnects_total 2.0" in place.house.metrics.text().decode()

    asyncio.run(ask())


def test_a_client_that_reads_nothing_is_cut() -> None:
    async def ask() -> None:
        stub = Stub(slots=1, context=10**6)
        house = make_house({"stub": stub}, limits=Limits(send_s=0.2, send_buffer_bytes=8192, body_bytes=5_000_000))
        async with served(house) as place:
            deaf = socket.socket()
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", place.port))
            body = json.dumps({"text": "word " * 100_000, "stream": True}).encode()
            loop = asyncio.get_running_loop()
            deaf.setblocking(False)
            await loop.sock_sendall(deaf, head("/echo", JSON, f"Content-Length: {len(body)}") + body)
            await until(lambda: stub.running == 1)
            await until(lambda: stub.running == 0)
            await until(lambda: not place.server.server_state.connections)
            deaf.close()
            assert await quiet(place) == 200

    asyncio.run(ask())


async def quiet(place: Place) -> int:
    return (await place.client.get("/ready")).status_code


def test_slow_connections_do_not_hold_up_others() -> None:
    async def ask() -> None:
        async with served() as place:
            lines = [await place.line(b"GET / HT") for _ in range(100)]
            answers = [await place.client.post("/echo", json={"text": "a b"}) for _ in range(20)]
            assert [answer.json() for answer in answers] == [{"text": "a b"}] * 20
            for _, writer in lines:
                writer.close()

    asyncio.run(ask())


def test_no_task_is_left() -> None:
    async def ask() -> None:
        async with served() as place:
            await place.client.post("/echo", json={"text": "a"})
            before = len(asyncio.all_tasks())
            for i in range(30):
                await place.client.post("/echo", json={"text": "a b", "stream": bool(i % 2)})
                reader, writer = await place.line(ask_long(True))
                await reader.readline()
                writer.transport.abort()
            await until(lambda: len(asyncio.all_tasks()) <= before)
            await until(lambda: len(place.server.server_state.connections) == 1)

    asyncio.run(ask())
