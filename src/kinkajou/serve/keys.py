"""The API key: where it comes from, and whether a request has it."""

import base64
import binascii
import hmac
import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from kinkajou.errors import UserError

VARIABLE = "KINKAJOU_API_KEY"
SHORTEST, LONGEST = 16, 512
FORM = re.compile(rb"[!-~]{%d,%d}" % (SHORTEST, LONGEST))
MAKE_ONE = "head -c 32 /dev/urandom | base64 > key.txt && chmod 600 key.txt"


def read_key(path: str) -> bytes | None:
    """From the file if one is named, else from the environment, else None.  UserError for what is no key."""
    if not path:
        text = os.environ.get(VARIABLE, "")
        return checked(text.encode(errors="surrogateescape"), f"the environment's {VARIABLE}") if text else None
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(LONGEST + 3)
    except OSError as fault:
        raise UserError(f"the key file {path} cannot be read", evidence=fault.strerror or str(fault)) from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        print(f"note: others on this machine can read the key file {path}; chmod 600 {path}", file=sys.stderr)
    return checked(content.strip(), f"the key file {path}")


def checked(key: bytes, origin: str) -> bytes:
    if not FORM.fullmatch(key):
        raise UserError(
            f"{origin} is no key: {SHORTEST} to {LONGEST} visible ASCII characters in one line", fix=MAKE_ONE
        )
    return key


def admits(key: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether exactly one Authorization header is there and holds the key.

    `Bearer KEY`, or Basic with the key as password: by that a browser asks for it itself.
    """
    found = [value for name, value in headers if name == b"authorization"]
    if len(found) != 1:
        return False
    scheme, _, given = found[0].partition(b" ")
    if scheme.lower() == b"basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b"bearer":
        return False
    return hmac.compare_digest(given, key)
