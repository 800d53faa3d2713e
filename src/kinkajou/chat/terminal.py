"""Loads the models, then reads, answers and obeys until somebody leaves."""

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
    for name, text in (("system message", cfg.system), *(("stop text", stop) for stop in cfg.stop)):
        if text and not utf8(text):
            raise UserError(f"a {name} is not UTF-8", evidence=repr(text))
    dialogue = Dialogue([load(name, cfg, screen) for name in (folder, cfg.versus) if name], cfg, screen)
    if cfg.message is not None:
        dialogue.ask([Message("user", cfg.message)])
    else:
        converse(dialogue, Reader([f"/{word}" for word in (*COMMANDS, *SETTINGS)]))


def load(folder: str, cfg: ChatConfig, screen: Screen) -> Talker:
    screen.passing(f"loading {folder} ...")
    talker = Talker(folder, cfg)
    screen.note(talker.describe())
    return talker


def sound(text: str) -> bool:
    return bool(text.strip()) and utf8(text)


def utf8(text: str) -> bool:
    """Whether it came as UTF-8: other bytes of a command line are halves of characters."""
    return text == text.encode(errors="replace").decode()


def converse(dialogue: Dialogue, reader: Reader) -> None:
    """UserError at the end if a line of a pipe came to a fault: a script sees nothing but the exit code."""
    faults = exchange(dialogue, reader)
    if faults and not reader.interactive:
        lines = f"{faults} line{'s' * (faults > 1)} of the input came to a fault"
        raise UserError(f"{lines}, which is said above")


def exchange(dialogue: Dialogue, reader: Reader) -> int:
    """Reads and answers until somebody leaves; returns how many faults were told."""
    screen = dialogue.screen
    dialogue.interactive = reader.interactive
    if reader.interactive:
        screen.note(HINT + ("; /pick 1 or 2: that answer counts for both" if dialogue.versus else ""))
    draft, faults = "", 0
    while True:
        try:
            text, draft = reader.message(draft), ""
            follows = react(dialogue, text)
            if follows.leave:
                return faults
            draft = follows.edit or ""
        except EOFError:
            if reader.interactive and not reader.breaks_line:
                screen.line("")
            return faults
        except UserError as fault:
            faults += 1
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
