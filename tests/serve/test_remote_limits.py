"""`--backend` at its edges: what is wrong with it is said in a sentence, and its limits hold."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from other_server import Answer, delta, reply, stream, wire
from place import make_house, served

from kinkajou.config import DoorConfig, HostingConfig, ServeConfig
from kinkajou.errors import UserError
from kinkajou.serve.limits import Limits
from kinkajou.serve.remote import RemoteBackend, remote_backends
from kinkajou.serve.remote_address import backend_key, root_of
from kinkajou.serve.remote_wire import seconds_of
from kinkajou.serve.start import named, parts_of

USER = {"messages": [{"role": "user", "content": "a"}]}


def models(*ids: str) -> bytes:
    return reply(200, json.dumps({"data": [{"id": name} for name in ids]}).encode())


def fault_with(answer: Answer, *, names: tuple[str, ...] = (), **words: Any) -> UserError:
    async def once() -> UserError:
        async with wire(answer) as url:
            with pytest.raises(UserError) as caught:
                await remote_backends(url, names=names, **words)
            return caught.value

    return asyncio.run(once())


# --- what is wrong with the address, the key, the server --------------------------------------------------


@pytest.mark.parametrize("names", [(), ("mine",)])
def test_a_server_that_is_not_there(names: tuple[str, ...]) -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot be reached") as caught:
            asyncio.run(remote_backends(url, names=names))
    assert caught.value.evidence == "Connection refused"
    assert caught.value.exit_code == 5


def test_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot be reached") as caught:
        asyncio.run(remote_backends("http://nowhere.example"))
    assert "Name or service not known" in caught.value.evidence


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused(status: int) -> None:
    fault = fault_with(lambda head, asked: reply(status, b"{}"))
    assert "refuses the key" in fault.evidence
    assert "KINKAJOU_BACKEND_KEY" in fault.fix


def test_a_key_that_is_refused_later() -> None:
    def answer(head: str, asked: dict[str, Any]) -> bytes:
        return models("m") if head.startswith("GET") else reply(401, b"{}")

    async def once() -> None:
        async with wire(answer) as url:
            backend = (await remote_backends(url))["m"]
            with pytest.raises(UserError, match="refuses the key") as caught:
                await backend.start()
            assert "KINKAJOU_BACKEND_KEY" in caught.value.fix

    asyncio.run(once())


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (reply(500, b"Traceback"), "HTTP 500"),
        (reply(200, b"<html>"), "JSON"),
        (reply(200, b'{"data": 3}'), "a list of models"),
        (reply(200, b"x" * 1_100_000), "1,000,000 bytes"),
        (models("\x1b"), "no name"),
    ],
)
def test_why_there_is_no_list_is_said(answer: bytes, seen: str) -> None:
    fault = fault_with(lambda head, asked: answer)
    assert "does not list its models" in fault.problem
    assert seen in fault.evidence
    assert fault.evidence.isprintable()


@pytest.mark.parametrize("key", ["clé", "abc\n", "abc\r\nX: y", " ", "a b", "\udcff", "x" * 8193])
def test_what_is_no_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="KINKAJOU_BACKEND_KEY is no key"):
        asyncio.run(remote_backends("http://127.0.0.1:1", key))
    monkeypatch.setattr(os, "environ", {"KINKAJOU_BACKEND_KEY": key})
    with pytest.raises(UserError, match="KINKAJOU_BACKEND_KEY is no key") as caught:
        named([], HostingConfig(backend="http://127.0.0.1:1"))  # before the port is taken
    assert caught.value.exit_code == 2
    assert len(key) < 4 or key not in str(caught.value)


@pytest.mark.parametrize("key", ["", "none", "x" * 2000])
def test_keys_of_other_servers_have_lengths_of_their_own(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINKAJOU_BACKEND_KEY", key)
    assert backend_key() == key


@pytest.mark.parametrize(
    "url",
    [
        "http://☃.example",
        "http://a\0",
        "http://a b:80",
        "http://ex ample",
        "http://a%20b",
        "http://a\\b",
        "http://\udcff",
        "http://h/\udcff",
    ],
)
def test_hosts_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="is no address") as caught:
        root_of(url)
    assert str(caught.value).encode()


@pytest.mark.parametrize("url", ["http://bücher.example/", "http://[fe80::1%25eth0]:80", "http://a_b", "http://h/é ü"])
def test_hosts_that_are_some(url: str) -> None:
    assert root_of(url).endswith("/v1/")


# --- names of its models ----------------------------------------------------------------------------------


def test_names_that_a_terminal_cannot_take_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = ("m\x1b[2J\x1b]0;pwned\x07", "\ud83d", "a\u202eb", "x" * 201, "")

    async def once() -> list[str]:
        async with wire(lambda head, asked: models(*hostile, "org/good-1", "bücher")) as url:
            return list(await remote_backends(url))

    assert asyncio.run(once()) == ["org/good-1", "bücher"]
    said = capsys.readouterr().err
    assert "5 models have no printable name and are left out" in said
    assert r"m\x1b[2J\x1b]0;pwned\x07" in said
    assert said.removesuffix("\n").isprintable()


def test_models_beyond_the_bound_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    async def once() -> int:
        async with wire(lambda head, asked: models(*(f"m{i}" for i in range(70)))) as url:
            return len(await remote_backends(url))

    assert asyncio.run(once()) == 64
    assert "of 70 models that are listed the first 64 are taken" in capsys.readouterr().err


def test_a_name_that_is_asked_for_has_to_be_printable() -> None:
    for name in ("\udcff", "a\x1b[2J", ""):
        fault = fault_with(lambda head, asked: models("m"), names=(name,))
        assert "is no name of a model" in fault.problem
        assert str(fault).encode()


# --- how long an answer may be ----------------------------------------------------------------------------


@asynccontextmanager
async def before(answer: Answer, *, limits: Limits | None = None, **words: Any) -> AsyncIterator[Any]:
    async with wire(answer) as url:
        backend = RemoteBackend("m", url, **words)
        backend.phase = "ready"

        async def start() -> None:
            """It is."""

        backend.start = start  # type: ignore[method-assign]
        async with served(make_house({"m": backend}, limits=limits)) as place:
            yield place.client
        await backend.close()


def lengths_asked(limit: int | None, body: dict[str, Any], answer: Answer | None = None) -> tuple[list[Any], int]:
    """The max_tokens of each request to the other server, and our own answer's status."""
    asks = list[Any]()

    def noting(head: str, asked: dict[str, Any]) -> bytes:
        asks.append(asked.get("max_tokens"))
        return answer(head, asked) if answer else stream(delta("x", "stop"))

    async def once() -> int:
        async with before(noting, max_tokens=limit) as client:
            return int((await client.post("/v1/chat/completions", json=USER | body)).status_code)

    status = asyncio.run(once())
    return asks, status


def test_a_limit_bounds_requests_that_name_no_length() -> None:
    assert lengths_asked(64, {}) == ([64], 200)
    assert lengths_asked(64, {"n": 2}) == ([64, 64], 200)
    assert lengths_asked(64, {"max_tokens": 5}) == ([5], 200)
    assert lengths_asked(None, {}) == ([None], 200)


def test_a_limit_that_does_not_fit_behind_the_prompt_is_left_to_the_context() -> None:
    def answer(head: str, asked: dict[str, Any]) -> bytes:
        if asked.get("max_tokens", 0) > 10:
            return reply(400, b'{"error": {"message": "max_tokens is too large: maximum context length is 16"}}')
        return stream(delta("x", "length"))

    assert lengths_asked(64, {}, answer) == ([64, None], 200)
    assert lengths_asked(64, {"max_tokens": 20}, answer) == ([20], 400)  # a client's own number is never changed
    full = lengths_asked(64, {}, lambda head, asked: reply(400, b'{"error": {"message": "context length"}}'))
    assert full == ([64, None], 400)


def test_the_limit_of_the_command_line_arrives() -> None:
    def limit_of(door: DoorConfig) -> int | None:
        async def once() -> int | None:
            async with wire(lambda head, asked: models("m")) as url:
                backends, _ = await parts_of({}, ServeConfig(hosting=HostingConfig(backend=url), door=door))
                backend = backends["m"]
                assert isinstance(backend, RemoteBackend)
                assert backend.client.timeout.read == backend.deadline_s == door.deadline_s
                await backend.close()
                return backend.max_tokens

        return asyncio.run(once())

    assert limit_of(DoorConfig(max_new_tokens=64, deadline_s=600)) == 64
    assert limit_of(DoorConfig()) is None


# --- settings that another server cannot take -------------------------------------------------------------


def test_settings_of_a_hosted_model_are_refused_together() -> None:
    url = "http://127.0.0.1:1"
    given: dict[str, Any] = {"bits": 4, "slots": 2, "context": 64, "template": "plain", "dtype": "bf16", "threads": 3}
    with pytest.raises(UserError) as caught:
        HostingConfig(backend=url, **given)
    assert caught.value.problem.startswith("--bits, --dtype, --slots, --context, --threads, --template: with --backend")
    HostingConfig(**given)
    HostingConfig(backend=url, queue=3, words="w", safe_answer="no")
    # A reward model beside it is hosted here.
    HostingConfig(backend=url, reward="r", dtype="bf16", threads=3, template="plain")
    with pytest.raises(UserError, match="--slots: with --backend"):
        HostingConfig(backend=url, reward="r", slots=3)


def test_a_safe_answer_without_a_filter_is_refused() -> None:
    for more in ({}, {"backend": "http://127.0.0.1:1"}):
        with pytest.raises(UserError, match="--safe_answer is for a word filter"):
            HostingConfig(safe_answer="no", **more)


# --- how long it may take ---------------------------------------------------------------------------------


@asynccontextmanager
async def chatter(part: bytes) -> AsyncIterator[str]:
    """A server that says something all the time and never comes to an end."""

    talks = set[asyncio.Task[None] | None]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\ncontent-length: 999999\r\n\r\n")
        with suppress(ConnectionError, asyncio.CancelledError), closing(writer):
            while True:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        running = [talk for talk in talks if talk]
        for talk in running:
            talk.cancel()
        await asyncio.gather(*running)


def test_a_start_that_never_ends_is_ended() -> None:
    async def once() -> None:
        async with chatter(b": still here\n\n") as url, asyncio.timeout(5):
            with pytest.raises(UserError, match="no token") as caught:
                await RemoteBackend("m", url, deadline_s=0.3).start()
            assert caught.value.evidence == "none within 0.3 s"
            assert "--deadline-s" in caught.value.fix
            assert caught.value.exit_code == 5

    asyncio.run(once())


def test_a_list_that_never_ends_is_ended() -> None:
    async def once() -> None:
        async with chatter(b" ") as url, asyncio.timeout(5):
            with pytest.raises(UserError, match="does not list its models") as caught:
                await remote_backends(url, deadline_s=0.3)
            assert caught.value.evidence == "no list within 0.3 s"
            found = await remote_backends(url, names=["mine"], deadline_s=0.3)
            await found["mine"].close()

    asyncio.run(once())


# --- a server that is full --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("extra", "wait"), [("", None), ("retry-after: 7\r\n", "7"), ("retry-after: soon\r\n", None)])
def test_no_room_there_is_no_room_here(extra: str, wait: str | None, stream: bool) -> None:
    async def once() -> None:
        async with before(lambda head, asked: reply(429, b"{}", extra=extra)) as client:
            for path, body in (("/v1/chat/completions", USER), ("/v1/completions", {"prompt": "a"})):
                answer = await client.post(path, json=body | {"stream": stream})
                assert answer.status_code == 429
                assert answer.headers.get("retry-after") == wait
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "backend_busy")
            figures = (await client.get("/metrics")).text
            assert 'kinkajou_jobs_total{model="m",outcome="busy"} 2.0' in figures

    asyncio.run(once())


def test_when_to_come_again() -> None:
    assert seconds_of("0") == 1
    assert seconds_of("17") == 17
    assert seconds_of(formatdate(time.time() - 60, usegmt=True)) == 1
    assert seconds_of(formatdate(time.time() + 60, usegmt=True)) in (59, 60, 61)
    for word in (
        "",
        " ",
        "-1",
        "1.5",
        "x" * 9,
        "9" * 400,
        "Mon, 99 Foo 9999 99:99:99 GMT",
        "Mon, 01 Jan 0001 00:00:00",
    ):
        assert seconds_of(word) in (None, 1)


def test_an_error_without_an_end_is_the_servers_fault() -> None:
    async def once() -> None:
        async with before(lambda head, asked: reply(500, b"x" * 1_100_000)) as client:
            answer = await client.post("/v1/chat/completions", json=USER)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")

    asyncio.run(once())


def test_the_command_ends_with_a_sentence(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "kinkajou", "serve", "--port", "0", "--backend", "http://127.0.0.1:1", "--slots", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: --slots: with --backend")
