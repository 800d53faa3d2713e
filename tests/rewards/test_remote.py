"""A reward service: a stub on this machine that is well, slow, broken or gone."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from answers import answer

from kinkajou import exchange
from kinkajou.errors import UserError
from kinkajou.rewards import remote
from kinkajou.rewards.remote import Service

ANSWERS = [
    answer("one", "first?", answer=1),
    answer("three", "second?", ended=False, day=float("nan")),
    answer("", "third?"),
]
Reply = tuple[int, Any, dict[str, str]]


class Stub:
    """Replies with `replies` in turn, the last of them for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: list[Callable[[Any], Reply]] = []
        self.asked: list[Any] = []
        self.hold = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(asked)
                reply = stub.replies[min(len(stub.asked), len(stub.replies)) - 1]
                status, body, headers = reply(asked)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/rewards"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.hold.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    yield made
    made.close()


def lengths(asked: Any) -> Reply:
    return 200, {"scores": [{"id": s["id"], "score": len(s["response"])} for s in asked["samples"]]}, {}


def says(body: Any, status: int = 200, **headers: str) -> Callable[[Any], Reply]:
    return lambda asked: (status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def service(
    stub: Stub, *replies: Callable[[Any], Reply], retries: int = 2, **options: Any
) -> tuple[Service, list[float]]:
    stub.replies = list(replies)
    pauses: list[float] = []
    return Service(stub.url, timeout_s=options.pop("timeout_s", 5.0), retries=retries, sleep=pauses.append), pauses


def test_what_is_asked_and_answered(stub: Stub) -> None:
    made, pauses = service(stub, lengths)
    assert made(ANSWERS) == [3, 5, 0]
    first, second, _ = stub.asked[0]["samples"]
    assert first == {
        "id": 0,
        "prompt": "first?",
        "messages": [{"role": "user", "content": "first?"}],
        "response": "one",
        "ended": True,
        "meta": {"answer": 1},
    }
    assert second["meta"] == {"day": None}  # JSON has no NaN
    assert second["ended"] is False
    assert pauses == []


def test_answers_out_of_order_are_matched_by_id(stub: Stub) -> None:
    def backwards(asked: Any) -> Reply:
        status, body, headers = lengths(asked)
        return status, {"scores": body["scores"][::-1]}, headers

    assert service(stub, backwards)[0](ANSWERS) == [3, 5, 0]


@pytest.mark.parametrize("body", [[0.5, -1, 2e3], {"scores": [0.5, -1, 2e3]}])
def test_bare_numbers_are_taken_in_order(stub: Stub, body: Any) -> None:
    assert service(stub, says(body))[0](ANSWERS) == [0.5, -1, 2000]


def test_a_service_that_comes_back_is_asked_again(stub: Stub) -> None:
    made, pauses = service(stub, says("down", 500), says("busy", 429), lengths)
    assert made(ANSWERS) == [3, 5, 0]
    assert len(stub.asked) == 3
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0


def test_a_pause_that_the_service_asks_for(stub: Stub) -> None:
    made, pauses = service(stub, says("busy", 429, Retry_After="3"), says("busy", 503, Retry_After="3600"), lengths)
    made(ANSWERS)
    assert pauses == [3.0, 5.0]  # no longer than the timeout


def test_a_date_to_come_back_at() -> None:
    then = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 95 < remote.seconds_named(then) <= 100
    assert remote.seconds_named("soon") == remote.seconds_named("") == 0
    assert remote.seconds_named("Thu, 01 Jan 1970 00:00:00 GMT") == 0


def test_a_service_that_stays_down(stub: Stub) -> None:
    made, pauses = service(stub, says({"error": "no memory"}, 500))
    with pytest.raises(UserError) as caught:
        made(ANSWERS)
    assert caught.value.exit_code == 5
    for word in (stub.url, "3 tries", "HTTP 500", "no memory"):
        assert word in str(caught.value)
    assert len(stub.asked) == 3
    assert len(pauses) == 2


@pytest.mark.parametrize("status", [400, 404, 301])
def test_a_refusal_stops_at_once_and_no_redirect_is_followed(stub: Stub, status: int) -> None:
    made, pauses = service(stub, says("not here", status, Location="/elsewhere"))
    with pytest.raises(UserError, match=f"refuses the request(.|\n)*HTTP {status}") as caught:
        made(ANSWERS)
    assert caught.value.exit_code == 5
    assert (len(stub.asked), pauses) == (1, [])


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(UserError, match=r"1 try, the last: .*refused") as caught:
        Service(url, timeout_s=1, retries=0)(ANSWERS)
    assert caught.value.exit_code == 5


def test_a_service_that_hangs_is_given_up(stub: Stub) -> None:
    def hang(asked: Any) -> Reply:
        stub.hold.wait(20)
        return lengths(asked)

    made, _ = service(stub, hang, retries=1, timeout_s=0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"2 tries, the last: timed out"):
        made(ANSWERS)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("part", ["connection", "status", "headers", "body"])
def test_a_service_that_drips_is_given_up(part: str) -> None:
    """Each byte comes in time, the reply does not; the first one listens and says nothing at all."""
    before = {"headers": b"HTTP/1.1 200 OK\r\n", "body": b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n"}
    piece = {"status": b"H", "headers": b"X: y\r\n", "body": b"["}.get(part, b"")
    stop = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(before.get(part, b""))
            while not stop.wait(0.05):
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(UserError, match=r"1 try, the last: timed out after 0.4 s") as caught:
            Service(url, timeout_s=0.4, retries=0)(ANSWERS)
        assert 0.4 <= time.monotonic() - began < 1.5
        stop.set()
        thread.join()
    assert caught.value.exit_code == 5


def test_a_connection_cut_short_is_tried_again(stub: Stub) -> None:
    made, pauses = service(stub, says(b'{"scores": [1, 2, 3', Content_Length="500"), lengths, timeout_s=0.5)
    assert made(ANSWERS) == [3, 5, 0]
    assert len(pauses) == 1


def scored(*items: Any) -> dict[str, Any]:
    return {"scores": list(items)}


def one(i: Any, score: Any = 1.0) -> dict[str, Any]:
    return {"id": i, "score": score}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", ("no sound JSON", "<html>")),
        (b"", ("no sound JSON",)),
        (b"\xff\xfe", ("no sound JSON",)),
        (b'{"scores": [1, 2, NaN]}', ("NaN is not JSON",)),
        (b'{"scores": [1, 2, 3], "scores": []}', ("given twice",)),
        (b"[" * 5_000, ("no sound JSON",)),
        ({"score": [1, 2, 3]}, ("no list of scores but null",)),
        ("fine", ("no list of scores but text",)),
        (scored(1, 2), ("wrong number of scores", "2 for 3")),
        (scored(), ("0 for 3",)),
        (scored(one(0), one(1), one(1)), ("sample 1 twice", "second?")),
        (scored(one(0), one(1), one(3)), ("not asked about",)),
        (scored(one(0), one(1), one("2")), ("not asked about",)),
        (scored(one(0), one(1), one(True)), ("not asked about",)),
        (scored(one(0), one(1), 3), ("not asked about",)),
        (scored(one(0), one(1), {"id": 2}), ("no score for sample 2", "third?")),
        (scored(one(0), one(1, None), one(2)), ("None instead of a number", "second?", "prompts.jsonl:7")),
        (scored(one(0), one(1, "4"), one(2)), ("instead of a number", "second?")),
        (scored(1, True, 2), ("True instead of a number", "second?")),
        (b"[1, 1" + b"0" * 400 + b", 2]", ("instead of a number", "second?")),
    ],
)
def test_garbage_is_named(stub: Stub, body: Any, words: tuple[str, ...]) -> None:
    made, pauses = service(stub, says(body))
    with pytest.raises(UserError) as caught:
        made(ANSWERS)
    for word in (stub.url, *words):
        assert word in str(caught.value)
    assert pauses == []


def test_a_flood_is_cut_off(stub: Stub) -> None:
    made, _ = service(stub, says(b"[" + b" " * 200_000 + b"]"))
    with pytest.raises(UserError, match="sends too much"):
        made(ANSWERS)


def test_this_machine_is_asked_without_a_proxy(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    monkeypatch.delenv("no_proxy", raising=False)
    assert service(stub, lengths)[0](ANSWERS) == [3, 5, 0]
    assert not exchange.is_loopback("example.org")
    assert all(map(exchange.is_loopback, ("localhost", "127.3.2.1", "::1")))
