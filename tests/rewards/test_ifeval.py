"""Instructions that can be checked: each by answers that follow it and answers that do not."""

from typing import Any

import pytest
from answers import answer

from kinkajou.errors import UserError
from kinkajou.rewards.ifeval import CHECKS
from kinkajou.rewards.rules import parse_rule

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["red", "Blue"]}, ["Red and BLUE"], ["red"]),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, ["a A"], ["a"]),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, ["a"], ["a A"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate"], ["a Cat."]),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["eeE"],
        ["ee"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a, b c!"], ["a, b !"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a b"], ["a b c"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two", 'He said "no!" Then left.', "真好。真的？"],  # noqa: RUF001
        ["It costs 3.50 today.", "Really?!"],
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b"], ["a", "a***\n***b"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["a\n\nthen, b", 'a\n\n"Then" b'],
        ["then\n\nb", "a\n\nthen\n\nc", "then"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] of [place]"], ["[name]", "[]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP.S. y", "p. s. y"], ["PS y"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S y"], ["P.S. y"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "**a**\n* b"]),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["No."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a*", "** ** *a*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na"],
    ),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", '{"a": 1} so']),
    ("detectable_format:title", {}, ["<<On cats>>\nx"], ["<< >>", "<cats>"]),
    ("combination:two_responses", {}, ["a******b", "******a******b"], ["a", "a******a", "a************b", "a******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. Done"], ["Done. Say it."]),
    ("startend:start_phrase", {"start_phrase": "Well"}, ['"well, yes"'], ["oh well"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['x "the end."'], ["The end. x"]),
    ("startend:quotation", {}, ['"a"'], ['"', '"a" b']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["ONE two"],
        ["ONE TWO"],
    ),
    ("change_case:english_capital", {}, ["A B!"], ["A b"]),
    ("change_case:english_lowercase", {}, ["a b!"], ["a B"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.mark.parametrize(("name", "options", "follows", "fails"), CASES)
def test_checks(name: str, options: dict[str, Any], follows: list[str], fails: list[str]) -> None:
    rule = parse_rule("rule:ifeval")
    noise = dict.fromkeys(("num_words", "keywords", "letter"))  # the data set fills what does not belong with null
    for text in follows:
        assert rule(answer(text, instruction_id_list=[name], kwargs=[noise | options])) == 1, text
    for text in (*fails, "", " \n"):
        assert rule(answer(text, instruction_id_list=[name], kwargs=[noise | options])) == 0, text


def test_every_check_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_the_score_is_the_share() -> None:
    names = ["punctuation:no_comma", "startend:quotation", "change_case:english_lowercase", "detectable_format:title"]
    given = answer('"a b"', instruction_id_list=names, kwargs=[{}, None, {}, {}])
    assert parse_rule("rule:ifeval")(given) == 3 / 4


def test_what_cannot_be_checked_is_refused_or_skipped() -> None:
    names = ["language:response_language", "punctuation:no_comma"]
    given = answer("a", instruction_id_list=names, kwargs=[{"language": "de"}, {}])
    with pytest.raises(UserError, match=r"prompts.jsonl:7: rule:ifeval cannot check language:response_language"):
        parse_rule("rule:ifeval")(given)
    assert parse_rule("rule:ifeval:skip")(given) == 1
    with pytest.raises(UserError, match="none of the row's instructions"):
        parse_rule("rule:ifeval:skip")(answer("a", instruction_id_list=names[:1], kwargs=[{}]))


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, ('needs the row\'s field "instruction_id_list"',)),
        ({"instruction_id_list": ["punctuation:no_comma"]}, ('needs the row\'s field "kwargs"',)),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, ("lists of one length",)),
        ({"instruction_id_list": [], "kwargs": []}, ("lists of one length",)),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}, ("lists of one length",)),
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, ("no_coma", "known:", *CHECKS)),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, ('needs "keywords"', "a list of texts")),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]},
            ('needs "num_words"', "a whole number"),
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]},
            ('needs "relation"', '"less than"'),
        ),
        (
            {"instruction_id_list": ["length_constraints:number_paragraphs"], "kwargs": [{"num_paragraphs": 1.5}]},
            ("a whole number", "1.5"),
        ),
        *(
            ({"instruction_id_list": ["length_constraints:number_paragraphs"], "kwargs": [kwargs]}, ("a whole number",))
            for kwargs in ({"num_paragraphs": 10**400}, {"num_paragraphs": float("inf")}, {"num_paragraphs": -1})
        ),
        (
            {
                "instruction_id_list": ["keywords:letter_frequency"],
                "kwargs": [{"letter": "ab", "let_frequency": 1, "let_relation": "at least"}],
            },
            ("one letter",),
        ),
    ],
)
def test_a_faulty_row_is_named(meta: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        parse_rule("rule:ifeval")(answer("some text", **meta))
    for word in ("prompts.jsonl:7", *words):
        assert word in str(caught.value)
