"""Text from models and data, made harmless: it may hold anything."""

import html
import json
import re

# Control characters, and those that turn the direction of all text after them.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def escape(value: object, most: int = 2000) -> str:
    """HTML text or attribute value. What is no text is shown as JSON; what is too long is cut and says so."""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    cut = len(plain) - most
    plain = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", plain[:most].replace("\r\n", "\n"))
    shown = html.escape(_UNSEEN.sub(_visible, plain))
    return f"{shown} … ({cut:,} more characters)" if cut > 0 else shown


def prose(value: object) -> str:
    """A sentence for the page: escaped, with `words in backticks` set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(value))


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
