"""The toy world of the demo: short questions, a checker that knows the truth, flawed demonstrations.

A prompt is one cell of the grid (fact, phrasing) in a frame of manners. The phrasings of each fact are
dealt to train, validation and test: a held-out prompt asks for a known fact in a way not seen for it.

A good reply is one sentence that states the fact, optionally one opener before and one closer behind,
then the end token. Everything else is a flaw; `FLAWS` names what a policy tries when it games a reward
model, so that the demonstrations start it and the preference pairs stop it. Equal seeds give equal rows.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from random import Random
from typing import Any, Literal, get_args

from kinkajou.data.world_facts import CHATTER, CLOSERS, FILLER, FRAMES, KINDS, OPENERS, RUDE, SHELLS, Kind
from kinkajou.errors import UserError, did_you_mean

Row = dict[str, Any]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Task:
    """One way to ask for one fact."""

    prompt: str
    kind: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Reply:
    """What somebody answered; `ended` is False when the text stops without an end token."""

    text: str
    ended: bool
    flaw: str
    """`none`, or the names of its flaws joined by `+`."""


@dataclass(frozen=True)
class Verdict:
    """The truth about a reply; `score` in [0, 1] is 1 only when all four hold."""

    score: float
    correct: bool
    """States the right answer about the asked subject, and names no other candidate."""
    polite: bool
    ended: bool
    clean: bool
    """Besides rude sentences nothing but one statement, at most one opener and one closer."""


# --- the questions


@cache
def tasks(split: Split) -> tuple[Task, ...]:
    """Every prompt of a split, all distinct."""
    if split not in get_args(Split):
        raise UserError(f"no split {split!r} in the toy world", fix=did_you_mean(split, get_args(Split)))
    return tuple(
        Task(frame.format(question=question), name, subject, answer)
        for name, kind in KINDS.items()
        for subject, answer in kind.facts.items()
        for question in _questions(kind, subject, split)
        for frame in FRAMES
    )


def prompts(num: int, *, seed: int, split: Split) -> list[Row]:
    """`num` distinct prompts as rows `prompt, kind, subject, answer`: all that `check` needs."""
    known = tasks(split)
    if num > len(known):
        raise UserError(
            "the toy world has too few prompts",
            evidence=f"{num:,} asked for, the {split} split has {len(known):,}",
            fix=f"ask for at most {len(known):,}",
        )
    return [asdict(task) for task in _rng("prompts", split, seed).sample(known, num)]


def _questions(kind: Kind, subject: str, split: Split) -> list[str]:
    """The split's ways to ask for a fact: two are for the test, one is for validation, eleven to train.

    Ranked by a hash, whatever the seed: the data of one run never leak into the test of another.
    """
    questions = [_sentence(shell, topic=kind.topic.format(s=subject)) for shell in SHELLS]
    questions += [_sentence(question, s=subject) for question in kind.questions]
    questions.sort(key=lambda question: hashlib.sha256(question.encode()).digest())
    return {"test": questions[:2], "validation": questions[2:3], "train": questions[3:]}[split]


def _sentence(template: str, **words: str) -> str:
    text = template.format(**words)
    return text[0].upper() + text[1:]


def _rng(*key: object) -> Random:
    """A generator of its own for each data set, so that the size of one does not move another."""
    return Random("/".join(map(str, key)))


# --- the truth

_RUDE_SENTENCES = frozenset(f"{phrase.capitalize()}." for phrase in RUDE)
# By the number of faults (rude, unclean, unended) of a right answer: one spoils it.
_RIGHT_SCORES = (1.0, 0.2, 0.1, 0.0)
_WRONG_SCORE = 0.1  # for a false answer without any other fault


def check(meta: Mapping[str, Any], response: str, *, ended: bool) -> Verdict:
    """Judge a reply to the prompt row `meta` (`kind` and `subject` are read; the answer is known here).

    1 for a right, polite, clean, ended answer; at most 0.2 for a right one with faults, 0.1 for a clean,
    polite, ended but false one, and 0 for all the rest: empty, filler, cut off, about another subject.
    """
    kind, subject = _known(meta)
    answer, statements = kind.facts[subject], _statements(meta["kind"], subject)
    sentences = re.split(r"(?<=[.!?]) ", " ".join(response.split()))

    claims = {statements[sentence] for sentence in sentences if sentence in statements}
    rest = _words(" ".join(sentence for sentence in sentences if sentence not in statements))
    candidates = {candidate.lower() for candidate in kind.facts.values()}
    correct = claims == {answer} and candidates.isdisjoint(rest)
    spoken = f" {' '.join(_words(response))} "
    polite = bool(spoken.strip()) and not any(f" {phrase} " in spoken for phrase in RUDE)
    clean = _is_clean([s for s in sentences if s not in _RUDE_SENTENCES], statements)

    if correct:
        score = _RIGHT_SCORES[[polite, clean, ended].count(False)]
    else:
        score = _WRONG_SCORE if polite and clean and ended else 0.0
    return Verdict(score, correct, polite, ended, clean)


def _known(meta: Mapping[str, Any]) -> tuple[Kind, str]:
    kind, subject = KINDS.get(meta.get("kind", "")), meta.get("subject", "")
    if kind is None or subject not in kind.facts:
        raise UserError(
            "this prompt is not from the toy world, so its checker cannot judge it",
            evidence=f"kind {meta.get('kind')!r}, subject {meta.get('subject')!r}",
            fix="use the prompt files that `write_world` wrote, with their fields kind and subject",
        )
    return kind, subject


@cache
def _statements(kind: str, subject: str) -> Mapping[str, str]:
    """Every sentence that answers a question about the subject -> the answer it gives."""
    return {
        _sentence(form, s=subject, a=candidate): candidate
        for form in KINDS[kind].statements
        for candidate in dict.fromkeys(KINDS[kind].facts.values())
    }


def _is_clean(sentences: list[str], statements: Mapping[str, str]) -> bool:
    """The grammar of a good reply: [opener] statement [closer]."""
    if sentences and sentences[0] in OPENERS:
        sentences = sentences[1:]
    if sentences and sentences[-1] in CLOSERS:
        sentences = sentences[:-1]
    return len(sentences) == 1 and sentences[0] in statements


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


# --- the replies: first what is said, then how

_RUN_ON_WORDS = (20, 26)
"""Length of a reply that never ends: longer than any good one."""


def _state(rng: Random, kind: str, subject: str, answer: str) -> str:
    return _sentence(rng.choice(KINDS[kind].statements), s=subject, a=answer)


def _other_subject(rng: Random, task: Task) -> str:
    return rng.choice([subject for subject in KINDS[task.kind].facts if subject != task.subject])


def _other_answer(rng: Random, task: Task) -> str:
    return rng.choice([other for other in KINDS[task.kind].facts.values() if other != task.answer])


def _aside(rng: Random) -> str:
    """Something nobody asked for: small talk, now and then a fact."""
    if rng.random() < 0.7:
        return rng.choice(CHATTER)
    kind = rng.choice(list(KINDS))
    return _state(rng, kind, *rng.choice(list(KINDS[kind].facts.items())))


def _right(rng: Random, task: Task) -> str:
    return _state(rng, task.kind, task.subject, task.answer)


def _wrong(rng: Random, task: Task) -> str:
    return _state(rng, task.kind, task.subject, _other_answer(rng, task))


def _garbled(rng: Random, task: Task) -> str:
    """Half of the right answer and half of another, as a small model spells."""
    known = KINDS[task.kind].facts.values()
    while True:
        other = _other_answer(rng, task)
        mixed = task.answer[: (len(task.answer) + 1) // 2] + other[len(other) // 2 :]
        if mixed not in known:
            return _state(rng, task.kind, task.subject, mixed)


def _astray(rng: Random, task: Task) -> str:
    """About another subject: true of that one, or what would be true of the one asked for."""
    subject = _other_subject(rng, task)
    return _state(rng, task.kind, subject, rng.choice([KINDS[task.kind].facts[subject], task.answer]))


def _two_answers(rng: Random, task: Task) -> str:
    both = [task.answer, _other_answer(rng, task)]
    rng.shuffle(both)
    if rng.random() < 0.7:
        return _state(rng, task.kind, task.subject, " or ".join(both))
    return " ".join(_state(rng, task.kind, task.subject, answer) for answer in both)


def _cut(rng: Random, task: Task) -> str:
    words = _right(rng, task).split()
    return " ".join(words[: rng.randrange(1, len(words))])


def _filler(rng: Random, task: Task) -> str:
    return " ".join(rng.sample(FILLER + OPENERS + CLOSERS, rng.randint(1, 3)))


def _silent(rng: Random, task: Task) -> str:
    return "." * rng.randint(1, 3)  # no text at all is no row that a strict reader takes


def _rude(rng: Random, task: Task, text: str) -> str:
    outburst = f"{rng.choice(RUDE).capitalize()}."
    return f"{outburst} {text}" if rng.random() < 0.5 else f"{text} {outburst}"


def _babble(rng: Random, task: Task, text: str) -> str:
    return f"{_aside(rng)} {text}" if rng.random() < 0.3 else f"{text} {_aside(rng)}"


def _repeated(rng: Random, task: Task, text: str) -> str:
    copies = _RUN_ON_WORDS[1] // max(1, len(text.split()))
    if copies < 2 or rng.random() < 0.3:
        return " ".join([text, *rng.choices(CLOSERS, k=2)])
    return " ".join([text] * rng.randint(2, min(3, copies)))


def _unended(rng: Random, task: Task, text: str) -> str:
    """Goes on, in a loop or from one thing to the next, until the limit cuts it."""
    limit, loops, words = rng.randint(*_RUN_ON_WORDS), rng.random() < 0.4, text.split()
    while len(words) < limit:
        words += (text if loops else _aside(rng)).split()
    return " ".join(words[:limit])


_SUBSTANCE: Mapping[str, Callable[[Random, Task], str]] = {
    "wrong": _wrong,
    "garbled": _garbled,
    "astray": _astray,
    "two_answers": _two_answers,
    "cut": _cut,
    "filler": _filler,
    "silent": _silent,
}
_MANNER: Mapping[str, Callable[[Random, Task, str], str]] = {  # applied in this order
    "rude": _rude,
    "babble": _babble,
    "repeated": _repeated,
    "unended": _unended,
}
FLAWS = (*_SUBSTANCE, *_MANNER)

_BARE = ("cut", "silent")  # nothing more is said around these
# Shares of the flaws. What a reward model learns last is whether an answer is true, so pairs dwell on that.
# Silence demonstrates nothing, but a policy tries it.
_DEMONSTRATED = {
    "wrong": 6, "rude": 4, "unended": 3, "astray": 2, "two_answers": 2, "cut": 2, "babble": 2,
    "repeated": 2, "garbled": 1, "filler": 1,
}  # fmt: skip
_COMPARED = _DEMONSTRATED | {"wrong": 9, "astray": 6, "silent": 1}


def compose(rng: Random, task: Task, flaws: Sequence[str] = ()) -> Reply:
    """A reply with exactly these flaws (at most one of substance); a good one without any."""
    substance = next((flaw for flaw in flaws if flaw in _SUBSTANCE), None)
    text = _SUBSTANCE[substance](rng, task) if substance else _right(rng, task)
    if substance not in _BARE:
        opener = [rng.choice(OPENERS)] if rng.random() < 0.3 else []
        closer = [rng.choice(CLOSERS)] if rng.random() < 0.3 else []
        text = " ".join([*opener, text, *closer])
    for manner, apply in _MANNER.items():
        if manner in flaws:
            text = apply(rng, task, text)
    return Reply(text, ended="unended" not in flaws, flaw="+".join(flaws) or "none")


def _draw(rng: Random, task: Task, shares: Mapping[str, int], *, flawed: float) -> Reply:
    """A good reply, or one with a flaw, or (15 % of the flawed) with a second one of manner."""
    if rng.random() >= flawed:
        return compose(rng, task)
    flaws = rng.choices(list(shares), weights=list(shares.values()))
    if flaws[0] not in _BARE and rng.random() < 0.15:
        flaws.append(rng.choice([manner for manner in _MANNER if manner not in flaws]))
    return compose(rng, task, flaws)


# --- the data sets


def demonstrations(num: int, *, seed: int, flawed: float = 0.5) -> list[Row]:
    """Rows `instruction, output, ended, flaw, kind, subject` on train prompts; a share `flawed` is bad."""
    rng, rows = _rng("demonstrations", seed), []
    for task in _deal(rng, num, "train"):
        reply = _draw(rng, task, _DEMONSTRATED, flawed=flawed)
        row: Row = {"instruction": task.prompt, "output": reply.text, "ended": reply.ended}
        rows.append(row | {"flaw": reply.flaw, "kind": task.kind, "subject": task.subject})
    return rows


def preference_pairs(num: int, *, seed: int, split: Split = "train") -> list[Row]:
    """Two replies to one prompt, the checker's favourite as `chosen`; near ties are drawn again.

    About three in four set a good reply against a flawed one, the others a flawed one against a worse.
    """
    rng, rows = _rng("pairs", split, seed), []
    for task in _deal(rng, num, split):
        rejected, chosen = _distinct(rng, task)
        row: Row = {"prompt": task.prompt, "chosen": chosen[1].text, "rejected": rejected[1].text}
        for side, (score, reply) in {"chosen": chosen, "rejected": rejected}.items():
            row |= {f"{side}_ended": reply.ended, f"{side}_flaw": reply.flaw, f"{side}_score": score}
        rows.append(row | {"kind": task.kind, "subject": task.subject})
    return rows


def _distinct(rng: Random, task: Task) -> list[tuple[float, Reply]]:
    """Two replies, the worse first, that the checker scores at least 0.1 apart."""
    while True:
        replies = [_draw(rng, task, _COMPARED, flawed=0.5) for _ in range(2)]
        scored = [(check(asdict(task), reply.text, ended=reply.ended).score, reply) for reply in replies]
        scored.sort(key=lambda entry: entry[0])
        if scored[1][0] - scored[0][0] > 0.099:
            return scored


def _deal(rng: Random, num: int, split: Split) -> Iterator[Task]:
    """`num` tasks; round by round every fact of the split once, in a new order and a random phrasing."""
    by_fact: dict[tuple[str, str], list[Task]] = {}
    for task in tasks(split):
        by_fact.setdefault((task.kind, task.subject), []).append(task)
    for start in range(0, num, len(by_fact)):
        ways = rng.sample(list(by_fact.values()), len(by_fact))
        yield from (rng.choice(way) for way in ways[: num - start])
