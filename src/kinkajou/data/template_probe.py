"""A template that came with a tokenizer is tried in a process of its own before it renders anything here.

The sandbox of jinja2 keeps a template from files and code; it does not keep it from running for ever or from making a
string of 100 MB.
"""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from kinkajou.data.templates import TEMPLATES
from kinkajou.errors import UserError

CHILD = Path(__file__).with_name("template_child.py")
LONGEST, SECONDS = 1 << 20, 10.0
"""Characters of a template; seconds of the clock, where the child's own second of the processor was not to be had."""
OWN = tuple(TEMPLATES.values())


def check_template(template: object, source: str) -> None:
    """UserError for a template that does not render short chats in a moment; of several, for any."""
    texts = template.values() if isinstance(template, dict) else [template]
    for text in texts:
        if isinstance(text, str) and text.removeprefix("{{ bos_token }}") not in OWN and (told := wrong(text)):
            raise UserError(
                f"the chat template of {source!r} is not used: {told}",
                fix="choose another with --template alpaca, human_assistant or plain",
            )


@lru_cache(maxsize=64)
def wrong(text: str) -> str:
    """What is wrong with it; empty where nothing is."""
    if len(text) > LONGEST:
        return f"it is longer than {LONGEST:,} characters"
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(CHILD)],
            input=text.encode("utf-8", "backslashreplace"),
            capture_output=True,
            timeout=SECONDS,
            env={"PYTHONUTF8": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it does not end"
    if done.returncode < 0:
        return "a short chat takes it longer than a second"
    if done.returncode:
        return f"it breaks off: {done.stderr.decode('utf-8', 'replace').strip()[-200:]}"
    return done.stdout.decode("utf-8", "replace").strip()
