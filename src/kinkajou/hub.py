"""Names of models and data sets: a folder that is there, or a hub id, and whether the hub answers at all."""

import contextlib
import os
import socket
import threading
from functools import lru_cache
from urllib.parse import urlsplit

from kinkajou.errors import UserError

ANSWERS_WITHIN_S = 1.5
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def is_path(source: str) -> bool:
    """Whether a name can only be meant as a place on the disk: no hub id looks like it, or its folder is there."""
    parent = os.path.dirname(source)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or (parent != "" and os.path.isdir(parent))


def from_disk(source: str) -> bool:
    """Whether only the disk can have it, hub ids in the cache included: asking a hub that is not there takes a minute.

    UserError for a path where nothing is.
    """
    if os.path.isdir(source):
        return True
    if os.path.lexists(source):
        raise UserError(f"{source} is not a folder", fix="name the folder that holds config.json")
    if is_path(source):
        parent = os.path.dirname(source.rstrip("/")) or "."
        there = os.path.isdir(parent)
        beside = sorted(os.listdir(parent))[:8] if there else []
        evidence = f"in {parent} there is: {', '.join(beside) or 'nothing'}" if there else f"nor is there {parent}"
        raise UserError(f"there is no folder {source}", evidence=evidence, fix="correct the path")
    return not answers()


def answers() -> bool:
    """Whether the hub takes a connection; True behind a proxy, of which that cannot be told."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in PROXIES):
        return True
    return knock(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


@lru_cache
def knock(address: str) -> bool:
    place = urlsplit(address)
    host, port = place.hostname or "", place.port or (80 if place.scheme == "http" else 443)
    came: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=ANSWERS_WITHIN_S):
            came.append(True)

    # Looking up a name knows no time limit: it goes on aside.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWERS_WITHIN_S)
    return bool(came)
