"""Pairs and judged answers as tokens: the answer counts, its end token too, and the prompt before it does not."""

from collections.abc import Sequence
from dataclasses import dataclass

from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.sources import Judged, Pair
from kinkajou.train.setup import Say, tell

Compared = tuple[Encoded, Encoded]
"""Chosen and rejected, each with its prompt."""


@dataclass(frozen=True)
class JudgedRow:
    """Apart from its prompt: KTO also asks for the answers to other prompts."""

    prompt: list[int]
    answer: Encoded
    good: bool


def cut_to_fit(prompt: Sequence[int], answer: Encoded, max_len: int, *, longest: int = 0) -> Encoded:
    """Prompt and answer within `max_len` tokens: the prompt loses its beginning, down to one token, then the answer
    its end.  `longest` leaves room for the longer answer of a pair, so that both have the same prompt."""
    room = max(1, max_len - max(longest, len(answer.tokens)))
    lead = prompt[-room:]
    return Encoded([*lead, *answer.tokens][:max_len], ([False] * len(lead) + answer.counts)[:max_len])


def encode_compared(pairs: Sequence[Pair], form: ChatFormat, max_len: int, say: Say) -> list[Compared]:
    """Pairs as tokens; those with the same tokens on both sides teach nothing and are dropped."""
    rows, cut, shortened = list[Compared](), 0, 0
    for pair in pairs:
        sides = [form.answered(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        longest = max(len(answer.tokens) for _, answer in sides)
        cut += max(len(prompt) for prompt, _ in sides) + longest > max_len
        shortened += longest >= max_len
        chosen, rejected = (cut_to_fit(prompt, answer, max_len, longest=longest) for prompt, answer in sides)
        rows.append((chosen, rejected))
    tell_cut(say, "pairs", len(rows), max_len, cut, shortened)
    different = [row for row in rows if row[0].tokens != row[1].tokens]
    same = len(rows) - len(different)
    tell(say, f"{same} of {len(rows)} pairs have the same tokens on both sides and were dropped", same)
    return different


def encode_judged(records: Sequence[Judged | Pair], form: ChatFormat, max_len: int, say: Say) -> list[JudgedRow]:
    """Judged answers as tokens; a pair becomes a good one and a bad one."""
    rows = list[JudgedRow]()
    for record in records:
        if isinstance(record, Pair):
            rows += [
                JudgedRow(*form.answered(record.prompt, record.chosen), True),
                JudgedRow(*form.answered(record.prompt, record.rejected), False),
            ]
        else:
            rows.append(JudgedRow(*form.answered(record.prompt, record.answer), record.good))
    cut = sum(len(row.prompt) + len(row.answer.tokens) > max_len for row in rows)
    shortened = sum(len(row.answer.tokens) >= max_len for row in rows)
    tell_cut(say, "records", len(rows), max_len, cut, shortened)
    return rows


def tell_cut(say: Say, what: str, total: int, max_len: int, cut: int, shortened: int) -> None:
    tell(say, f"{cut} of {total} {what} are longer than {max_len} tokens: their prompts lost their beginning", cut)
    tell(say, f"{shortened} of {total} {what} have an answer that does not fit and lost its end", shortened)
