"""One HTTP exchange within bounds: of time, from the host's name to the last byte, and of bytes.

No redirect is followed, and no proxy stands between this machine and itself.
"""

import ipaddress
import threading
import time
import urllib.request
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, IncompleteRead
from urllib.parse import urlsplit

from kinkajou.data.records import shown

FAULTS = (OSError, HTTPException)
"""What an exchange that fails raises, besides TooMuch."""


class TooMuch(Exception):
    """The reply is longer than was allowed."""


@dataclass(frozen=True)
class Reply:
    status: int
    reason: str
    retry_after: str
    body: bytes

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def passing(self) -> bool:
        """A fault that may be gone at the next try."""
        return self.status >= 500 or self.status == 429

    def __str__(self) -> str:
        return f"HTTP {self.status} {self.reason}: {shown(self.body[:200].decode(errors='replace'), 200)}"


class Host:
    """Where requests go; `base` is the beginning of every address."""

    def __init__(self, base: str) -> None:
        self.base, self.opener = base, opener(base)

    def ask(self, path: str, body: bytes | None, *, limit: int, timeout_s: float) -> Reply:
        """POST of a JSON body, GET without one; TimeoutError when the whole of it takes too long.

        A socket's own timeout starts again with each byte, and a name is looked up without any: so it is asked in a
        thread, which may be left behind.
        """
        reply: Future[Reply] = Future()

        def ask() -> None:
            try:
                reply.set_result(self._exchange(path, body, limit, timeout_s))
            except (*FAULTS, TooMuch) as fault:
                reply.set_exception(fault)

        threading.Thread(target=ask, daemon=True).start()
        try:
            return reply.result(timeout_s)
        except TimeoutError:
            raise TimeoutError(f"timed out after {timeout_s:g} s") from None

    def _exchange(self, path: str, body: bytes | None, limit: int, timeout_s: float) -> Reply:
        deadline = time.monotonic() + timeout_s
        headers = {"Accept": "application/json", "User-Agent": "kinkajou"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.base + path, data=body, headers=headers)
        with self.opener.open(request, timeout=timeout_s) as response:
            text = bounded(response, limit, deadline)
            named = response.headers.get("Retry-After", "")
            return Reply(response.status, response.reason or "", named, text)


def bounded(response: HTTPResponse, limit: int, deadline: float) -> bytes:
    pieces, size = [], 0
    while piece := response.read1(65_536):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise TooMuch(f"more than {limit:,} bytes")
        if time.monotonic() > deadline:  # nobody waits for it any more
            raise TimeoutError
    if response.length:
        raise IncompleteRead(b"", response.length)
    return b"".join(pieces)


def reason_of(fault: Exception) -> str:
    return str(getattr(fault, "reason", "") or fault) or type(fault).__name__


def opener(url: str) -> urllib.request.OpenerDirector:
    """Follows no redirect, and goes through no proxy to this machine itself."""
    director = urllib.request.OpenerDirector()
    proxies = urllib.request.ProxyHandler({} if is_loopback(urlsplit(url).hostname or "") else None)
    for handler in (proxies, urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        director.add_handler(handler)
    return director


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")
