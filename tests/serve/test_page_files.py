"""The page's files: a fixed table, asked anew only when changed, nothing from elsewhere, no markup from text."""

import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kinkajou.serve import pages

SOURCES = sorted(pages.FOLDER.iterdir())
KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(pages.router())
    return TestClient(app)


def test_the_table_is_the_folder() -> None:
    assert {name for name, _ in pages.TABLE.values()} == {path.name for path in SOURCES}


@pytest.mark.parametrize("path", pages.TABLE)
def test_each_file(client: TestClient, path: str) -> None:
    reply = client.get(path)
    content = (pages.FOLDER / pages.TABLE[path][0]).read_bytes()
    assert (reply.status_code, reply.content) == (200, content)
    assert reply.headers["content-type"].partition(";")[0] == KINDS[pages.TABLE[path][0].rpartition(".")[2]]
    assert reply.headers["cache-control"] == "no-cache"
    again = client.get(path, headers={"if-none-match": f'W/{reply.headers["etag"]}, "other"'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    head = client.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(content)))


@pytest.mark.parametrize(
    "path",
    [
        *("/page/", "/page/pages.py", "/page/../pages.py", "/page/%2e%2e/pages.py", "/page/..%2fpages.py"),
        *("/page/app.js/", "/page//app.js", "/page/app.js%00", "/page/C:/app.js", "/page//etc/passwd"),
        *("/index.html", "/page/index.html"),
    ],
)
def test_nothing_else_is_there(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code in (404, 307)
    assert b"APIRouter" not in client.get(path).content


MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|setHTML|srcdoc"
    r"|\beval\b|new Function|javascript:|\.cssText"
)
ELSEWHERE = re.compile(r"(https?:)?//[\w-]+\.\w|@import|url\(")


@pytest.mark.parametrize("name", [path.name for path in SOURCES])
def test_no_markup_from_text_and_nothing_from_elsewhere(name: str) -> None:
    text = (pages.FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not MARKUP.search(text)
    assert not ELSEWHERE.search(text)


def test_nothing_inline() -> None:
    """The policy `default-src 'self'` allows neither scripts nor styles inside the page."""
    html = (pages.FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert len(re.findall(r"<script[^>]*\ssrc=", html)) == 2
    for name in re.findall(r'(?:src|href)="(page/[^"]+)"', html):
        assert f"/{name}" in pages.TABLE


def test_modules_import_only_what_is_served() -> None:
    for path in SOURCES:
        for name in re.findall(r'from "\./([^"]+)"', path.read_text()):
            assert f"/page/{name}" in pages.TABLE, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_are_short(path) -> None:  # type: ignore[no-untyped-def]
    assert len(path.read_text().splitlines()) <= 400
