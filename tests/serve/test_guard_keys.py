"""Every route asks for the key but one: taken from the route table, so that a new route cannot escape."""

import asyncio
import base64
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from place import KEY, make_house, told_app
from starlette.routing import Route

from kinkajou.errors import UserError
from kinkajou.serve.app import App, make_app
from kinkajou.serve.keys import read_key

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
TOKEN = KEY.decode()


def basic(words: str) -> str:
    return f"Basic {base64.b64encode(words.encode()).decode()}"


BAD: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "empty": [("authorization", "")],
    "no key": [("authorization", "Bearer")],
    "empty key": [("authorization", "Bearer ")],
    "wrong": [("authorization", "Bearer " + "x" * len(TOKEN))],
    "prefix": [("authorization", f"Bearer {TOKEN[:-1]}")],
    "longer": [("authorization", f"Bearer {TOKEN}x")],
    "upper case": [("authorization", f"Bearer {TOKEN.upper()}")],
    "no scheme": [("authorization", TOKEN)],
    "another scheme": [("authorization", f"Token {TOKEN}")],
    "given twice": [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
    "wrong and right": [("authorization", "Bearer wrong"), ("authorization", f"Bearer {TOKEN}")],
    "elsewhere": [("x-api-key", TOKEN), ("cookie", f"key={TOKEN}")],
    "basic as name": [("authorization", basic(f"{TOKEN}:"))],
    "basic broken": [("authorization", "Basic ***")],
}


def paths_of(app: App) -> Iterator[str]:
    for route in app.routes:
        if isinstance(route, Route | APIRoute):
            yield route.path
        else:  # what FastAPI makes of an included router
            for inner in route.original_router.routes:  # type: ignore[attr-defined]
                assert isinstance(inner, Route | APIRoute), f"{inner}: how is the key asked for here?"
                yield inner.path


def client_of(app: object, **words: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost:7070", **words)  # type: ignore[arg-type]


def test_every_route_of_the_table_asks() -> None:
    app = make_app(make_house(key=KEY))
    assert isinstance(app, App)
    paths = [path.replace("{", "x").replace("}", "x") for path in paths_of(app)]
    assert {"/health", "/ready", "/metrics", "/openapi.json", "/"} < set(paths)

    async def ask() -> None:
        async with client_of(app) as client:
            for path, method, (name, headers) in product(paths, METHODS, BAD.items()):
                if path == "/health" and method in ("GET", "HEAD"):
                    continue
                answer = await client.request(method, f"{path}?key={TOKEN}&api_key={TOKEN}", headers=headers)
                assert answer.status_code == 401, f"{method} {path} with {name}: {answer.status_code}"
                assert "Bearer realm=" in answer.headers["www-authenticate"]
                assert TOKEN not in answer.text

    asyncio.run(ask())


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(f":{TOKEN}"), basic(f"me:{TOKEN}")])
def test_the_key_opens(given: str) -> None:
    async def ask() -> tuple[int, int]:
        async with client_of(make_app(make_house(key=KEY)), headers={"authorization": given}) as client:
            return (await client.get("/metrics")).status_code, (await client.get("/nothing")).status_code

    assert asyncio.run(ask()) == (200, 404)


def test_health_is_open_and_says_nothing() -> None:
    async def ask() -> httpx.Response:
        async with client_of(make_app(make_house(key=KEY))) as client:
            return await client.get("/health")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_without_a_key_none_is_asked_for() -> None:
    async def ask() -> int:
        async with client_of(told_app(make_house())) as client:
            return (await client.get("/metrics")).status_code

    assert asyncio.run(ask()) == 200


def test_the_key_is_not_shown_by_what_holds_it() -> None:
    assert TOKEN not in repr(make_house(key=KEY))


def test_key_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key.txt"
    file.write_bytes(KEY + b"\n")
    file.chmod(0o600)
    assert read_key(str(file)) == KEY
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    assert read_key(str(file)) == KEY
    assert "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words in one line", b"x" * 513, b"\xff" * 20, b"a" * 16 + b"\nb"]
)
def test_what_is_no_key(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "key.txt"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(UserError, match="is no key"):
        read_key(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_key(str(tmp_path))


def test_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINKAJOU_API_KEY", raising=False)
    assert read_key("") is None
    monkeypatch.setenv("KINKAJOU_API_KEY", TOKEN)
    assert read_key("") == KEY
    monkeypatch.setenv("KINKAJOU_API_KEY", "short")
    with pytest.raises(UserError, match="KINKAJOU_API_KEY"):
        read_key("")
