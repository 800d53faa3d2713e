"""Every check on data that trips it and on data that does not; what is seen is counted by hand."""

import pytest
from transformers import PreTrainedTokenizerFast

from kinkajou.data import preflight as checks
from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.preflight import Record
from kinkajou.data.records import Chat, Judged, Message, Pair, Prompt
from kinkajou.data.tokenizer import prepare, train_tokenizer
from kinkajou.findings import Finding
from tiny import tiny_tokenizer

END = frozenset({2})
REWRITES = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
# As a template does that shows the reasoning of the last answer alone: same length, other text.
FORGETS = (
    "{% for m in messages %}{{ m.role if loop.last or m.role == 'user' else 'ASSISTANT' }}:{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def said(text: str, *, role: str = "user") -> Message:
    return Message(role, text)  # type: ignore[arg-type]


def chat(question: str, answer: str, place: str = "data.jsonl:1") -> Chat:
    return Chat((said(question), said(answer, role="assistant")), place)


def turns(*texts: str) -> Chat:
    roles = ("user", "assistant")
    return Chat(tuple(said(text, role=roles[i % 2]) for i, text in enumerate(texts)), "data.jsonl:7")


def pair(prompt: str, chosen: str, rejected: str, place: str = "pairs.jsonl:1") -> Pair:
    return Pair((said(prompt),), (said(chosen, role="assistant"),), (said(rejected, role="assistant"),), place)


def prompt(text: str, place: str = "prompts.jsonl:1") -> Prompt:
    return Prompt((said(text),), {}, place)


def row(tokens: str, counts: str) -> Encoded:
    return Encoded([int(t) for t in tokens], [c == "x" for c in counts])


def chat_format(template: str = "alpaca", *, raw: PreTrainedTokenizerFast | None = None) -> ChatFormat:
    tokenizer = raw or train_tokenizer(["What is this? It is that."], 300)
    if "{" in template:
        tokenizer.chat_template = template
        template = "tokenizer"
    prepare(tokenizer, template=template, source="here")  # type: ignore[arg-type]
    return ChatFormat(tokenizer)


def seen(finding: Finding, name: str, level: str, *words: str) -> None:
    assert (finding.name, finding.level) == (name, level), finding
    for word in words:
        assert word in f"{finding.cause}: {finding.evidence}"
    assert [bool(part) for part in (finding.cause, finding.evidence, finding.action)] == [
        level != "ok",
        True,
        level != "ok",
    ]


# --- records ----------------------------------------------------------------------------------------------


def test_duplicates_ignore_blanks_and_capitals() -> None:
    rows = [chat("Who?", "Me.", "a:1"), chat("Who?", "You.", "a:2"), chat(" who? ", "ME.", "a:3")]
    seen(checks.duplicates(rows), "duplicates", "warning", "1 of 3 (33.3 %)", "a:1 stands there 2 times")
    seen(checks.duplicates(rows[:2]), "duplicates", "ok", "no two of 2")


def test_few_duplicates_and_repeated_prompts_are_notes() -> None:
    rows = [chat(f"Question {i}", "Yes.") for i in range(200)]
    seen(checks.duplicates([*rows, rows[0]]), "duplicates", "note", "1 of 201 (0.5 %)")
    asked = [prompt("Who?"), prompt("Who?")]
    seen(checks.duplicates(asked), "duplicates", "note", "1 of 2")


def test_a_pair_is_another_one_with_its_sides_exchanged() -> None:
    rows: list[Record] = [pair("a", "b", "c"), pair("a", "c", "b"), pair("a", "b", "d")]
    assert checks.duplicates(rows).level == "ok"
    judged = [Judged((said("a"),), (said("b", role="assistant"),), good, "p") for good in (True, False)]
    assert checks.duplicates(judged).level == "warning"  # the same answer, called good and bad


def test_overlap_counts_whole_records_and_prompts() -> None:
    train = [chat("Who?", "Me."), chat("Where?", "Here.")]
    held = [chat("who?", "me.", "b:1"), chat("Where?", "There.", "b:2"), chat("When?", "Now.", "b:3")]
    evidence = ("1 of 3 (33.3 %)", "the prompts of 2", "b:1")
    seen(checks.overlap(train, held), "overlap", "warning", *evidence)
    seen(checks.overlap(train, held[2:]), "overlap", "ok", "none of 1")
    seen(checks.overlap(train, []), "overlap", "note", "no records are held out")
    assert checks.overlap([prompt("Who?")], [prompt("who?")]).level == "warning"
    assert "--eval_prompts" in checks.overlap([prompt("Who?")], []).action


def test_raw_texts_share_no_prompt() -> None:
    texts = [Chat((said(text, role="text"),), "t:1") for text in ("one", "two")]
    assert checks.overlap(texts[:1], texts[1:]).level == "ok"
    assert checks.overlap(texts[:1], texts[:1]).level == "warning"


def test_control_words_in_what_people_say() -> None:
    form = chat_format()
    rows = [chat("What is <end>?", "A <pad> <end>.", "c:1"), chat("Who?", "Me.", "c:2")]
    found = checks.controls(rows, form.control_pattern)
    seen(found, "control_words", "warning", "1 of 2 (50 %)", '"<end>" 2 times', '"<pad>" 1 times', "c:1")
    seen(checks.controls(rows[1:], form.control_pattern), "control_words", "ok")
    many = [chat(f"Question {i}", "Yes.") for i in range(200)]
    assert checks.controls([*many, rows[0]], form.control_pattern).level == "note"


# --- tokens -----------------------------------------------------------------------------------------------


def test_end_token_by_answer_not_by_row() -> None:
    rows = [row("345672", "..x.xx"), row("3452", "..xx"), row("34567", "...xx")]
    seen(checks.end_token(rows, END), "end_token", "warning", "2 of 4 (50 %)")
    seen(checks.end_token(rows[1:2], END), "end_token", "ok", "1 of 1 (100 %)")
    seen(checks.end_token(rows[2:], END), "end_token", "error", "0 of 1", "never learn to stop")
    many = [rows[1]] * 19 + [rows[2]]
    seen(checks.end_token(many, END), "end_token", "note", "19 of 20 (95 %)")


def test_an_end_token_that_does_not_count_is_not_trained() -> None:
    assert checks.end_token([row("3452", "..x.")], END).level == "error"


def test_raw_text_without_an_end_is_a_warning() -> None:
    assert checks.end_token([row("345", "xxx")], END).level == "warning"


def test_pad_apart_from_everything() -> None:
    rows = [row("3452", "..xx"), row("3912", "..xx")]
    seen(checks.pad(rows, pad_id=8, end_ids=END, begin_id=1), "pad", "ok", "pad is token 8")
    seen(checks.pad(rows, pad_id=2, end_ids=END, begin_id=1), "pad", "error", "also ends answers")
    seen(checks.pad(rows, pad_id=1, end_ids=END, begin_id=1), "pad", "error", "also opens texts")
    seen(checks.pad(rows, pad_id=9, end_ids=END, begin_id=None), "pad", "warning", "1 of 2 (50 %)", "counts in 0")
    seen(checks.pad(rows, pad_id=5, end_ids=END, begin_id=None), "pad", "error", "counts in 1")


@pytest.mark.parametrize(("lost", "level"), [(0, "ok"), (1, "note"), (2, "warning"), (100, "error")])
def test_dropped(lost: int, level: str) -> None:
    found = checks.dropped(lost, 100, name="empty_mask", why="have no answer", action="raise --max_len")
    seen(found, "empty_mask", level, *(["none of 100"] if not lost else [f"{lost} of 100"]))


def test_cut_says_what_would_keep_nearly_all() -> None:
    lengths = [10] * 90 + [60] * 9 + [500]
    found = checks.cut(lengths, 50, side="end")
    seen(found, "cut", "warning", "10 of 100 (10 %)", "lose their end")
    assert found.action == "--max_len 60 would keep 99 % whole"
    assert "shorten the records" in checks.cut(lengths, 50, side="end", positions=50).action
    seen(checks.cut(lengths, 60, side="beginning"), "cut", "note", "1 of 100 (1 %)", "beginning")
    seen(checks.cut(lengths, 500, side="end"), "cut", "ok", "all 100")


def test_cut_of_rows_that_are_cut_already() -> None:
    assert checks.cut([10, 50], 50, side="end", whole=False).level == "warning"
    assert checks.cut([10, 49], 50, side="end", whole=False).level == "ok"


def test_unknown_tokens() -> None:
    rows = [row("3304", "..xx"), row("333333", "..xxxx")]
    seen(checks.unknown(rows, 0), "unknown", "warning", "1 of 10 (10 %)")
    seen(checks.unknown(rows, 7), "unknown", "ok")
    seen(checks.unknown(rows, None), "unknown", "ok")
    assert checks.unknown([rows[0], *[rows[1]] * 400], 0).level == "note"


def test_quantiles_and_histogram() -> None:
    lengths = list(range(1, 101))
    assert [checks.quantile(lengths, q) for q in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1, 50, 90, 99, 100]
    assert "half 50, 90 % 90, 99 % 99, all 100" in checks.lengths_told(lengths).evidence
    bins = checks.histogram([0, 3, 19, 20, 99])
    assert bins == [(0, 9, 2), (10, 19, 1), (20, 29, 1), *((k, k + 9, 0) for k in range(30, 90, 10)), (90, 99, 1)]
    assert checks.histogram([4, 4]) == [(4, 4, 2)]
    assert sum(count for _, _, count in checks.histogram([7, 812, 1033, 4096])) == 4


def test_shares_never_round_to_nothing_or_all() -> None:
    assert checks.share(0, 10) == "0 of 10 (0 %)"
    assert checks.share(10, 10) == "10 of 10 (100 %)"
    assert checks.share(1, 100_000) == "1 of 100,000 (<0.1 %)"
    assert checks.share(99_999, 100_000) == "99,999 of 100,000 (>99.9 %)"
    assert checks.share(1, 3) == "1 of 3 (33.3 %)"


# --- template ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpaca", "human_assistant", "plain"])
def test_our_templates_are_sound(name: str) -> None:
    rows = [turns("Who?", "Me.", "Why?", " Because: it is\n\n so. "), chat("Who <end>?", "<pad> me")]
    for finding in checks.template(rows, chat_format(name), most=10):
        assert finding.level == "ok", finding
    prompts = [Prompt(turns("Who?", "Me.", "Why?").messages, {}, "p:1")]
    pairs: list[Record] = [pair("Who?", "Me.", "You.")]
    texts = [Chat((said("Once upon", role="text"),), "t:1")]
    for records in (prompts, pairs, texts):
        assert {f.level for f in checks.template(records, chat_format(name), most=10)} == {"ok"}


@pytest.mark.parametrize("template", [REWRITES, FORGETS])
def test_a_template_that_rewrites_earlier_turns(template: str) -> None:
    form = chat_format(template)
    found = checks.template([turns("Who?", "Me.", "Why?", "So.")], form, most=10)
    assert len(found) == 1
    seen(found[0], "turns", "error", "1 of 1", "data.jsonl:7, message", "becomes")
    assert "--template" in found[0].action


def test_one_turn_cannot_be_rewritten() -> None:
    assert checks.template([chat("Who?", "Me.")], chat_format(FORGETS), most=10)[0].level == "ok"


def test_prompt_tokens_that_differ_from_training(monkeypatch: pytest.MonkeyPatch) -> None:
    form = chat_format()
    whole = form.conversations
    monkeypatch.setattr(form, "conversations", lambda chats: [Encoded([0, *r.tokens], r.counts) for r in whole(chats)])
    found = checks.same_tokens([("a:1", turns("Who?", "Me.", "Why?", "So.").messages)], form)
    seen(found, "turns", "warning", "2 of 2", "a:1")


def test_answers_that_do_not_come_back() -> None:
    form = chat_format("plain", raw=tiny_tokenizer())  # whole words alone: the others are unknown
    rows = [chat("w3", "w4 w5", "a:1"), chat("w3", "w4 hello", "a:2")]
    found = checks.template(rows, form, most=10)[1]
    seen(found, "round_trip", "warning", "1 of 2 (50 %)", "a:2", '"w4 hello" becomes "w4')
    assert checks.template(rows[:1], form, most=10)[1].level == "ok"


def test_records_looked_at_are_spread_evenly() -> None:
    rows = [chat(str(i), "yes", f"a:{i}") for i in range(10)]
    assert [record.place for record in checks.spread(rows, 3)] == ["a:0", "a:3", "a:6"]
    assert checks.spread(rows, 20) == rows


# --- model ------------------------------------------------------------------------------------------------


def test_vocabulary() -> None:
    form = chat_format("plain", raw=tiny_tokenizer())  # 97 entries, pad among them
    none: frozenset[int] = frozenset()
    seen(checks.vocabulary(form, rows=97, model_ends=END), "vocabulary", "ok", "97 entries, 97 rows", '"<end>"')
    seen(checks.vocabulary(form, rows=96, model_ends=none), "vocabulary", "error", "97 entries, 96 rows")
    seen(checks.vocabulary(form, rows=200, model_ends=none), "vocabulary", "warning", "103 rows have no entry")
    seen(
        checks.vocabulary(form, rows=97, model_ends=frozenset({5})),
        "vocabulary",
        "note",
        "end texts at another",
        "say 5",
    )


def test_our_own_pad_token_gets_a_row() -> None:
    form = chat_format("plain", raw=tiny_tokenizer(pad=None))
    top = max(form.tokenizer.get_vocab().values()) + 1
    assert form.pad_id == top - 1
    seen(checks.vocabulary(form, rows=top - 1, model_ends=END), "vocabulary", "note", "one more for pad")
    seen(checks.vocabulary(form, rows=top - 2, model_ends=END), "vocabulary", "error")


def test_context() -> None:
    seen(checks.context(60, max_len=60, positions=64), "context", "ok", "60 tokens", "64 positions")
    seen(checks.context(60, max_len=512, positions=64), "context", "note")
    seen(checks.context(65, max_len=512, positions=64), "context", "error")
    assert checks.context(65, max_len=512, positions=64).action == "--max_len 64"
    seen(checks.context(65, max_len=512, positions=None), "context", "ok", "no bound")
