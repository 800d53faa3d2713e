"""What the toy world knows and how it speaks: tables only, no logic (`world` has that).

Rules that the checker leans on (`tests/data/test_world.py` holds them): an answer is one word,
a statement one sentence, and small talk never contains a word that answers a question.
In every template `{s}` is the subject and `{a}` the answer, and the answer stands behind the subject:
a small model recalls it best right after having said what it is about.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One sort of question: its facts, and the ways to ask for and to state one."""

    topic: str
    """Noun phrase that fits every shell of `SHELLS`."""
    questions: tuple[str, ...]
    """Ways to ask that only this kind has."""
    statements: tuple[str, ...]
    """Every full sentence that answers; nothing else counts as an answer."""
    facts: Mapping[str, str]
    """Subject -> the one right answer."""


def _facts(table: str) -> dict[str, str]:
    """Read "subject: answer, subject: answer"."""
    return dict(entry.split(": ", 1) for entry in table.split(", "))


# Shared by all kinds, so that a phrasing learned on one fact carries over to the others.
SHELLS = (
    "What is {topic}?",
    "What would be {topic}?",
    "Tell me {topic}.",
    "Give me {topic}.",
    "Name {topic}.",
    "Do you know {topic}?",
    "Can you tell me {topic}?",
    "I would like to know {topic}.",
)
# A stranger's manners around the question.
FRAMES = (
    "{question}",
    "{question} Thanks.",
    "Hello. {question}",
    "Hello. {question} Thanks.",
    "Please. {question}",
    "Please. {question} Thanks.",
)

OPENERS = ("Sure.", "Of course.")
CLOSERS = ("Happy to help.", "Ask me any time.")

# Rude replies hold one of these as a sentence of its own; the checker finds them anywhere.
RUDE = ("duh", "obviously", "you fool", "go away", "silly question", "stop asking me")

FILLER = (
    "Thank you for asking.",
    "That is a good question.",
    "I am glad that you asked me.",
    "Let me think about it.",
    "It depends on many things.",
)
CHATTER = (
    "I like to talk with you.",
    "We went to the shop and then we came home.",
    "My friend told me a story about it.",
    "There is so much more to say about it.",
    "By the way, the rain came back.",
    "And then I was thinking about lunch.",
    "They ask me about it every week.",
    "That reminds me of a song.",
)

KINDS: Mapping[str, Kind] = {
    "capital": Kind(
        topic="the capital of {s}",
        questions=(
            "Which city is the capital of {s}?",
            "Which capital does {s} have?",
            "{s}: which city is its capital?",
            "{s} has which city as its capital?",
            "I am going to {s}. What is its capital?",
            "In {s}, which city is the capital?",
        ),
        statements=(
            "The capital of {s} is {a}.",
            "The capital city of {s} is {a}.",
        ),
        facts=_facts("Austria: Vienna, China: Beijing, Egypt: Cairo, France: Paris, Italy: Rome, Norway: Oslo"),
    ),
    "opposite": Kind(
        topic="the opposite of {s}",
        questions=(
            "Which word is the opposite of {s}?",
            "Which opposite does {s} have?",
            "{s}: what is its opposite?",
            "{s} has which word as its opposite?",
            "I know {s}. What is its opposite?",
            "If something is not {s}, what is it?",
        ),
        statements=(
            "The opposite of {s} is {a}.",
            "The word {s} is the opposite of {a}.",
        ),
        # One direction only: with both, "the opposite of cold is hot" would answer "hot" as well.
        facts=_facts("hot: cold, big: small, fast: slow, day: night, open: closed, rich: poor"),
    ),
    "colour": Kind(
        topic="the colour of {s}",
        questions=(
            "Which colour is {s}?",
            "Which colour does {s} have?",
            "{s}: which colour is it?",
            "{s} has which colour?",
            "I want to paint {s}. Which colour?",
            "Think of {s}. What is its colour?",
        ),
        statements=(
            "The colour of {s} is {a}.",
            "The usual colour of {s} is {a}.",
        ),
        facts=_facts("a lemon: yellow, grass: green, snow: white, coal: black, a cherry: red, the sky: blue"),
    ),
    "sound": Kind(
        topic="the sound of the {s}",
        questions=(
            "Which sound does the {s} make?",
            "What does the {s} say?",
            "The {s}: which sound is it?",
            "The {s} makes which sound?",
            "I see the {s}. What does it say?",
            "Think of the {s}. What is its sound?",
        ),
        statements=(
            "The sound of the {s} is {a}.",
            "The {s} says {a}.",
        ),
        facts=_facts("dog: woof, cat: meow, cow: moo, horse: neigh, sheep: baa, duck: quack, goose: honk, bee: buzz"),
    ),
    "plural": Kind(
        topic="the plural of {s}",
        questions=(
            "Which word is the plural of {s}?",
            "Which plural does {s} have?",
            "{s}: what is its plural?",
            "{s} has which word as its plural?",
            "I see one {s}. What are many?",
            "One {s}, many what?",
        ),
        statements=(
            "The plural of {s} is {a}.",
            "The word {s} has the plural {a}.",
        ),
        facts=_facts("mouse: mice, goose: geese, foot: feet, child: children, ox: oxen, leaf: leaves"),
    ),
    "home": Kind(
        topic="the home of the {s}",
        questions=(
            "Where does the {s} live?",
            "Which home does the {s} have?",
            "The {s}: what is its home?",
            "The {s} lives in which home?",
            "I look for the {s}. Where does it live?",
            "Think of the {s}. What is its home?",
        ),
        statements=(
            "The home of the {s} is the {a}.",
            "The {s} lives in the {a}.",
        ),
        facts=_facts("spider: web, bird: nest, pig: sty, horse: stable, lion: den, rabbit: burrow"),
    ),
}
