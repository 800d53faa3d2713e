"""The web page: a fixed table of files, read once.  No name from a request reaches the disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).parent / "page"
SCRIPT, STYLE, DRAWING = "text/javascript; charset=utf-8", "text/css; charset=utf-8", "image/svg+xml"
# Path below the server's root -> (file, content type).
TABLE: dict[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/favicon.ico": ("mark.svg", DRAWING),
    "/page/mark.svg": ("mark.svg", DRAWING),
    **{f"/page/{name}.css": (f"{name}.css", STYLE) for name in ("look", "frame", "thread")},
    **{
        f"/page/{name}.js": (f"{name}.js", SCRIPT)
        for name in (
            *("theme", "app", "api", "answers", "composer", "doors", "elements", "faults", "markdown"),
            *("models", "settings", "sidebar", "store", "thread", "turns"),
        )
    },
}


@dataclass(frozen=True)
class Asset:
    """One file of the page as it is sent."""

    content: bytes
    kind: str
    etag: str


def assets() -> dict[str, Asset]:
    """Path -> what is sent."""
    found = {}
    for path, (name, kind) in TABLE.items():
        content = (FOLDER / name).read_bytes()
        found[path] = Asset(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def router() -> APIRouter:
    """GET and HEAD of every path of the table.  Browsers ask each time whether a file has changed: 304 if not."""
    kept, routes = assets(), APIRouter(include_in_schema=False)

    async def send(request: Request) -> Response:
        asset = kept[request.scope["route"].path]
        headers = {"etag": asset.etag, "cache-control": "no-cache"}
        seen = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if asset.etag in seen or "*" in seen:
            return Response(status_code=304, headers=headers)
        return Response(asset.content, headers=headers, media_type=asset.kind)

    for path in kept:
        routes.add_api_route(path, send, methods=["GET", "HEAD"], response_class=Response)
    return routes
