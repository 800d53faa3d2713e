"""What can be known to be wrong before the first step: named checks over records, their tokens and the tokenizer.

Each gives one finding.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Literal, TypeAlias

from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.records import Chat, Judged, Message, Messages, Pair, Prompt, shown
from kinkajou.findings import Finding, Level, passed

Record: TypeAlias = Chat | Pair | Judged | Prompt
FEW = 0.01
"""Up to this share of the records is a note; more is a warning."""
MUCH_CUT = 0.05
FEW_ENDED = 0.9


# --- records ----------------------------------------------------------------------------------------------


def prompt_of(record: Record) -> Messages:
    """What stands before the answer; nothing for raw text."""
    match record:
        case Chat():
            return record.messages[:-1]
        case Prompt():
            return record.messages
        case _:
            return record.prompt


def answers_of(record: Record) -> tuple[Messages, ...]:
    match record:
        case Chat():
            return (record.messages[-1:],)
        case Pair():
            return (record.chosen, record.rejected)
        case Judged():
            return (record.answer,)
        case Prompt():
            return ()


def folded(messages: Messages) -> tuple[str, ...]:
    """The same for texts that differ in blanks and capitals alone."""
    return tuple(f"{m.role}: {' '.join(m.content.split()).casefold()}" for m in messages)


def identity(record: Record) -> tuple[object, ...]:
    """Equal for records that teach the same."""
    return (folded(prompt_of(record)), *map(folded, answers_of(record)))


def duplicates(records: Sequence[Record]) -> Finding:
    known = [identity(record) for record in records]
    times = Counter(known)
    again = len(records) - len(times)
    if not again:
        return passed("duplicates", f"no two of {len(records):,} records are the same")
    most, count = times.most_common(1)[0]
    evidence = f"{share(again, len(records))} records; {records[known.index(most)].place} stands there {count} times"
    if isinstance(records[0], Prompt):
        cause = "prompts repeat others and are asked more often"
        return Finding("duplicates", cause, evidence, "leave each prompt once, unless it is meant so", "note")
    cause = "records repeat others, and what is repeated is learnt by heart"
    level: Level = "warning" if again > FEW * len(records) else "note"
    return Finding("duplicates", cause, evidence, "leave each record once", level)


def overlap(train: Sequence[Record], held_out: Sequence[Record]) -> Finding:
    """Held-out records that training sees, whole or their prompts."""
    if not held_out:
        option = "--eval_prompts" if isinstance(train[0], Prompt) else "--eval_share 0.02 or --eval_data"
        cause = "no records are held out, so nothing tells learning from memory"
        return Finding("overlap", cause, f"all {len(train):,} records are trained on", option, "note")
    records, prompts = set(map(identity, train)), set(map(folded, map(prompt_of, train)))
    whole = [record for record in held_out if identity(record) in records]
    asked = [record for record in held_out if prompt_of(record) and folded(prompt_of(record)) in prompts]
    if not asked and not whole:
        return passed("overlap", f"none of {len(held_out):,} held-out records, nor its prompt, is trained on")
    cause = "held-out records are trained on, so held-out figures would be too good"
    evidence = (
        f"{share(len(whole), len(held_out))} held-out records are training records too, and the prompts of "
        f"{len(asked):,}; the first is {(whole or asked)[0].place}"
    )
    level: Level = "warning" if whole or len(asked) > FEW * len(held_out) else "note"
    return Finding("overlap", cause, evidence, "take them out of one of the two", level)


def controls(records: Sequence[Record], pattern: re.Pattern[str]) -> Finding:
    """Words such as <end> or <|im_start|> in what a message says."""
    words, places = Counter[str](), list[str]()
    for record in records:
        messages = (*prompt_of(record), *(m for answer in answers_of(record) for m in answer))
        found = [word for message in messages for word in pattern.findall(message.content)]
        if found:
            words.update(found)
            places.append(record.place)
    if not places:
        return passed("control_words", "no record spells out a control token")
    common = ", ".join(f"{shown(word)} {count:,} times" for word, count in words.most_common(3))
    level: Level = "warning" if len(places) > FEW * len(records) else "note"
    return Finding(
        "control_words",
        "records spell out control tokens",
        f"{share(len(places), len(records))} records: {common}; the first is {places[0]}",
        "nothing if people typed them: they are read as plain letters. If a template wrote them, give the records "
        "without it",
        level,
    )


# --- tokens -----------------------------------------------------------------------------------------------


def stretches(row: Encoded) -> Iterator[tuple[int, int]]:
    """Beginning and end of each unbroken run of tokens that count."""
    yield from (found.span() for found in re.finditer(rb"\x01+", bytes(row.counts)))


def end_token(rows: Sequence[Encoded], end_ids: frozenset[int]) -> Finding:
    """Answers whose end token counts."""
    ends = [(row, end) for row in rows for _, end in stretches(row)]
    ended = sum(row.tokens[end - 1] in end_ids for row, end in ends)
    evidence = f"{share(ended, len(ends))} answers end in an end token that counts"
    action = "raise --max_len if they are cut; look for `ended: false` in the records"
    if ended == len(ends):
        return passed("end_token", evidence)
    if not ended and any(not all(row.counts) for row in rows):  # raw text may have no end
        return Finding("end_token", "the model would never learn to stop", evidence, action, "error")
    level: Level = "warning" if ended < FEW_ENDED * len(ends) else "note"
    return Finding("end_token", "answers have no end, and teach none", evidence, action, level)


def pad(rows: Sequence[Encoded], *, pad_id: int, end_ids: frozenset[int], begin_id: int | None) -> Finding:
    """The pad token stands for nothing else."""
    action = "give the tokenizer a pad token of its own"
    if pad_id in end_ids or pad_id == begin_id:
        what = "ends answers" if pad_id in end_ids else "opens texts"
        return Finding("pad", f"the pad token also {what}", f"token {pad_id} does both", action, "error")
    held = [row for row in rows if pad_id in row.tokens]
    trained = sum(pad_id in compress(row.tokens, row.counts) for row in held)
    if held:
        cause = "the pad token stands for something else too"
        evidence = f"token {pad_id} stands in {share(len(held), len(rows))} rows and counts in {trained:,}"
        return Finding("pad", cause, evidence, action, "error" if trained else "warning")
    ends = ", ".join(map(str, sorted(end_ids)))
    return passed("pad", f"pad is token {pad_id}, apart from the end ({ends}); no row holds it")


def dropped(lost: int, total: int, *, name: str, why: str, action: str) -> Finding:
    """Sequences that are left out of training."""
    if not lost:
        return passed(name, f"none of {total:,} sequences is left out")
    level: Level = "error" if lost == total else "warning" if lost > FEW * total else "note"
    return Finding(name, f"sequences {why} and are left out", f"{share(lost, total)} sequences", action, level)


def cut(
    lengths: Sequence[int],
    max_len: int,
    *,
    side: Literal["end", "beginning"],
    whole: bool = True,
    positions: int | None = None,
) -> Finding:
    """Sequences longer than `max_len`.  `whole` False: the lengths are those that cutting left."""
    over = sum(length > max_len if whole else length >= max_len for length in lengths)
    if not over:
        return passed("cut", f"all {len(lengths):,} sequences fit --max_len {max_len}")
    verb = f"are longer than --max_len {max_len} and lose their {side}" if whole else f"fill --max_len {max_len}"
    level: Level = "warning" if over > MUCH_CUT * len(lengths) else "note"
    wanted = quantile(lengths, 0.99)
    if positions is not None and wanted > positions:
        action = f"99 % have up to {wanted} tokens, the model {positions} positions: shorten the records"
    else:
        action = f"--max_len {wanted} would keep 99 % whole" if whole and wanted > max_len else "raise --max_len"
    return Finding("cut", f"sequences {verb}", f"{share(over, len(lengths))} sequences", action, level)


def lengths_told(lengths: Sequence[int]) -> Finding:
    marks = ", ".join(f"{name} {quantile(lengths, q):,}" for name, q in (("half", 0.5), ("90 %", 0.9), ("99 %", 0.99)))
    return passed("lengths", f"tokens a sequence up to: {marks}, all {max(lengths):,}")


def unknown(rows: Sequence[Encoded], unk_id: int | None) -> Finding:
    total = sum(len(row.tokens) for row in rows)
    lost = 0 if unk_id is None else sum(row.tokens.count(unk_id) for row in rows)
    if not lost:
        return passed("unknown", f"the tokenizer has every character of {total:,} tokens")
    level: Level = "warning" if lost > 0.001 * total else "note"
    cause = "the tokenizer does not have what stands in the records"
    evidence = f"{share(lost, total)} tokens are its unknown one"
    return Finding("unknown", cause, evidence, "give a tokenizer made for this language", level)


def quantile(numbers: Sequence[int], q: float) -> int:
    """The smallest that at least the share q do not exceed."""
    return sorted(numbers)[max(0, math.ceil(q * len(numbers)) - 1)]


def histogram(lengths: Sequence[int], *, bins: int = 10) -> list[tuple[int, int, int]]:
    """Shortest and longest of each bin, and how many are in it; about `bins` of a round width."""
    raw = max(1, -(-(max(lengths) + 1) // bins))
    scale = 10 ** (len(str(raw)) - 1)
    width = next(step * scale for step in (1, 2, 5, 10) if step * scale >= raw)
    counts = Counter(length // width for length in lengths)
    return [(i * width, (i + 1) * width - 1, counts[i]) for i in range(min(counts), max(counts) + 1)]


# --- template ---------------------------------------------------------------------------------------------


def template(records: Sequence[Record], form: ChatFormat, *, most: int) -> list[Finding]:
    """Turns and round trip, over `most` records evenly from the first to the last."""
    picked = spread(records, most)
    chats = [(record.place, chat) for record in picked for chat in chats_of(record) if chat]
    faults = [fault for place, chat in chats if (fault := rewritten(chat, form, place))]
    turns = turns_told(len(faults), len(chats), faults[0]) if faults else same_tokens(chats, form)
    return [turns] if faults else [turns, round_trip(chats, form)]


def chats_of(record: Record) -> list[Messages]:
    """Whole chats; a prompt is answered by its own last words, to have an answer in the language of the data."""
    if isinstance(record, Prompt):
        return [(*record.messages, Message("assistant", record.messages[-1].content.strip() or "yes"))]
    return [(*prompt_of(record), *answer) for answer in answers_of(record)]


def spread(records: Sequence[Record], most: int) -> list[Record]:
    if len(records) <= most:
        return list(records)
    return [records[i * len(records) // most] for i in range(most)]


def rewritten(chat: Messages, form: ChatFormat, place: str) -> str:
    """Where a longer chat's rendering does not begin with the shorter one's; "" where it always does."""
    done = ""
    for i, message in enumerate(chat):
        if message.role != "assistant":
            continue
        before, after = form.render(chat[:i], to_answer=True), form.render(chat[: i + 1], to_answer=False)
        for early, late in ((done, before), (before, after)):
            if not late.startswith(early):
                at = next((k for k, (a, b) in enumerate(zip(early, late, strict=False)) if a != b), len(late))
                old, new = shown(early[max(0, at - 10) :], 30), shown(late[max(0, at - 10) :], 30)
                return f"{place}, message {i + 1}: {old} becomes {new}"
        done = after[: after.rindex(form.end_word) + len(form.end_word)]
    return ""


def turns_told(faults: int, total: int, first: str) -> Finding:
    return Finding(
        "turns",
        "the template rewrites earlier turns",
        f"{share(faults, total)} chats looked at; {first}",
        "--template alpaca, human_assistant or plain; or one record for each answer",
        "error",
    )


def same_tokens(chats: Sequence[tuple[str, Messages]], form: ChatFormat) -> Finding:
    """The prompt of each turn, as generation reads it, is how the chat begins in training."""
    asked = [(n, chat[:i]) for n, (_, chat) in enumerate(chats) for i, m in enumerate(chat) if m.role == "assistant"]
    rows = form.conversations(chat for _, chat in chats)
    prompts = form.prompts(prompt for _, prompt in asked)
    other = [n for (n, _), prompt in zip(asked, prompts, strict=True) if rows[n].tokens[: len(prompt)] != prompt]
    if other:
        cause = "prompts have other tokens when they are answered than in training"
        evidence = f"{share(len(other), len(asked))} prompts; the first is {chats[other[0]][0]}"
        return Finding("turns", cause, evidence, "report it: prompt and chat are tokenised by the same code")
    return passed("turns", f"each of {len(asked):,} prompts is how its chat goes on, in text and tokens")


def round_trip(chats: Sequence[tuple[str, Messages]], form: ChatFormat) -> Finding:
    """Answers decoded from their tokens are what they were."""
    total, lost, first = 0, 0, ""
    for (place, chat), row in zip(chats, form.conversations(chat for _, chat in chats), strict=True):
        said, parts = [m.content.strip() for m in chat if m.role in ("assistant", "text")], list(stretches(row))
        if len(said) != len(parts):
            continue  # two answers in a row make one stretch
        for text, (start, end) in zip(said, parts, strict=True):
            back = form.answer([token for token in row.tokens[start:end] if token not in form.end_ids])
            total += 1
            if back != text:
                lost += 1
                first = first or f"{place}: {difference(text, back)}"
    if not lost:
        return passed("round_trip", f"{total:,} answers looked at come back from their tokens as they were")
    return Finding(
        "round_trip",
        "answers come back changed from their tokens",
        f"{share(lost, total)} answers looked at; {first}",
        "give a tokenizer that keeps every character, or write the records as it would",
    )


def difference(text: str, back: str) -> str:
    at = next((k for k, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return f"{shown(text[max(0, at - 10) :], 30)} becomes {shown(back[max(0, at - 10) :], 30)}"


# --- model ------------------------------------------------------------------------------------------------


def vocabulary(form: ChatFormat, *, rows: int, model_ends: frozenset[int]) -> Finding:
    """The tokenizer's entries and the embedding's rows; `model_ends` are the end tokens of the model's own settings."""
    top = max(form.tokenizer.get_vocab().values()) + 1
    grows = top - 1 == form.pad_id and top > rows  # our own pad token gets a row when the model is loaded
    names = {"end": form.end_word, "pad": form.tokenizer.pad_token, "begin": form.tokenizer.bos_token}
    words = ", ".join(f"{name} {shown(str(word))}" for name, word in names.items() if word)
    evidence = f"{top:,} entries, {rows:,} rows{' and one more for pad' if grows else ''}; {words}"
    action = "give the tokenizer that the model was trained with (--tokenizer)"
    if top - grows > rows:
        cause = "the tokenizer has entries that the model's embedding has no rows for"
        return Finding("vocabulary", cause, evidence, action, "error")
    if top < 0.9 * rows:
        cause = "many rows of the model's embedding have no entry in the tokenizer"
        return Finding("vocabulary", cause, f"{evidence}; {rows - top:,} rows have no entry", action)
    if model_ends and not model_ends & form.end_ids:
        ends = ", ".join(map(str, sorted(model_ends)))
        cause = "the model's settings end texts at another token than the tokenizer"
        return Finding("vocabulary", cause, f"{evidence}; the model's settings say {ends}", action, "note")
    return passed("vocabulary", evidence)


def context(longest: int, *, max_len: int, positions: int | None) -> Finding:
    if positions is None:
        return passed("context", f"the longest sequence has {longest:,} tokens; the model sets no bound")
    evidence = f"the longest sequence has {longest:,} tokens, the model {positions:,} positions, --max_len is {max_len}"
    if longest > positions:
        cause = "sequences are longer than the model's context"
        return Finding("context", cause, evidence, f"--max_len {positions}", "error")
    if max_len > positions:
        cause = "--max_len goes beyond the model's context"
        return Finding("context", cause, evidence, f"--max_len {positions}", "note")
    return passed("context", evidence)


# --- words ------------------------------------------------------------------------------------------------


def share(part: int, whole: int) -> str:
    """How many of how many, and in percent: a part is never shown as 0 %, nor less than all as 100 %."""
    percent = 100 * part / max(whole, 1)
    told = f"{percent:.1f}" if 0.05 <= percent < 99.95 or part in (0, whole) else "<0.1" if percent < 50 else ">99.9"
    return f"{part:,} of {whole:,} ({told.removesuffix('.0')} %)"
