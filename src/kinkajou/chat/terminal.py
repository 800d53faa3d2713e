"""Loads the models, then reads, answers and obeys until somebody leaves."""

import os
import sys

from kinkajou.chat.dialogue import Dialogue
from kinkajou.chat.reading import Reader
from kinkajou.chat.screen import Screen
from kinkajou.chat.slash import COMMANDS, SETTINGS, Next, obey
from kinkajou.chat.talker import Talker
from kinkajou.config import ChatConfig
from kinkajou.data.records import Message
from kinkajou.errors import UserError

HINT = "/help shows the commands; ctrl-C stops an answer, ctrl-D leaves"


def begin(folder: str, cfg: ChatConfig, screen: Screen) -> None:
    """Answers what comes on standard input; with `cfg.message` that one message, and leaves."""
    if cfg.message is not None and not sound(cfg.message):
        raise UserError("the message is empty, or not UTF-8", evidence=f"--message {cfg.message!r}")
    try:
        dialogue = Dialogue([load(name, cfg, screen) for name in (folder, cfg.versus) if name], cfg, screen)
        if cfg.message is not None:
            dialogue.ask([Message("user", cfg.message)])
        else:
            converse(dialogue, Reader([f"/{word}" for word in (*COMMANDS, *SETTINGS)]))
    except BrokenPipeError:  # whoever read the answers has left: so do we, without a word to nobody
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def load(folder: str, cfg: ChatConfig, screen: Screen) -> Talker:
    screen.passing(f"loading {folder} ...")
    talker = Talker(folder, cfg)
    screen.note(talker.describe())
    return talker


def sound(text: str) -> bool:
    return bool(text.strip()) and text == text.encode(errors="replace").decode()


def converse(dialogue: Dialogue, reader: Reader) -> None:
    screen = dialogue.screen
    dialogue.interactive = reader.interactive
    if reader.interactive:
        screen.note(HINT + ("; /pick 1 or 2: that answer counts for both" if dialogue.versus else ""))
    draft = ""
    while True:
        try:
            text, draft = reader.message(draft), ""
            follows = react(dialogue, text)
            if follows.leave:
                return
            draft = follows.edit or ""
        except EOFError:
            if reader.interactive and not reader.breaks_line:
                screen.line("")
            return
        except UserError as fault:
            screen.fault(fault)
        except KeyboardInterrupt:
            if not reader.interactive:
                raise
            draft = ""
            screen.line("")
            screen.note("/quit or ctrl-D leaves")


def react(dialogue: Dialogue, text: str) -> Next:
    """Obeys a command or has a message answered."""
    if not text:
        return Next()
    before = dialogue.remembered()
    if not text.startswith("/") or text.startswith("//"):
        follows = Next(ask=(Message("user", text.removeprefix("/") if text.startswith("//") else text),))
    else:
        follows = obey(dialogue, text)
    if follows.note:
        dialogue.screen.note(follows.note)
    if follows.ask:
        try:
            dialogue.ask(follows.ask)
        finally:  # a turn that was to be answered again stays if no answer came
            if not dialogue.answered:
                dialogue.remember(before)
    return follows
