"""What a request's head must be: its length, its host, its origin, its key, its content type."""

import re
from functools import cached_property
from urllib.parse import urlsplit

from starlette.types import Scope

from kinkajou.serve.house import House
from kinkajou.serve.keys import admits
from kinkajou.serve.problems import Problem

Headers = list[tuple[bytes, bytes]]
OPEN = "/health"
"""The one path without a key."""
NAME = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?\.?)(:[0-9]{1,5})?")
MAPPED = "::ffff:"
OWN = frozenset({"localhost", "127.0.0.1", "[::1]"})
ONCE = (b"host", b"origin", b"content-type", b"content-length", b"authorization", b"sec-fetch-site")
# Basic first: Chromium reads one scheme of a line, and must ask for the key itself to open the page.
CHALLENGE = {"www-authenticate": 'Basic realm="kinkajou", charset="UTF-8", Bearer realm="kinkajou"'}
ALLOWED = ("authorization", "content-type")
STAINLESS = re.compile(r"x-stainless-[a-z-]{1,40}")
"""Headers in which OpenAI's JavaScript client tells of itself."""
NAMES = "/v1/models/"
"""Below it a slash of a model's name may be escaped."""


class Visitor:
    """A request's head."""

    def __init__(self, scope: Scope, house: House) -> None:
        self.scope, self.house = scope, house
        self.headers: Headers = scope["headers"]
        self.method: str = scope["method"]
        self.fields: dict[bytes, bytes] = {}
        self.twice = ""
        for name, value in self.headers:
            if name in ONCE and name in self.fields:
                self.twice = name.decode()
            self.fields[name] = value

    def field(self, name: bytes) -> str:
        return self.fields.get(name, b"").decode("latin-1").strip()

    @cached_property
    def host(self) -> str:
        return self.field(b"host").lower()

    @cached_property
    def origin(self) -> str:
        return self.field(b"origin").lower()

    @property
    def has_body(self) -> bool:
        return b"transfer-encoding" in self.fields or self.field(b"content-length") not in ("", "0")

    @property
    def from_elsewhere(self) -> bool:
        """Whether a web page of an origin that is allowed sent it."""
        return self.origin in self.house.origins

    @property
    def is_preflight(self) -> bool:
        """A browser's question before the request itself; it never has a key."""
        return self.method == "OPTIONS" and self.from_elsewhere and b"access-control-request-method" in self.fields

    def shared(self) -> Headers:
        """What lets a page of an allowed origin read the answer; nothing for others."""
        if not self.origin or not self.from_elsewhere:
            return []
        return [
            (b"access-control-allow-origin", self.fields[b"origin"]),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"origin"),
        ]

    def preflight(self) -> Headers:
        asked = self.field(b"access-control-request-headers").lower().split(",")
        told = [name for name in map(str.strip, asked) if STAINLESS.fullmatch(name)]
        return [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", ", ".join((*ALLOWED, *told[:16])).encode()),
            (b"access-control-max-age", b"600"),
        ]


def checked(visitor: Visitor) -> bool:
    """Whether it is a preflight, which is answered at once.  Problem for what may not go on."""
    check_length(visitor)
    check_host(visitor)
    check_path(visitor)
    check_origin(visitor)
    if visitor.is_preflight:
        return True
    check_key(visitor)
    if visitor.method == "POST" and visitor.has_body:  # others, and empty ones, are refused by the routes
        check_content(visitor)
    return False


def check_length(visitor: Visitor) -> None:
    limits, scope = visitor.house.limits, visitor.scope
    if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
        raise Problem(400, "HTTP/1.1 is spoken here")
    if len(visitor.headers) > limits.num_headers:
        raise Problem(431, f"more than {limits.num_headers} headers")
    if sum(len(name) + len(value) for name, value in visitor.headers) > limits.head_bytes:
        raise Problem(431, f"headers of more than {limits.head_bytes:,} bytes")
    if len(scope["raw_path"]) > limits.path_bytes or len(scope["query_string"]) > limits.query_bytes:
        raise Problem(414, f"a path of more than {limits.path_bytes:,} bytes")
    if visitor.twice and visitor.twice != "authorization":  # a key given twice is no key: 401
        raise Problem(400, f"the header {visitor.twice} is given twice")


def check_host(visitor: Visitor) -> None:
    """By no other name than ours: a page elsewhere whose name is turned to this address has its own in Host."""
    host = visitor.host
    found = NAME.fullmatch(host)
    if not found:
        raise Problem(400, "the header host is no name", code="invalid_host")
    name = found[1].removesuffix(".")
    known = visitor.house.hosts
    if name in OWN or name in known or host in known:
        return
    own = visitor.scope.get("server")
    if own and name == bracketed(plain(str(own[0]))):  # the address itself: no name that could be turned
        return
    raise Problem(421, "this server does not answer to that host; --allow-hosts adds names", code="unknown_host")


def plain(address: str) -> str:
    """An address of IPv4 that a socket of IPv6 writes in its own way, as it was."""
    return address.removeprefix(MAPPED) if "." in address else address


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def check_path(visitor: Visitor) -> None:
    raw, path = visitor.scope["raw_path"].lower(), visitor.scope["path"]
    parts = path.split("/")
    escaped = b"%2f" in raw and not path.startswith(NAMES)
    if not path.startswith("/") or ".." in parts or "." in parts or "\\" in path or "\0" in path or escaped:
        raise Problem(404, "there is nothing at this path")


def check_origin(visitor: Visitor) -> None:
    """Other web pages may not use a visitor's browser to come in."""
    if visitor.from_elsewhere:
        return
    fields = visitor.fields
    if b"origin" in fields:
        place = urlsplit_origin(visitor.origin)
        if place != visitor.host:
            raise Problem(403, "this origin may not call the server; --allow-origins adds one", code="unknown_origin")
    site = visitor.field(b"sec-fetch-site").lower()
    if site in ("", "same-origin", "none"):
        return
    opened = visitor.method == "GET" and visitor.field(b"sec-fetch-mode").lower() == "navigate"
    if not opened or visitor.field(b"sec-fetch-dest").lower() != "document":  # a link to the page is no call
        raise Problem(403, "a web page of another site may not call the server", code="cross_site")


def urlsplit_origin(origin: str) -> str:
    """Its host and port; nothing if it is none of a web page."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{parts.netloc}" else ""


def check_key(visitor: Visitor) -> None:
    key = visitor.house.key
    if key is None or (visitor.scope["path"] == OPEN and visitor.method in ("GET", "HEAD")):
        return
    if not admits(key, visitor.headers):
        raise Problem(401, "the key is missing or wrong", code="invalid_api_key", headers=CHALLENGE)


def check_content(visitor: Visitor) -> None:
    kind, *words = [part.strip().lower() for part in visitor.field(b"content-type").split(";")]
    if kind != "application/json" or any(word not in ("charset=utf-8", 'charset="utf-8"', "") for word in words):
        raise Problem(415, "the content type must be application/json in UTF-8", code="content_type")
    if visitor.field(b"content-encoding").lower() not in ("", "identity"):
        raise Problem(415, "the body must not be compressed", code="content_encoding")
    length, limit = visitor.field(b"content-length"), visitor.house.limits.body_bytes
    if length.isdigit() and int(length[:20]) > limit:
        raise Problem(413, f"the body is longer than {limit:,} bytes", headers={"connection": "close"})
