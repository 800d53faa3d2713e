"""Hosts, origins, content types, lengths: what is refused before a route sees it."""

import asyncio
import json
import logging

import httpx
import pytest
from benchmarks.serving.stub import Stub
from place import KEY, make_house, served, told_app

from kinkajou.serve.gate import Visitor, check_host
from kinkajou.serve.house import House
from kinkajou.serve.limits import Limits
from kinkajou.serve.problems import Problem

JSON = {"content-type": "application/json"}


def asked(method: str, path: str, *, house: House | None = None, **words: object) -> httpx.Response:
    async def ask() -> httpx.Response:
        made = house or make_house()
        for backend in made.backends.values():
            await backend.start()
        transport = httpx.ASGITransport(app=told_app(made), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7070") as client:
            return await client.request(method, path, **words)  # type: ignore[arg-type]

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("127.0.0.1", 200), ("localhost:7070", 200), ("LOCALHOST", 200), ("localhost.", 200), ("[::1]:7070", 200)),
        *(("chat.example.org", 200), ("chat.example.org:99", 200), ("port.example.org:8443", 200)),
        *(
            ("port.example.org", 421),
            ("port.example.org:1", 421),
            ("evil.example", 421),
            ("127.0.0.1.evil.example", 421),
        ),
        *(("localhost.evil.example", 421), ("169.254.169.254", 421), ("xlocalhost", 421), ("0x7f.1", 421)),
        *(("", 400), ("a b", 400), ("localhost:x", 400), ("user@localhost", 400), ("localhost/..", 400), ("[::1", 400)),
    ],
)
def test_hosts(host: str, status: int) -> None:
    house = make_house(hosts=frozenset({"chat.example.org", "port.example.org:8443"}))
    answer = asked("GET", "/health", house=house, headers={"host": host})
    assert answer.status_code == status


OWN, FRIEND = "http://127.0.0.1:7070", "https://chat.example.org"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": OWN}, 200),
        ({"origin": FRIEND}, 200),
        ({"origin": FRIEND, "sec-fetch-site": "cross-site"}, 200),
        ({"origin": "http://chat.example.org"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": f"{OWN}/"}, 403),
        ({"origin": "http://evil@127.0.0.1:7070"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 403),
        ({"origin": OWN, "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_origins(headers: dict[str, str], status: int) -> None:
    house = make_house(origins=frozenset({FRIEND}))
    answer = asked("POST", "/echo", house=house, headers=JSON | headers, content=b'{"text": "a b"}')
    assert answer.status_code == status
    shared = answer.headers.get("access-control-allow-origin")
    assert shared == (FRIEND if headers.get("origin") == FRIEND else None)
    assert "access-control-allow-credentials" not in answer.headers


def test_a_link_on_another_page_opens_the_page_and_calls_nothing() -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert asked("GET", "/health", headers=link).status_code == 200
    assert asked("GET", "/health", headers=link | {"sec-fetch-dest": "iframe"}).status_code == 403


def test_a_preflight_of_an_origin_that_is_allowed_needs_no_key() -> None:
    house = make_house(key=KEY, origins=frozenset({FRIEND}))
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = asked("OPTIONS", "/echo", house=house, headers=wish | {"origin": FRIEND})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert answer.headers["access-control-allow-methods"] == "GET, POST"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    asks = "authorization, X-Stainless-Lang, x-stainless-retry-count, x-other, x-stainless-\u00e9"
    wish = wish | {"access-control-request-headers": asks.encode(), "origin": FRIEND}
    told = asked("OPTIONS", "/echo", house=house, headers=wish)
    allowed = told.headers["access-control-allow-headers"].split(", ")
    assert allowed == ["authorization", "content-type", "x-stainless-lang", "x-stainless-retry-count"]
    assert asked("OPTIONS", "/echo", house=house, headers=wish | {"origin": "https://evil.example"}).status_code == 403
    del wish["origin"]
    assert asked("OPTIONS", "/echo", house=house, headers=wish).status_code == 401


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        *(("application/json", 200), ("Application/JSON; charset=UTF-8", 200), ("application/json;", 200)),
        *((None, 415), ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/jsonx", 415)),
        *(("application/json; charset=latin-1", 415), ("text/plain; application/json", 415)),
    ],
)
def test_content_types(kind: str | None, status: int) -> None:
    headers = {"content-type": kind} if kind else {}
    assert asked("POST", "/echo", headers=headers, content=b'{"text": "a"}').status_code == status


def test_a_compressed_body_is_refused() -> None:
    assert asked("POST", "/echo", headers=JSON | {"content-encoding": "gzip"}, content=b"x").status_code == 415


SMALL = Limits(body_bytes=1000, num_headers=20, head_bytes=4000, path_bytes=100, query_bytes=100)


@pytest.mark.parametrize(
    ("path", "headers", "size", "status"),
    [
        ("/echo", {}, 1000, 200),
        ("/echo", {}, 1001, 413),
        ("/echo", {}, 100_000, 413),
        ("/echo", {f"x-{i}": "1" for i in range(30)}, 100, 431),
        ("/echo", {"x-long": "1" * 5000}, 100, 431),
        ("/" + "a" * 100, {}, 100, 414),
        ("/echo?" + "a" * 101, {}, 100, 414),
    ],
)
def test_lengths(path: str, headers: dict[str, str], size: int, status: int) -> None:
    body = json.dumps({"text": ""}).encode()
    body = body[:-2] + b"a" * (size - len(body)) + body[-2:]
    answer = asked("POST", path, house=make_house(limits=SMALL), headers=JSON | headers, content=body)
    assert answer.status_code == status


def test_a_body_without_a_length_is_counted_as_it_comes() -> None:
    async def endless():  # type: ignore[no-untyped-def]
        for _ in range(100):
            yield b" " * 100

    answer = asked("POST", "/echo", house=make_house(limits=SMALL), headers=JSON, content=endless())
    assert answer.status_code == 413


def test_bodies_together_are_bounded_and_given_back() -> None:
    async def ask() -> list[httpx.Response]:
        house = make_house(limits=Limits(bodies_bytes=50))
        await house.backend(None).start()
        transport = httpx.ASGITransport(app=told_app(house))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7070") as client:
            return [await client.post("/echo", json={"text": "a" * size}) for size in (60, 10, 10, 10, 10)]

    first, *others = asyncio.run(ask())
    assert (first.status_code, first.headers["retry-after"]) == (503, "1")
    assert [answer.status_code for answer in others] == [200] * 4


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/../etc/passwd",
            "/page/../../etc/passwd",
            "/%2e%2e/etc/passwd",
            "/page/%2e%2e%2fetc",
            "/page/..%5c..%5cetc",
        ),
        *(
            "/page/%00",
            "//etc/passwd",
            "/page/.",
            "/%2f",
            "/page//look.css",
            "/page/look.css/",
            "/nothing",
            "/docs",
            "/redoc",
        ),
    ],
)
def test_paths_that_are_not_there(path: str) -> None:
    async def ask() -> tuple[int, bytes]:
        told: list[dict[str, object]] = []
        plain, _, query = path.partition("?")
        from urllib.parse import unquote

        scope = {
            "type": "http",
            "method": "GET",
            "path": unquote(plain),
            "raw_path": plain.encode(),
            "query_string": query.encode(),
            "headers": [(b"host", b"localhost")],
            "server": ("127.0.0.1", 7070),
            "client": ("127.0.0.1", 1),
        }

        async def receive() -> dict[str, object]:
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            told.append(message)

        await told_app(make_house())(scope, receive, send)  # type: ignore[arg-type]
        return told[0]["status"], told[1]["body"]  # type: ignore[return-value]

    status, body = asyncio.run(ask())
    assert status == 404
    assert json.loads(body)["error"]["type"] == "not_found_error"


def test_a_slash_in_the_name_of_a_model_may_be_escaped() -> None:
    house = make_house({"a/step-10": Stub("a/step-10")})
    for path in ("/v1/models/a/step-10", "/v1/models/a%2Fstep-10"):
        assert asked("GET", path, house=house).json()["id"] == "a/step-10"
    assert asked("GET", "/v1/models/a%2F..%2F..%2Fhealth", house=house).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics", "/"])
def test_head_is_get_without_the_body(path: str) -> None:
    async def ask() -> tuple[httpx.Response, httpx.Response]:
        async with served() as place:
            return await place.client.head(path), await place.client.get(path)

    head, get = asyncio.run(ask())
    assert (head.status_code, head.content) == (200, b"")
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(get.content))


def test_an_address_of_ipv4_at_a_socket_of_ipv6() -> None:
    scope: dict[str, object] = {"headers": [(b"host", b"192.0.2.2:7070")], "method": "GET"}
    visitor = Visitor(scope | {"server": ("::ffff:192.0.2.2", 7070)}, make_house())
    check_host(visitor)
    with pytest.raises(Problem):
        check_host(Visitor(scope | {"server": ("::ffff:192.0.2.3", 7070)}, make_house()))


def test_methods_that_a_path_does_not_take() -> None:
    answer = asked("DELETE", "/ready")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert answer.json()["error"]["message"]


SAFE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/nothing"), ("POST", "/burst"), ("POST", "/health")]
)
def test_security_headers_on_every_answer(method: str, path: str) -> None:
    answer = asked(method, path, headers=JSON, content=b'{"text": "a"}')
    assert SAFE.items() <= dict(answer.headers).items()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert len(answer.headers["x-request-id"]) == 16


@pytest.mark.parametrize(
    ("body", "code"),
    [
        *((b"", "invalid_body"), (b"{", "invalid_json"), (b'{"text": "a", "text": "b"}', "invalid_json")),
        *(
            (b'{"text": NaN}', "invalid_json"),
            (b'{"text": "\\ud800"}', "invalid_json"),
            (b'{"text": "\xff"}', "invalid_json"),
        ),
        *(
            (b'{"n": ' + b"1" * 5000 + b"}", "invalid_json"),
            (b"[" * 100 + b"]" * 100, "invalid_json"),
            (b"[]", "invalid_body"),
        ),
        *((b'{"text": 1}', "invalid_value"), (b"{}", "invalid_value"), (b'{"text": "a"} x', "invalid_json")),
    ],
)
def test_bodies_that_are_no_request(body: bytes, code: str) -> None:
    answer = asked("POST", "/echo", headers=JSON, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", code)
    assert error["param"] == ("text" if code == "invalid_value" else None)


def test_what_nobody_foresaw_is_told_without_its_text() -> None:
    answer = asked("POST", "/burst", headers=JSON, content=b'{"text": "a"}')
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (500, "server_error")
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_the_log_has_no_words_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kinkajou"):
        body = b'{"text": "private words"}'
        answer = asked("POST", "/echo?secret=1", headers=JSON | {"authorization": "Bearer abc"}, content=body)
        asked("GET", "/a%0d%0aINFO forged%1b[31m")
    assert answer.status_code == 200
    first, second = (record.getMessage() for record in caplog.records)
    assert "POST /echo 200" in first
    assert not any(word in first for word in ("private", "secret", "abc"))
    assert "\\r\\nINFO forged\\x1b[31m" in second
    assert "\n" not in second
