"""What begins with a slash: settings, the conversation's past and future, help.  Each returns what happens next."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kinkajou.chat.conversation import Conversation, aligned, load, save
from kinkajou.chat.dialogue import Dialogue
from kinkajou.chat.screen import safe
from kinkajou.config import ChatConfig
from kinkajou.data.records import Message
from kinkajou.errors import UserError, did_you_mean

SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_new_tokens", "stop", "seed"),
)


@dataclass(frozen=True)
class Next:
    """What a command leads to."""

    note: str = ""
    ask: tuple[Message, ...] = ()
    """Asked at once."""
    edit: str | None = None
    """Put on the line to be changed."""
    leave: bool = False


@dataclass(frozen=True)
class Command:
    form: str
    """As it is typed, arguments in capitals."""
    words: str
    run: Callable[[Dialogue, str], Next]

    @property
    def name(self) -> str:
        return self.form.partition(" ")[0]


def obey(dialogue: Dialogue, line: str) -> Next:
    """Runs one command; UserError, and nothing changed, where it is none."""
    name, _, argument = line.removeprefix("/").partition(" ")
    argument = argument.strip()
    if name in SETTINGS:
        return setting(dialogue, f"{name} {argument}")
    if name not in COMMANDS:
        raise UserError(
            f"there is no command /{name}",
            fix=f"{did_you_mean(name, [*COMMANDS, *SETTINGS])} //{name} sends it as a message",
        )
    command = COMMANDS[name]
    if argument and " " not in command.form:
        raise UserError(f"/{name} takes nothing after it", evidence=line)
    try:
        return command.run(dialogue, argument)
    except OSError as fault:  # whatever the system refuses: the conversation is worth more
        raise UserError(f"/{name} could not be done", evidence=str(fault)) from None


def setting(dialogue: Dialogue, argument: str) -> Next:
    name, _, value = argument.partition(" ")
    if not name:
        return settings(dialogue, "")
    if name == "system":
        return system(dialogue, value.strip())
    if name not in SETTINGS:
        raise UserError(f"there is no setting {name}", fix=did_you_mean(name, ["system", *SETTINGS]))
    if value.strip():
        try:
            changed = replace(dialogue.cfg, **{name: parsed(name, value.strip())})
        except UserError as fault:  # it names the flag of the command line
            raise UserError(fault.problem.removeprefix("--"), evidence=f"/{name} {value.strip()}") from None
        dialogue.set(changed)
    return Next(f"{name} {shown(getattr(dialogue.cfg, name))}")


def parsed(name: str, value: str) -> Any:
    """A setting's value from what was typed."""
    if name == "stop":
        try:
            words = shlex.split(value)
        except ValueError as fault:
            raise UserError("a stop text is not closed", evidence=str(fault)) from None
        return tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in words if word)
    kind = next(field.type for field in fields(ChatConfig) if field.name == name)
    try:
        return int(value) if kind is int else float(value)
    except ValueError:
        raise UserError(f"{name} is a {'whole ' * (kind is int)}number") from None


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(dialogue: Dialogue, argument: str) -> Next:
    width = max(map(len, SETTINGS))
    lines = [f"{name:<{width}}  {shown(getattr(dialogue.cfg, name))}" for name in SETTINGS]
    lines.append(f"{'system':<{width}}  {each(dialogue.systems())}")
    return Next("\n".join([*lines, *(talker.describe() for talker in dialogue.talkers)]))


def system(dialogue: Dialogue, argument: str) -> Next:
    if argument:
        for conversation in dialogue.conversations:
            conversation.system = "" if argument in ('""', "''") else argument
    return Next(told(dialogue.systems()))


def told(systems: Sequence[str]) -> str:
    if len(systems) > 1:
        return f"system message of {each(systems, '; of ')}"
    return f"system message: {systems[0]}" if systems[0] else "no system message"


def each(systems: Sequence[str], between: str = "; ") -> str:
    if len(systems) > 1:
        return between.join(f"{number}: {system or '(none)'}" for number, system in enumerate(systems, start=1))
    return systems[0] or "(none)"


def new(dialogue: Dialogue, argument: str) -> Next:
    dialogue.renew([Conversation(conversation.system) for conversation in dialogue.conversations])
    return Next("a new conversation")


def undo(dialogue: Dialogue, argument: str) -> Next:
    turn = dialogue.take_back()
    if turn is None:
        raise UserError("nothing has been said yet")
    return Next(f"taken back: {brief(question(turn.asked))}")


def retry(dialogue: Dialogue, argument: str) -> Next:
    turn = dialogue.last()
    if turn is None:
        raise UserError("nothing has been said yet, so there is nothing to answer again")
    dialogue.take_back()
    return Next(ask=turn.asked)


def edit(dialogue: Dialogue, argument: str) -> Next:
    turn = dialogue.last()
    if turn is None:
        raise UserError("nothing has been said yet")
    if not argument and not dialogue.interactive:
        raise UserError("without a terminal /edit needs the new text", fix="/edit TEXT")
    old = question(turn.asked)
    if not argument and len(turn.asked) > 1:  # what is typed is one message: the others would be lost
        raise UserError(f"the last question is {len(turn.asked)} messages", fix="/edit TEXT changes the user's alone")
    if not argument and safe(old) != old:  # readline would send them to the terminal as they are
        raise UserError(
            "the last message has characters that would move or mislead the terminal",
            evidence=brief(old),
            fix="/edit TEXT",
        )
    dialogue.take_back()
    return Next(ask=edited(turn.asked, argument)) if argument else Next(edit=old)


def edited(asked: Sequence[Message], text: str) -> tuple[Message, ...]:
    """With another question; what else was said before the answer stays where it was."""
    at = max((i for i, message in enumerate(asked) if message.role == "user"), default=len(asked))
    return (*asked[:at], Message("user", text), *asked[at + 1 :])


def pick(dialogue: Dialogue, argument: str) -> Next:
    count = len(dialogue.talkers)
    if count == 1:
        raise UserError("there is one model alone", fix="kinkajou chat FOLDER --versus FOLDER asks two")
    if argument not in [str(i + 1) for i in range(count)]:
        raise UserError("say whose answer counts", fix="/pick 1 or /pick 2")
    dialogue.pick(int(argument) - 1)
    return Next(f"both go on from the answer of {dialogue.headings()[int(argument) - 1]}")


def keep(dialogue: Dialogue, argument: str) -> Next:
    if not argument:
        raise UserError("say where to", fix="/save FILE.jsonl")
    path = path_of(argument)
    pairs = [(x.name, y) for x, y in zip(dialogue.talkers, dialogue.conversations, strict=True)]
    left = save(path, pairs, replace=os.path.realpath(path) in dialogue.saved)
    dialogue.saved.add(os.path.realpath(path))
    return Next(f"saved in {path}{f'; left out: {left}' * bool(left)}")


def path_of(argument: str) -> Path:
    """What was typed; UserError where it can be no file's path."""
    if "\0" in argument:
        raise UserError("no file has a NUL character in its name", evidence=brief(argument))
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise UserError(f"{argument}: there is no such home") from None


def fetch(dialogue: Dialogue, argument: str) -> Next:
    path, _, number = argument.rpartition(" ") if argument.rpartition(" ")[2].isdecimal() else (argument, "", "")
    if not path:
        raise UserError("say which file", fix="/load FILE.jsonl")
    found = load(str(path_of(path)))
    each = len(dialogue.talkers)
    both = not number and len(found) == each > 1
    if both:
        chosen = aligned(*found)
    else:
        index = int(number.lstrip("0")[:10] or 0) if number else len(found)  # Python reads no number of 5,000 digits
        if not 1 <= index <= len(found):
            holds = f"{path} holds {len(found)} conversation{'s' * (len(found) > 1)}"
            raise UserError(holds, evidence=brief(f"/load {argument}"))
        chosen = [Conversation(found[index - 1].system, list(found[index - 1].turns)) for _ in range(each)]
        number = f", number {index} of {len(found)}" if len(found) > 1 else ""
    before = dialogue.systems()
    dialogue.renew(chosen)
    turn = dialogue.last()
    assert turn is not None  # a chat ends with an answer
    turns = [f"{len(x.turns)} turn{'s' * (len(x.turns) > 1)}" for x in chosen]
    loaded = turns[0] if not both else ", ".join(f"{x} for {i}" for i, x in enumerate(turns, start=1))
    changed = f"; {told(dialogue.systems())}" if dialogue.systems() != before else ""
    return Next(
        f"loaded {loaded}{number}{changed}\n"
        f"last asked: {brief(question(turn.asked))}\nlast answer: {brief(turn.answer.content)}"
    )


def tokens(dialogue: Dialogue, argument: str) -> Next:
    lines = []
    for talker, conversation in zip(dialogue.talkers, dialogue.conversations, strict=True):
        messages = conversation.messages()
        if conversation.turns:
            count = len(talker.form.conversation(messages).tokens)
        else:  # what a system message adds to a question
            probe = Message("user", "?")
            count = max(0, len(talker.form.prompt([*messages, probe])) - len(talker.form.prompt([probe])))
        share = f"{count / talker.context:.0%}"
        name = f"{talker.name}: " if dialogue.versus else ""
        said = f"{len(messages)} message{'s' * (len(messages) != 1)}"
        lines.append(f"{name}{count:,} tokens in {said}, {share} of the context of {talker.context:,}")
    return Next("\n".join(lines))


def help_(dialogue: Dialogue, argument: str) -> Next:
    width = max(len(command.form) for command in COMMANDS.values()) + 1
    lines = [f"/{command.form:<{width}} {command.words}" for command in COMMANDS.values()]
    lines += [
        "",
        f"Settings: {', '.join(SETTINGS)}.",
        "/temperature 0.2 is short for /set temperature 0.2; /temperature shows it.",
        'A line that ends in \\ goes on in the next one; """ begins and ends several lines.',
        "// begins a message that starts with a slash. Ctrl-C stops an answer, ctrl-D leaves.",
    ]
    return Next("\n".join(lines))


def question(asked: tuple[Message, ...]) -> str:
    """The user's last message."""
    return next((message.content for message in reversed(asked) if message.role == "user"), "")


def brief(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


COMMANDS = {
    command.name: command
    for command in (
        Command("help", "shows this", help_),
        Command("settings", "shows all settings and the model", settings),
        Command("set NAME VALUE", "changes a setting from the next answer on", setting),
        Command("system TEXT", 'sets the system message; "" takes it away', system),
        Command("new", "starts again; the system message stays", new),
        Command("retry", "answers the last message again, with another seed", retry),
        Command("edit TEXT", "sends this instead of the last message; alone: puts that on the line", edit),
        Command("undo", "takes the last turn back", undo),
        Command("pick 1|2", "with --versus: that last answer counts for both", pick),
        Command("save FILE", "writes the conversation, as a record for kinkajou sft", keep),
        Command(
            "load FILE",
            "goes on from a saved one: the last, or /load FILE 2; with --versus both of two",
            fetch,
        ),
        Command("tokens", "shows how much of the context is used", tokens),
        Command("quit", "leaves; so does ctrl-D", lambda dialogue, argument: Next(leave=True)),
    )
}
