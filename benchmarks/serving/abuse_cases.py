"""What a raw socket can send to a server, and the answers that are right.

A case is a list of bytes and pauses.  Its answer is a status code, or 0 for a connection closed without one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.serving.client import HOST

CHAT = "/v1/chat/completions"
GOOD = json.dumps({"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4}).encode()
BAD_REQUEST = frozenset({400, 422})
REFUSED = frozenset({0, 400, 408, 411, 413, 414, 415, 417, 421, 422, 426, 431})
LOST = frozenset({400, 404})
FINE = frozenset({200})
BODY, HEAD = 32 << 20, 1 << 20
"""More bytes than any server should take."""


@dataclass(frozen=True)
class Case:
    name: str
    parts: tuple[bytes | float, ...]
    """Bytes to send, and seconds to wait."""
    allowed: frozenset[int]
    answers: int = 1
    """Answers that come over one connection."""
    half_close: bool = False
    """The client says that it will send no more, and still reads."""
    slow: bool = False
    """Ends by a time limit of the server."""


def lines(first: str, *headers: str, body: bytes = b"", host: str | None = HOST) -> bytes:
    told = [first, *([f"Host: {host}"] if host is not None else []), *headers]
    return "\r\n".join([*told, "", ""]).encode("latin-1") + body


def post(body: bytes, *headers: str, path: str = CHAT, kind: str = "application/json") -> bytes:
    length = f"Content-Length: {len(body)}"
    return lines(f"POST {path} HTTP/1.1", f"Content-Type: {kind}", length, *headers, body=body)


def chunked(*chunks: bytes, path: str = CHAT, extra: tuple[str, ...] = ()) -> bytes:
    """A request whose body is these bytes as they are: sizes and ends are the case's own."""
    headers = ("Content-Type: application/json", "Transfer-Encoding: chunked", *extra)
    return lines(f"POST {path} HTTP/1.1", *headers, body=b"".join(chunks))


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def said(text: str) -> bytes:
    """A chat whose only message is this JSON string, quotes included."""
    return f'{{"messages": [{{"role": "user", "content": {text}}}], "max_tokens": 4}}'.encode()


def field(text: str) -> bytes:
    return GOOD[:-1] + f", {text}}}".encode()


def framing() -> Iterator[Case]:
    """Lengths and chunks that lie."""
    good = len(GOOD)
    posted = (f"POST {CHAT} HTTP/1.1", "Content-Type: application/json")
    yield Case(
        "Content-Length and Transfer-Encoding",
        (chunked(chunk(GOOD), b"0\r\n\r\n", extra=(f"Content-Length: {good}",)),),
        REFUSED | FINE,
    )
    yield Case("two Content-Lengths that differ", (post(GOOD, "Content-Length: 3"),), REFUSED)
    yield Case("Content-Length negative", (lines(*posted, "Content-Length: -1", body=GOOD),), REFUSED)
    yield Case("Content-Length +5", (lines(*posted, "Content-Length: +5", body=GOOD),), REFUSED)
    yield Case("Content-Length 0x10", (lines(*posted, "Content-Length: 0x10", body=GOOD),), REFUSED)
    yield Case("Content-Length of 40 digits", (lines(*posted, "Content-Length: " + "9" * 40, body=GOOD),), REFUSED)
    yield Case(
        "Content-Length of a terabyte", (lines(*posted, f"Content-Length: {1 << 40}", body=GOOD),), frozenset({413})
    )
    yield Case("Content-Length is a word", (lines(*posted, "Content-Length: many", body=GOOD),), REFUSED)
    yield Case("no length at all", (lines(*posted),), REFUSED)
    yield Case("body shorter than its length, then the end", (post(GOOD)[:-5],), REFUSED, half_close=True)
    yield Case("body shorter than its length, silence", (post(GOOD)[:-5],), REFUSED, slow=True)
    yield Case("body longer than its length", (post(GOOD) + b"}}}}\r\n\r\n",), FINE | REFUSED, answers=2)
    yield Case("chunk size is no number", (chunked(b"zz\r\n", GOOD),), REFUSED)
    yield Case("chunk size negative", (chunked(b"-5\r\n", GOOD),), REFUSED)
    yield Case("chunk size of 30 digits", (chunked(b"f" * 30 + b"\r\n", GOOD),), REFUSED)
    yield Case("chunk without its end", (chunked(f"{good:x}\r\n".encode(), GOOD, b"XX0\r\n\r\n"),), REFUSED)
    yield Case("chunked without the last chunk, then the end", (chunked(chunk(GOOD)),), REFUSED, half_close=True)
    yield Case("chunked without the last chunk, silence", (chunked(chunk(GOOD)),), REFUSED, slow=True)
    yield Case("chunked without end", (chunked(*[chunk(b" " * 65536)] * (BODY >> 16)),), frozenset({413}))
    yield Case("one byte a chunk", (chunked(*map(chunk, map(bytes, zip(GOOD))), b"0\r\n\r\n"),), FINE)
    yield Case("chunk extension of a megabyte", (chunked(b"5;" + b"x" * HEAD + b"\r\n"),), REFUSED)
    yield Case(
        "trailers of a megabyte", (chunked(chunk(GOOD), b"0\r\nX: " + b"x" * HEAD + b"\r\n\r\n"),), REFUSED | FINE
    )
    yield Case("Transfer-Encoding: gzip", (lines(*posted, "Transfer-Encoding: gzip", body=GOOD),), REFUSED)
    yield Case(
        "Transfer-Encoding twice",
        (chunked(chunk(GOOD), b"0\r\n\r\n", extra=("Transfer-Encoding: identity",)),),
        REFUSED,
    )
    yield Case("body over the limit", (post(b'"' + b"x" * BODY + b'"'),), frozenset({413}))
    yield Case("Expect: 100-continue", (post(GOOD, "Expect: 100-continue"),), FINE | {417})
    yield Case("Content-Encoding: gzip", (post(GOOD, "Content-Encoding: gzip"),), BAD_REQUEST | FINE | {415})
    yield Case("request smuggled in a body", (post(GOOD + lines("GET /smuggled HTTP/1.1")),), BAD_REQUEST)


def heads() -> Iterator[Case]:
    """Headers, too many, too long, of wrong form."""
    yield Case("1,000 headers", (lines("GET /health HTTP/1.1", *(f"X-{i}: {'x' * 90}" for i in range(1000))),), REFUSED)
    yield Case("a header of a megabyte", (lines("GET /health HTTP/1.1", "X: " + "x" * HEAD),), REFUSED)
    yield Case("headers without end", (b"GET /health HTTP/1.1\r\n" + b"X: xxxxxxxx\r\n" * 100_000,), REFUSED)
    yield Case("a path of a megabyte", (lines("GET /" + "x" * HEAD + " HTTP/1.1"),), REFUSED | LOST)
    yield Case("header without a colon", (lines("GET /health HTTP/1.1", "nothing"),), REFUSED)
    yield Case("space before the colon", (lines("GET /health HTTP/1.1", "X : 1"),), REFUSED)
    yield Case("header folded over lines", (lines("GET /health HTTP/1.1", "X: 1", " 2"),), REFUSED | FINE)
    yield Case("NUL in a header", (lines("GET /health HTTP/1.1", "X: a\0b"),), REFUSED)
    yield Case("bare CR in a header", (lines("GET /health HTTP/1.1", "X: a\rb"),), REFUSED)
    yield Case("NUL in the path", (lines("GET /health\0 HTTP/1.1"),), REFUSED | LOST)
    yield Case("bytes above 127 in the path", (lines("GET /\xff\xfe HTTP/1.1"),), REFUSED | LOST)
    yield Case("bytes above 127 in a header", (lines("GET /health HTTP/1.1", "X: \xff\xfe"),), REFUSED | FINE)
    yield Case("no Host", (lines("GET /health HTTP/1.1", host=None),), REFUSED)
    yield Case("two Hosts", (lines("GET /health HTTP/1.1", "Host: evil.example"),), REFUSED)
    yield Case("another's Host", (lines("GET /v1/models HTTP/1.1", host="evil.example"),), REFUSED | {403})
    yield Case("another's Origin", (post(GOOD, "Origin: https://evil.example"),), frozenset({400, 403}))


def methods() -> Iterator[Case]:
    """Methods, versions, other protocols, several requests at once."""
    yield Case("a method that is none", (lines("BREW /health HTTP/1.1"),), frozenset({400, 405}))
    yield Case("TRACE", (lines("TRACE /health HTTP/1.1"),), frozenset({400, 405}))
    yield Case("CONNECT", (lines("CONNECT evil.example:443 HTTP/1.1"),), REFUSED | {404, 405})
    yield Case("a method of a megabyte", (b"X" * HEAD + b" / HTTP/1.1\r\n\r\n",), REFUSED)
    yield Case("lower-case method", (lines("get /health HTTP/1.1"),), frozenset({400, 405}))
    yield Case("HTTP/1.0", (b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n",), FINE)
    yield Case("HTTP/1.0, streamed", (post(field('"stream": true')).replace(b"HTTP/1.1", b"HTTP/1.0", 1),), FINE)
    yield Case("HTTP/0.9", (b"GET /health\r\n\r\n",), REFUSED)
    yield Case("HTTP/9.9", (lines("GET /health HTTP/9.9"),), REFUSED | {505 - 100})
    yield Case("HTTP/2 preface", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",), REFUSED)
    yield Case(
        "HTTP/2 upgrade",
        (
            lines(
                "GET /health HTTP/1.1",
                "Connection: Upgrade, HTTP2-Settings",
                "Upgrade: h2c",
                "HTTP2-Settings: AAMAAABkAAQAAP__",
            ),
        ),
        FINE | REFUSED,
    )
    yield Case(
        "websocket upgrade",
        (
            lines(
                "GET /v1/chat/completions HTTP/1.1",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
            ),
        ),
        REFUSED | {403, 404, 405},
    )
    yield Case("TLS hello", (bytes.fromhex("1603010200010001fc0303") + bytes(507),), REFUSED)
    yield Case("random bytes", (bytes(range(255, 0, -1)) * 20 + b"\r\n\r\n",), REFUSED)
    yield Case("only line ends", (b"\r\n" * 5000,), REFUSED, slow=True)
    yield Case("absolute form", (lines("GET http://127.0.0.1/health HTTP/1.1"),), FINE | REFUSED | LOST)
    yield Case(
        "absolute form to another host", (lines("GET http://evil.example/v1/models HTTP/1.1"),), REFUSED | LOST | {403}
    )
    yield Case("asterisk form", (lines("OPTIONS * HTTP/1.1"),), REFUSED | LOST | {405})
    yield Case("pipelining", (lines("GET /health HTTP/1.1") * 5,), FINE, answers=5)
    yield Case(
        "pipelined after a stream", (post(field('"stream": true')) + lines("GET /health HTTP/1.1"),), FINE, answers=2
    )


def paths() -> Iterator[Case]:
    tries = ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fetc%2fpasswd", "/page/..\\..\\secret")
    tries += (
        "//etc/passwd",
        "/%00",
        "/page/%2e%2e/start.py",
        "/static/%c0%ae%c0%ae/etc/passwd",
        "/v1/models/../../etc",
    )
    for path in tries:
        yield Case(f"path {path}", (lines(f"GET {path} HTTP/1.1"),), LOST)
    yield Case("a model's name that is a path", (post(field('"model": "../../etc/passwd"')),), LOST | {422})
    yield Case("a model of that name asked for", (lines("GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1"),), LOST)


def bodies() -> Iterator[Case]:
    """Whole requests whose body is no good."""
    wrong = {
        "empty body": b"",
        "not JSON": b"{",
        "JSON after JSON": GOOD + GOOD,
        "an array": b"[]",
        "null": b"null",
        "a number": b"7",
        "UTF-16": GOOD.decode().encode("utf-16"),
        "bad UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xc3\x28\xed\xa0\x80"}]}',
        "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
        "nested 100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "an integer of a million digits": field('"max_tokens": ' + "9" * 1_000_000).replace(b'"max_tokens": 4, ', b""),
        "an integer of 5,000 digits as seed": field('"seed": ' + "9" * 5000),
        "duplicate keys": field('"messages": []'),
        "NaN": field('"temperature": NaN'),
        "Infinity": field('"temperature": Infinity'),
        "1e999": field('"temperature": 1e999'),
        "temperature as text": field('"temperature": "1"'),
        "negative n": field('"n": -1'),
        "n of a billion": field('"n": 1000000000'),
        "stop of 100,000 texts": field('"stop": ' + json.dumps(["x"] * 100_000)),
        "no messages": b'{"messages": []}',
        "100,000 messages": b'{"messages": [' + b",".join([b'{"role":"user","content":"a"}'] * 100_000) + b"]}",
        "message over the context": said('"' + "word " * 200_000 + '"'),
        "role that is none": GOOD.replace(b'"user"', b'"root"'),
        "content null": said("null"),
        "content an object": said("{}"),
        "an image's address": said('[{"type": "image_url", "image_url": {"url": "http://evil.example/x.png"}}]'),
        "an unknown field": field('"trust_remote_code": true'),
        "lone surrogate": said(r'"\ud800"'),
        "lone surrogate in stop": field(r'"stop": "\udfff"'),
        "lone surrogate as key": field(r'"\ud800": 1'),
        "stream as text": field('"stream": "yes"'),
    }
    large = {"100,000 messages", "message over the context", "an integer of a million digits", "stop of 100,000 texts"}
    for name, body in wrong.items():
        yield Case(name, (post(body),), BAD_REQUEST | ({413} if name in large or "nested" in name else set()))


def texts() -> Iterator[Case]:
    """Odd text that is no fault, answered or refused by name; other content types; the other routes."""
    fine = {
        "NUL in the text": r'"a\u0000b"',
        "right-to-left marks": r'"\u202e\u200f abc"',
        "an end token": '"<|im_end|></s>"',
    }
    fine |= {
        "100,000 combining marks": '"a' + r"\u0301" * 1000 + '"',
        "emoji": r'"\ud83d\ude00 \ud83d\udc68\u200d\ud83d\udc69"',
    }
    for name, text in fine.items():
        yield Case(name, (post(said(text)),), FINE | BAD_REQUEST)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        yield Case(f"content type {kind}", (post(GOOD, kind=kind),), BAD_REQUEST | {415})
    yield Case(
        "no content type",
        (lines(f"POST {CHAT} HTTP/1.1", f"Content-Length: {len(GOOD)}", body=GOOD),),
        BAD_REQUEST | {415},
    )
    yield Case("/generate with a bad body", (post(b'{"history": "x"}', path="/generate"),), BAD_REQUEST)
    yield Case(
        "/generate with nobody's turn", (post(b'{"history": [], "max_new_tokens": 8}', path="/generate"),), BAD_REQUEST
    )
    answered = b'{"history": [{"instruction": "a", "response": "b"}], "max_new_tokens": 8}'
    yield Case("/generate answered already", (post(answered, path="/generate"),), BAD_REQUEST)
    yield Case(
        "/v1/completions with prompt tokens", (post(b'{"prompt": [1, 2, 3]}', path="/v1/completions"),), BAD_REQUEST
    )


def slow() -> Iterator[Case]:
    """Those that end by a time limit, and those that close early."""
    yield Case("connects and says nothing", (), REFUSED, slow=True)
    yield Case("half a request line", (b"GET /hea",), REFUSED, slow=True)
    yield Case("headers without their end", (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n",), REFUSED, slow=True)
    drip = lines("GET /health HTTP/1.1", "X: " + "x" * 200)
    yield Case(
        "a byte of the head each 0.25 s",
        tuple(x for i in range(len(drip)) for x in (drip[i : i + 1], 0.25)),
        REFUSED,
        slow=True,
    )
    body = post(GOOD + b" " * 500)
    head = body.index(b"\r\n\r\n") + 4
    dripped = tuple(x for i in range(head, len(body)) for x in (body[i : i + 1], 0.25))
    yield Case("a byte of the body each 0.25 s", (body[:head], *dripped), REFUSED, slow=True)
    yield Case("half-closes at once", (), REFUSED, half_close=True)
    yield Case("half-closes after the request", (post(GOOD),), FINE | {0}, half_close=True)
    yield Case("a request in two halves", (post(GOOD)[:60], 0.3, post(GOOD)[60:]), FINE)
    yield Case("asks, then is idle", (lines("GET /health HTTP/1.1"), 1.0), FINE)


def cases() -> list[Case]:
    return [*framing(), *heads(), *methods(), *paths(), *bodies(), *texts(), *slow()]
