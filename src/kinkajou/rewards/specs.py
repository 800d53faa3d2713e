"""Judges as recipes name them: `[WEIGHT*]SPEC`.  Checked here without torch, before anything is loaded."""

import importlib.util
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from kinkajou.errors import UserError, did_you_mean
from kinkajou.rewards.rules import parse_rule

Kind = Literal["rule", "ensemble", "service", "function", "model"]
FORMS = "rule:NAME, a reward model's folder, ensemble:FOLDER,FOLDER, http://HOST/PATH, or module:function"


@dataclass(frozen=True)
class Spec:
    """One term of the sum."""

    weight: float
    kind: Kind
    body: str  # `rule:...` as it is; folders joined by commas; a URL; `module:function`; a folder or hub id

    @property
    def name(self) -> str:
        """Short, for metrics."""
        match self.kind:
            case "rule":
                return ":".join(self.body.split(":")[:2])
            case "service":
                return f"http:{urlsplit(self.body).netloc}"
            case "function":
                return f"python:{self.body.rpartition(':')[2]}"
            case "model":
                return f"model:{Path(self.body).name}"
            case "ensemble":
                return "ensemble"


def parse_spec(text: str) -> Spec:
    """The term that `[WEIGHT*]SPEC` names; UserError where it cannot be one."""
    weight, body = split_weight(text.strip())
    if not body:
        raise UserError("a reward is empty", evidence=repr(text), fix=FORMS)
    head, colon, rest = body.partition(":")
    if head == "rule":
        parse_rule(body)
        return Spec(weight, "rule", body)
    if head == "ensemble" and colon:
        return Spec(weight, "ensemble", ",".join(members(rest)))
    if head.lower() in ("http", "https") and colon:
        check_url(body)
        return Spec(weight, "service", body)
    if head == "python" and colon:
        check_function(rest)
        return Spec(weight, "function", rest)
    if colon and not Path(body).exists():
        if near := "" if Path(f"{head}.py").exists() else near_prefix(head):
            raise UserError(f"unknown kind of reward {head!r}", evidence=repr(text), fix=f"did you mean {near}:{rest}?")
        check_function(body)
        return Spec(weight, "function", body)
    return Spec(weight, "model", body)


def split_weight(text: str) -> tuple[float, str]:
    """`0.5*SPEC` -> 0.5, `SPEC`.  A star that stands after a colon or slash belongs to the spec."""
    head, star, rest = text.partition("*")
    if not star or ":" in head or "/" in head:
        return 1.0, text
    try:
        weight = float(head)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError("a reward's weight must be a number", evidence=repr(text), fix="0.5*rule:ended")
    return weight, rest.strip()


def members(text: str) -> list[str]:
    folders = [folder.strip() for folder in text.split(",") if folder.strip()]
    if len(set(folders)) < max(2, len(folders)):
        raise UserError(
            "an ensemble needs two different reward models at least",
            evidence=repr(text),
            fix="ensemble:runs/reward-1,runs/reward-2",
        )
    return folders


def check_url(url: str) -> None:
    """Scheme, host and port; no password in it, for it would stand in `config.toml` and in messages."""
    fix = "http://127.0.0.1:8000/v1/rewards"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")  # a label beyond 63 characters
    except ValueError as fault:
        raise UserError("a reward service needs a sound URL", evidence=f"{url!r}: {fault}", fix=fix) from None
    if not host or not url.isprintable() or not url.isascii() or " " in url or parts.fragment:
        raise UserError("a reward service needs a sound URL", evidence=repr(url), fix=fix)
    if "@" in parts.netloc:
        raise UserError("the URL of a reward service must hold no password", evidence=f"host {host}", fix=fix)


def check_function(name: str) -> None:
    """`module:function`, and the module can be found from here; nothing is imported."""
    module, _, function = name.partition(":")
    words = [*module.split("."), function]
    if not all(word.isidentifier() for word in words):
        raise UserError("a reward function is named module:function", evidence=repr(name), fix=f"or give {FORMS}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(words[0])
    except ValueError:  # a module that runs as __main__ has no spec
        found = None
    finally:
        sys.path.remove(here)
    if found is None:
        raise UserError(
            f"there is no Python module {words[0]!r} for the reward {name}",
            evidence=f"looked in {here} and where Python looks",
            fix="start kinkajou in the folder that holds the module, or install it",
        )


def near_prefix(word: str) -> str:
    near = did_you_mean(word.lower(), ("rule", "ensemble", "python", "http", "https"))
    found = re.search(r"'(\w+)'\?", near)
    return found[1] if found else ""


def parse_specs(specs: Sequence[str]) -> list[Spec]:
    """All terms of a sum; one that is given twice is refused."""
    terms = [parse_spec(text) for text in specs]
    for i, term in enumerate(terms):
        if any(term.body == other.body for other in terms[:i]):
            raise UserError(f"the reward {term.body} is given twice", fix="give it once, with the sum of the weights")
    return terms


def check_specs(specs: Sequence[str]) -> None:
    """UserError for what can be known to be wrong before anything is loaded: quick, and without torch."""
    parse_specs(specs)


def reward_model_folder(specs: Sequence[str]) -> str | None:
    """The reward model that a critic may start from: the first with a positive weight, or of an ensemble its first."""
    for term in parse_specs(specs):
        if term.weight > 0 and term.kind in ("model", "ensemble"):
            return term.body.split(",")[0] if term.kind == "ensemble" else term.body
    return None
