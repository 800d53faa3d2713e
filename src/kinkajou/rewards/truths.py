"""Rules that compare an answer with the truth in its row: text, number, LaTeX in a box, a sequence of numbers."""

import re
from dataclasses import dataclass
from fractions import Fraction

from kinkajou.data.records import shown
from kinkajou.errors import UserError
from kinkajou.rewards.answer import Answer, Rule, field

MAX_NUMBER = 200
"""Longest number in characters: Python refuses integers beyond 4,300 digits, and nobody means them."""

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A sign belongs to a number only where nothing that could be subtracted from stands before it.
NUMBER = re.compile(
    rf"(?:(?<![\w).])(?P<sign>[-+]))?\$?(?:(?P<whole>\d{{1,9}})\s+(?=\d+/\d))?"
    rf"(?P<top>{_PLAIN})(?P<power>[eE][-+]?\d{{1,3}}(?!\w))?(?:\s?/\s?(?P<bottom>{_PLAIN}))?(?P<percent>\s?%)?"
)

BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
LATEX = (
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2"),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2"),
    (r"-\s+(?=\d+/\d)", "-"),
    (r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:left|right|displaystyle)\b|\\[!,;: ]", ""),
    (r"\{,\}(?=\d)", ","),
    (r"\\([$%])", r"\1"),
)


@dataclass(frozen=True)
class Number:
    value: Fraction  # as written: 50 for 50 %
    percent: bool

    def same(self, other: "Number") -> bool:
        """50 % is 0.5, and is 50 where the other side leaves the sign out."""
        if self.percent == other.percent:
            return self.value == other.value
        written, plain = (self, other) if self.percent else (other, self)
        return plain.value in (written.value, written.value / 100)


def exact(argument: str) -> Rule:
    """1 if the whole answer is the row's `answer` (or one of a list), whatever its case and white space."""
    name = argument or "answer"

    def rule(answer: Answer) -> float:
        truth = field(answer, name, "rule:exact")
        accepted = truth if isinstance(truth, list) else [truth]
        return float(folded(answer.text) in {folded(str(text)) for text in accepted})

    return rule


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


def number(argument: str) -> Rule:
    """1 if the answer's final number equals that of the row's `answer`: after `####`, else boxed, else the last."""
    name = argument or "answer"

    def rule(answer: Answer) -> float:
        truth = field(answer, name, "rule:number")
        wanted = final_number(str(truth))
        if wanted is None or isinstance(truth, bool):
            raise UserError(
                f"{answer.prompt.place}: there is no number in the row's field {shown(name)}",
                evidence=shown(str(truth)),
                fix="rule:exact or rule:boxed compare text",
            )
        found = final_number(answer.text)
        return float(found is not None and found.same(wanted))

    return rule


def final_number(text: str) -> Number | None:
    """The first after the last `####`, else the last in the last `\\boxed{}`, else the last of all."""
    _, mark, marked = text.rpartition("####")
    if mark and (found := numbers_in(marked.partition("\n")[0])):
        return found[0]
    found = numbers_in(last_box(text) or "") or numbers_in(text)
    return found[-1] if found else None


def numbers_in(text: str) -> list[Number]:
    read = map(read_number, NUMBER.finditer(plain_latex(text).replace("\N{MINUS SIGN}", "-")))
    return [found for found in read if found is not None]


def read_number(match: re.Match[str]) -> Number | None:
    """The value of a match of NUMBER; None beyond its bounds and for a division by 0."""
    if len(match[0]) > MAX_NUMBER:
        return None
    value = Fraction(match["top"].replace(",", "") + (match["power"] or ""))
    if match["bottom"]:
        bottom = Fraction(match["bottom"].replace(",", ""))
        if not bottom:
            return None
        value /= bottom
    if match["whole"]:
        value += int(match["whole"])
    return Number(-value if match["sign"] == "-" else value, bool(match["percent"]))


def last_box(text: str) -> str | None:
    """What stands in the last closed `\\boxed{...}`, braces matched; None without one."""
    opened: list[tuple[int, bool]] = []
    last = (-1, -1)
    for match in BRACE.finditer(text):
        if match[0].endswith("{") and not match[0].startswith(r"\{"):
            opened.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            start, is_box = opened.pop()
            last = max(last, (start, match.start())) if is_box else last
    return text[slice(*last)] if last[0] >= 0 else None


def plain_latex(text: str) -> str:
    """`\\frac{a}{b}` as a/b, and without what only changes the looks."""
    for pattern, plain in LATEX:
        text = re.sub(pattern, plain, text)
    return text


def boxed(argument: str) -> Rule:
    """1 if the last `\\boxed{}` holds the row's `answer`: the same number, or the same text without spaces."""
    name = argument or "answer"

    def rule(answer: Answer) -> float:
        truth = str(field(answer, name, "rule:boxed"))
        wanted, found = last_box(truth) or truth, last_box(answer.text)
        return float(found is not None and same_box(found, wanted))

    return rule


def same_box(found: str, wanted: str) -> bool:
    one, two = (plain_latex(text).strip().strip("$").strip() for text in (found, wanted))
    numbers = [NUMBER.fullmatch(text.replace("\N{MINUS SIGN}", "-")) for text in (one, two)]
    if numbers[0] and numbers[1]:
        left, right = read_number(numbers[0]), read_number(numbers[1])
        return left is not None and right is not None and left.same(right)
    return "".join(one.split()) == "".join(two.split()) != ""


def sequence(argument: str) -> Rule:
    """Share of the next numbers of an arithmetic sequence: the prompt is `first,second:modulus,count`.

    Leading characters that are right, plus 1 if the whole answer is and ended, of all that could be had.
    """

    def rule(answer: Answer) -> float:
        truth = sequence_truth(answer)
        right = 0
        while right < min(len(truth), len(answer.text)) and truth[right] == answer.text[right]:
            right += 1
        return (right + (answer.text == truth and answer.ended)) / (len(truth) + 1)

    return rule


def sequence_truth(answer: Answer) -> str:
    """`8,3:9,4` -> `7,2,6,1`: the next 4 numbers with the difference (3 - 8) modulo 9."""
    match = re.fullmatch(r"(\d{1,6}),(\d{1,6}):(\d{1,6}),(\d{1,4})", answer.question.strip())
    first, second, modulus, count = map(int, match.groups()) if match else (0, 0, 0, 0)
    if not modulus:
        raise UserError(
            f"{answer.prompt.place}: rule:sequence needs the prompt first,second:modulus,count",
            evidence=shown(answer.question),
            fix="8,3:9,4 asks for 7,2,6,1",
        )
    step = (second - first) % modulus
    return ",".join(str((second + step * (i + 1)) % modulus) for i in range(count))
