"""Renders a chat template from standard input on a few chats, within bounds of time and memory; a script of its own.

Started by `kinkajou.data.template_probe`, without kinkajou.  Prints what is wrong, or nothing.
"""

import json
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY, LONGEST = 1, 1 << 29, 1 << 20
WORDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "sep_token": "<sep>"}
UNBOUNDED = (MemoryError, OverflowError, RecursionError)


def chats() -> Iterator[list[dict[str, str]]]:
    turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    yield turn
    yield turn[:1]
    yield [{"role": "system", "content": "be brief"}, *turn, turn[0]]
    yield turn * 8


def refuse(message: str) -> None:
    raise TemplateError(message)


def wrong(text: str) -> str:
    """What is wrong with a template; a refusal of its own, such as of system messages, is not."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **given: json.dumps(value, **{"ensure_ascii": False, **given})
    try:
        # The extension that marks an answer is transformers' own; it changes no text.
        template = environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
        for messages in chats():
            for adds in (False, True):
                given = {**WORDS, "messages": messages, "add_generation_prompt": adds, "tools": None, "documents": None}
                if rendered(template, given) > LONGEST:
                    return f"a chat of {len(messages)} short messages becomes longer than {LONGEST:,} characters"
    except SecurityError as fault:
        return f"it reaches for what no template may: {str(fault)[:200]}"
    except UNBOUNDED as fault:
        return f"it asks for too much: {type(fault).__name__} {str(fault)[:200]}"
    except TemplateError as fault:
        return f"it is no template: {str(fault)[:200]}"
    return ""


def rendered(template: Template, given: Mapping[str, Any]) -> int:
    """Characters; those of a template that refuses the chat are 0."""
    try:
        return sum(map(len, template.generate(**given)))
    except (SecurityError, *UNBOUNDED):
        raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    print(wrong(sys.stdin.read()))
