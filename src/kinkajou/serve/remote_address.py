"""Where another server is and how it is reached: its address, its key, and what a failed connection means."""

import os
import re
import ssl
from urllib.parse import urlsplit

import httpx

from kinkajou.data.records import shown
from kinkajou.errors import UserError
from kinkajou.exchange import is_loopback

KEY = "KINKAJOU_BACKEND_KEY"
KEY_FORM = re.compile(r"[!-~]{1,8192}")
"""Longer than our own may be, and shorter: other servers take tokens of thousands of characters, or `none`."""
HOST = re.compile(rb"[\w.-]+|[0-9a-fA-F.:]+:[0-9a-fA-F.:]*(%[\w.-]+)?")
SLOTS = 64
"""Answers that are asked of it at once: its own queue is behind that."""


def root_of(url: str) -> str:
    """The address below which the API lies, with /v1 and a slash at its end; UserError for what is none."""
    try:
        parts = urlsplit(url)
        host = httpx.URL(url).raw_host  # what httpx cannot speak to is found here, not in the first request
        sound = parts.scheme in ("http", "https") and bool(HOST.fullmatch(host)) and parts.port != 0
    except (ValueError, httpx.InvalidURL):  # a port that is no number, a bracket that is not closed, a name like ☃
        sound = False
    if not sound:
        raise UserError(f"--backend {shown(url)} is no address", fix="such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--backend takes an address alone", fix=f"its key goes into {KEY}")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else f'{path}/v1'}/"


def backend_key() -> str:
    """The environment's, empty if there is none; UserError for what cannot stand in a header."""
    return checked_key(os.environ.get(KEY, ""))


def checked_key(key: str) -> str:
    if key and not KEY_FORM.fullmatch(key):
        raise UserError(
            f"the environment's {KEY} is no key: at most 8,192 visible ASCII characters in one line",
            fix="set it to the other server's key, or to nothing if that asks for none",
        )
    return key


def client_for(root: str, key: str, read_s: float) -> httpx.AsyncClient:
    """No redirect is followed, no proxy stands between this machine and itself."""
    bearer = {"authorization": f"Bearer {checked_key(key)}"} if key else {}
    return httpx.AsyncClient(
        base_url=root,
        headers={"content-type": "application/json"} | bearer,
        timeout=httpx.Timeout(connect=5.0, read=read_s, write=10.0, pool=5.0),
        follow_redirects=False,
        trust_env=not is_loopback(urlsplit(root).hostname or ""),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=SLOTS),
    )


def reason_of(fault: BaseException) -> str:
    """Why there is no connection, in the words of this machine."""
    cause = fault
    while deeper := cause.__cause__ or cause.__context__:
        cause = deeper
    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and (cause.errno or 0) > 0:
        return os.strerror(cause.errno or 0)
    return shown(str(fault) or type(fault).__name__, 300)
