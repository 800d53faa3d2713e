"""The word filter: against the definition by brute force, over every way to cut a text into pieces."""

import random
import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from kinkajou.errors import UserError
from kinkajou.serve.words import Watch, Words, read_words


def said(words: Words, pieces: list[str]) -> tuple[str, bool]:
    watch = Watch(words)
    shown = "".join(watch.feed(piece) for piece in pieces) + watch.finish()
    return shown, watch.hit


def cuts(text: str, most: int) -> list[list[str]]:
    found = []
    for count in range(most + 1):
        for places in combinations(range(1, len(text)), count):
            edges = [0, *places, len(text)]
            found.append([text[a:b] for a, b in pairwise(edges)])
    return found


@pytest.mark.parametrize(
    ("words", "text", "clean"),
    [
        (["badword"], "a BadWord, said", "a "),
        (["badword"], "badwording is a word of its own", None),
        (["badword"], "a notbadword too", None),
        (["badword"], "at the end: badword", "at the end: "),
        (["two words"], "here two words stand", "here "),
        (["two words"], "here two wordsmiths stand", None),
        (["b", "a b c d"], "x a b c e", "x a "),
        (["abab"], "ababab abab", "ababab "),
        (["c++"], "xc++y", None),
        (["c++"], "(c++y", "("),
        (["$$"], "ab$$cd", "ab"),
        (["坏话"], "这是坏话吗", "这是"),
        (["ΣΑΣ"], "- σας εδώ", "- "),
        (["é"], "caf é", "caf "),
        (["x\U0001f600"], "ok x\U0001f600 no", "ok "),
    ],
)
def test_every_way_to_cut_a_text_shows_the_same(words: list[str], text: str, clean: str | None) -> None:
    """Up to three cuts.  What is shown is the text, or a beginning of what stands before the word."""
    made = Words(words, "no")
    for pieces in [*cuts(text, 3), list(text)]:
        shown, hit = said(made, pieces)
        if clean is None:
            assert (shown, hit) == (text, False), pieces
        else:
            assert hit, pieces
            assert clean.startswith(shown), pieces
    assert made.found_in(text) is (clean is not None)


def test_random_texts_against_the_definition() -> None:
    dice = random.Random(1)
    for _ in range(3000):
        alphabet = dice.choice(["ab", "ab ", "aB -", "ab好 "])
        words = ["".join(dice.choices(alphabet, k=dice.randint(1, 4))) for _ in range(dice.randint(1, 4))]
        words = [word.strip() for word in words if word.strip()]
        text = "".join(dice.choices(alphabet, k=dice.randint(0, 14)))
        if not words or not text:
            continue
        starts = [
            found.start()
            for word in words
            for found in re.finditer(f"(?={re.escape(word)})", text, re.IGNORECASE)
            if stands_alone(text, found.start(), len(word))
        ]
        places = sorted(dice.sample(range(len(text) + 1), dice.randint(0, min(4, len(text)))))
        edges = [0, *places, len(text)]
        pieces = [text[a:b] for a, b in pairwise(edges)]
        shown, hit = said(Words(words, "no"), pieces)
        assert hit is bool(starts), (words, pieces)
        if not hit:
            assert shown == text
        else:  # nothing of the word whose end comes first
            assert text.startswith(shown)
            first_end = min(
                found.start() + len(word)
                for word in words
                for found in re.finditer(f"(?={re.escape(word)})", text, re.IGNORECASE)
                if stands_alone(text, found.start(), len(word))
            )
            ending = [
                found.start()
                for word in words
                for found in re.finditer(f"(?={re.escape(word)})", text, re.IGNORECASE)
                if stands_alone(text, found.start(), len(word)) and found.start() + len(word) == first_end
            ]
            assert len(shown) <= min(ending), (words, pieces, shown)


def stands_alone(text: str, start: int, length: int) -> bool:
    def joins(a: str, b: str) -> bool:
        return all(char.isalpha() and char.isascii() for char in (a, b)) if a and b else False

    before, after = text[start - 1 : start] if start else "", text[start + length : start + length + 1]
    return not joins(before, text[start]) and not joins(text[start + length - 1], after)


def test_nothing_is_held_back_without_need() -> None:
    watch = Watch(Words(["badword"], "no"))
    assert watch.feed("hello b") == "hello "
    assert watch.feed("a") == ""
    assert watch.feed("th") == "bath"
    assert watch.feed("badwor") == ""
    assert watch.finish() == "badwor"
    assert not watch.hit


class Counted(dict[str, object]):
    looks = 0

    def __contains__(self, char: object) -> bool:
        Counted.looks += 1
        return super().__contains__(char)


def test_the_work_is_linear_in_the_text() -> None:
    """At most two looks a character, whatever the words are (Aho and Corasick 1975)."""
    words = Words(["a" * 199 + "b", *(f"{'a' * n}c" for n in range(1, 190))], "no")
    waiting = [words.root]
    while waiting:
        node = waiting.pop()
        waiting += node.following.values()
        node.following = Counted(node.following)  # type: ignore[assignment]
    watch, text = Watch(words), "aad" + "a" * 5_000
    for i in range(0, len(text), 7):
        watch.feed(text[i : i + 7])
    assert not watch.hit
    assert len(text) <= Counted.looks <= 2 * len(text)


def test_a_file_of_words(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffBadword\r\n\r\n  two words \nbadword\n".encode())
    made = read_words(str(file), "safe")
    assert made.found_in("TWO WORDS")
    assert made.found_in("a badword.")
    assert not made.found_in("two  words")
    assert made.safe_answer == "safe"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no words"),
        (b"\n \n", "has no words"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a" * 201, "more than 200 characters"),
        (b"a\n" * 500_001, "longer than 1,000,000 bytes"),
        (b"".join(b"%d\n" % n for n in range(20_001)), "more than 20,000 words"),
    ],
)
def test_files_that_are_no_lists_of_words(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_words(str(file), "safe")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_words(str(tmp_path / "none"), "safe")
