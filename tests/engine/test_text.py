"""An answer's text while it comes: equal to the whole answer decoded at once, in whole characters, at a linear cost."""

import random

import pytest
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerBase

from kinkajou.data.tokenizer import character_tokenizer, train_tokenizer
from kinkajou.engine.text import MARK, Answer, Cut, Decoder, Detokeniser
from tiny import tiny_tokenizer

TEXTS = [
    "Once upon a time there was a dog. He said: hello!\n\nAnd then?",
    "naïve café, 東京 and 👩‍👩‍👧‍👦 and 🇩🇪, ѫ, ﷽ ",
    "a\u0301\u0301 \u200b tab\t  two blanks\n",
    "👍" * 30,
    "東京都" * 30,
]


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decoder:
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))


def streamed(decode: Decoder, tokens: list[int]) -> list[str]:
    stream = Detokeniser(decode)
    return [*map(stream.push, tokens), stream.finish()]


def byte_fallback() -> Raw:
    """As LLaMA's: words with a mark for the blank before them, all else as single bytes."""
    words = ["▁Once", "▁a", "▁time", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = Raw(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="s"))
    strip = decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return raw


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "bpe", "letters", "words"])
def test_pieces_together_are_the_answer(kind: str, text: str) -> None:
    if kind == "letters":
        tokenizer = character_tokenizer(TEXTS)
    elif kind == "words":
        tokenizer = tiny_tokenizer()
        text = " ".join(f"w{len(word) + 3}" for word in text)
    else:
        tokenizer = train_tokenizer(TEXTS if kind == "bpe" else [], 400 if kind == "bpe" else 260)
    tokens = tokenizer(text).input_ids
    pieces = streamed(decoder(tokenizer), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert not any(MARK in piece for piece in pieces)
    for i in range(4, len(tokens)):  # nothing waits longer than a character does
        assert "".join(pieces[: i + 1]).startswith(tokenizer.decode(tokens[: i - 3]).rstrip(MARK))


def test_pieces_of_byte_tokens_after_words() -> None:
    raw = byte_fallback()
    dice = random.Random(0)
    for _ in range(60):
        tokens: list[int] = []
        for _ in range(dice.randrange(1, 40)):
            if dice.random() < 0.5:
                tokens.append(dice.randrange(5))
            else:
                tokens += [5 + byte for byte in dice.choice("é東👍a").encode()]
        pieces = streamed(raw.decode, tokens)
        assert "".join(pieces) == raw.decode(tokens)
        assert not any(MARK in piece for piece in pieces)


def test_broken_bytes_come_as_marks_and_no_good_character_is_lost() -> None:
    tokenizer = train_tokenizer([], 260)
    vocabulary = tokenizer.get_vocab()
    dice = random.Random(1)
    for length in (1, 5, 70, 300):
        tokens = [dice.choice(list(vocabulary.values())) for _ in range(length)]
        pieces = streamed(decoder(tokenizer), tokens)
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces).replace(MARK, "") == whole.replace(MARK, "")
    half = tokenizer("東").input_ids[:2]
    assert streamed(decoder(tokenizer), half) == ["", "", MARK]


def test_the_cost_of_a_token_does_not_grow() -> None:
    tokenizer = train_tokenizer([], 260)
    for text in ("word " * 400, "東" * 700, b"\xff".decode("latin-1")):
        tokens = tokenizer(text).input_ids if len(text) > 1 else [tokenizer.get_vocab()["ÿ"]] * 2000
        asked: list[int] = []

        def counted(tokens: list[int], asked: list[int] = asked) -> str:
            asked.append(len(tokens))
            return str(tokenizer.decode(tokens))

        streamed(counted, tokens)
        assert max(asked) <= 64
        assert len(asked) < 4 * len(tokens)


def naive_cut(text: str, stops: list[str]) -> str:
    """Reads the text letter by letter; ends before the first stop that is complete, the longest of several."""
    for i in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:i].endswith(stop)]:
            return text[: i - max(map(len, found))]
    return text


def test_stops_are_cut_wherever_the_pieces_are() -> None:
    dice = random.Random(2)
    stopped = 0
    for _ in range(3000):
        text = "".join(dice.choices("ab c", k=dice.randrange(0, 16)))
        stops = ["".join(dice.choices("ab c", k=dice.randrange(1, 5))) for _ in range(dice.randrange(0, 4))]
        trimmed = dice.random() < 0.5
        cut = Cut(stops, trimmed=trimmed)
        rest, shown = text, ""
        expected = naive_cut(text.lstrip() if trimmed else text, stops)
        while rest and not cut.stopped:
            n = dice.randrange(1, 5)
            shown += cut.push(rest[:n])
            rest = rest[n:]
            assert expected.startswith(shown)  # nothing of a stop was shown on the way
        shown += cut.finish()
        stopped += cut.stopped
        assert shown == (expected.rstrip() if trimmed else expected)
    assert stopped > 500


def test_an_answer_loses_outer_blanks_and_what_follows_a_stop() -> None:
    tokenizer = character_tokenizer(["\n abcHuman:"])
    vocabulary = tokenizer.get_vocab()
    tokens = [vocabulary[letter] for letter in "\n  a b\n\nHuman: c"]
    answer = Answer(decoder(tokenizer), ["Human:"])
    shown = []
    for token in tokens:
        shown.append(answer.push(token))
        if answer.stopped:
            break
    assert "".join(shown) == "a b"
    assert len(shown) == len(tokens) - 2
    assert answer.push(tokens[-1]) == "" == answer.finish()
    raw = Answer(decoder(tokenizer), trimmed=False)
    assert "".join([*map(raw.push, tokens), raw.finish()]) == "\n  a b\n\nHuman: c"
