"""Instructions that a program can check, by the names of IFEval (Zhou 2023, "Instruction-Following Evaluation").

The rows are those of its data set: `instruction_id_list`, and `kwargs`, one object for each instruction.
Sentences are counted by their end marks, not by NLTK; the language of an answer is not looked at.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from kinkajou.data import strict_json
from kinkajou.data.records import shown
from kinkajou.errors import UserError
from kinkajou.rewards.answer import Answer, Rule, field


class Options:
    """The arguments of one instruction; a missing or wrong one is the row's fault."""

    def __init__(self, given: Mapping[str, Any], instruction: str, place: str) -> None:
        self.given, self.instruction, self.place = given, instruction, place

    def fault(self, name: str, wanted: str) -> UserError:
        return UserError(
            f'{self.place}: {self.instruction} needs "{name}" in kwargs, {wanted}',
            evidence=shown(repr(self.given.get(name))),
        )

    def whole(self, name: str) -> int:
        value = self.given.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**9 or value % 1:
            raise self.fault(name, "a whole number below 1,000,000,000")
        return int(value)

    def text(self, name: str) -> str:
        value = self.given.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(name, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.given.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value):
            raise self.fault(name, "a list of texts")
        return cast(list[str], value)

    def compare(self, count: int, relation: str, wanted: str) -> bool:
        """`count` stands in the relation to the whole number called `wanted`."""
        match self.given.get(relation):
            case "at least":
                return count >= self.whole(wanted)
            case "less than":
                return count < self.whole(wanted)
        raise self.fault(relation, '"at least" or "less than"')


Check = Callable[[str, Options], bool]


def keyword_frequency(text: str, of: Options) -> bool:
    return of.compare(text.casefold().count(of.text("keyword").casefold()), "relation", "frequency")


def forbidden_words(text: str, of: Options) -> bool:
    words = of.texts("forbidden_words")
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words)


def letter_frequency(text: str, of: Options) -> bool:
    letter = of.text("letter").strip().lower()
    if len(letter) != 1:
        raise of.fault("letter", "one letter")
    return of.compare(text.lower().count(letter), "let_relation", "let_frequency")


def sentences(text: str) -> int:
    """Ends of sentences: . ! ? followed by white space or the end; what stands after the last one counts as one."""
    closed = [part for part in re.split(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？]+", text) if part.strip()]  # noqa: RUF001
    return len(closed)


def paragraphs(text: str) -> int:
    """Parts between `***`; 0 where one in the middle is empty."""
    parts = [part.strip() for part in text.split("***")]
    if not all(parts[1:-1]):
        return 0
    return sum(map(bool, parts))


def nth_paragraph(text: str, of: Options) -> bool:
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    nth = of.whole("nth_paragraph")
    if len(parts) != of.whole("num_paragraphs") or not 1 <= nth <= len(parts):
        return False
    first = re.match(r"[\"']*([^\s.,?!\"']*)", parts[nth - 1])
    return first is not None and first[1].lower() == of.text("first_word").strip().lower()


def postscript(text: str, of: Options) -> bool:
    marker = re.escape(of.text("postscript_marker").strip().lower())
    spaced = {r"p\.p\.s": r"p\.\s?p\.\s?s", r"p\.s\.": r"p\.\s?s\."}
    return re.search(spaced.get(marker, marker), text.lower()) is not None


def bullets(text: str) -> int:
    return len(re.findall(r"^[ \t]*(?:\*[^*\n]|-)", text, re.MULTILINE))


def highlights(text: str) -> int:
    """*one* and **another**."""
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    single = re.findall(r"(?<!\*)\*([^\n*]+)\*(?!\*)", text)
    return sum(1 for part in (*double, *single) if part.strip())


def sections(text: str, of: Options) -> bool:
    name = re.escape(of.text("section_spliter").strip())
    return len(re.findall(rf"{name}\s?\d+", text)) >= of.whole("num_sections")


def is_json(text: str, of: Options) -> bool:
    body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        strict_json.parse(body)
    except strict_json.JSONFault:
        return False
    return True


def title(text: str, of: Options) -> bool:
    return any(found.strip() for found in re.findall(r"<<([^\n<>]+)>>", text))


def two_responses(text: str, of: Options) -> bool:
    parts = [part.strip() for part in text.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def repeats_prompt(text: str, of: Options) -> bool:
    return text.strip().lower().startswith(of.text("prompt_to_repeat").strip().lower())


def ends_with(text: str, of: Options) -> bool:
    return text.strip().strip('"').lower().endswith(of.text("end_phrase").strip().lower())


def quoted(text: str, of: Options) -> bool:
    said = text.strip()
    return len(said) > 1 and said[0] == said[-1] == '"'


def capital_words(text: str, of: Options) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w'-]+", text))
    return of.compare(count, "capital_relation", "capital_frequency")


CHOICES = ("my answer is yes.", "my answer is no.", "my answer is maybe.")
CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, of: all(w.casefold() in text.casefold() for w in of.texts("keywords")),
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_words": lambda text, of: of.compare(
        len(re.findall(r"\w+", text)), "relation", "num_words"
    ),
    "length_constraints:number_sentences": lambda text, of: of.compare(sentences(text), "relation", "num_sentences"),
    "length_constraints:number_paragraphs": lambda text, of: paragraphs(text) == of.whole("num_paragraphs"),
    "length_constraints:nth_paragraph_first_word": nth_paragraph,
    "detectable_content:number_placeholders": lambda text, of: (
        len(re.findall(r"\[[^\[\]\n]+\]", text)) >= of.whole("num_placeholders")
    ),
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda text, of: bullets(text) == of.whole("num_bullets"),
    "detectable_format:constrained_response": lambda text, of: any(choice in text.lower() for choice in CHOICES),
    "detectable_format:number_highlighted_sections": lambda text, of: highlights(text) >= of.whole("num_highlights"),
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:start_phrase": lambda text, of: (
        text.strip().strip('"').lower().startswith(of.text("start_phrase").strip().lower())
    ),
    "startend:end_checker": ends_with,
    "startend:quotation": quoted,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": lambda text, of: text.isupper(),
    "change_case:english_lowercase": lambda text, of: text.islower(),
    "punctuation:no_comma": lambda text, of: "," not in text,
}
UNCHECKED = ("language:response_language",)
"""Known to IFEval, but needs a language detector."""


def ifeval(argument: str) -> Rule:
    """Share of the row's instructions that the answer follows; an empty answer follows none.

    `rule:ifeval:skip` leaves out the instruction that cannot be checked instead of refusing the row.
    """
    if argument not in ("", "skip"):
        raise UserError("rule:ifeval takes no argument but skip", evidence=repr(argument), fix="rule:ifeval:skip")

    def rule(answer: Answer) -> float:
        found = [check(answer.text, options) for check, options in instructions(answer, skip=argument == "skip")]
        return sum(found) / len(found) if answer.text.strip() else 0.0

    return rule


def instructions(answer: Answer, *, skip: bool) -> list[tuple[Check, Options]]:
    """The row's checks with their arguments; UserError where a name is unknown or nothing is left to check."""
    place = answer.prompt.place
    names, given = field(answer, "instruction_id_list", "rule:ifeval"), field(answer, "kwargs", "rule:ifeval")
    sound = isinstance(names, list) and isinstance(given, list) and len(names) == len(given) and names
    if not sound or not all(isinstance(item, dict | None) for item in given):
        raise UserError(
            f"{place}: instruction_id_list and kwargs must be lists of one length",
            evidence=f"{shown(str(names))} and {shown(str(given))}",
        )
    chosen = []
    for name, item in zip(map(str, names), given, strict=True):
        if name in UNCHECKED and not skip:
            fix = "leave such rows out, or say rule:ifeval:skip to leave the instruction out"
            raise UserError(f"{place}: rule:ifeval cannot check {name}", fix=fix)
        if name not in CHECKS and name not in UNCHECKED:
            raise UserError(f"{place}: rule:ifeval does not know {shown(name)}", fix=f"known: {', '.join(CHECKS)}")
        if name in CHECKS:
            chosen.append((CHECKS[name], Options(item or {}, name, place)))
    if not chosen:
        raise UserError(f"{place}: rule:ifeval can check none of the row's instructions", evidence=", ".join(names))
    return chosen
