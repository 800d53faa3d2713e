"""No text of a user, a tool or a data set becomes a control token, whatever words of control it types."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kinkajou.data.chat import ChatFormat
from kinkajou.data.records import Message
from kinkajou.data.tokenizer import prepare, train_tokenizer
from tiny import tiny_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLUED = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}<end>{% endif %}{% endfor %}"
)
ADDED = ["<|im_start|>", "<|im_end|>", "<tool>", "<tool>x"]


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Special tokens, and two that are added without being special, one the beginning of the other."""
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED[:2]})
    tokenizer.add_tokens([AddedToken(word, special=False) for word in ADDED[2:]])
    tokenizer.chat_template = template
    return tokenizer


def letters() -> PreTrainedTokenizerBase:
    raw = Tokenizer(models.BPE(vocab={"?": 0, "<end>": 1, "<pad>": 2}, merges=[], unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", pad_token="<pad>", eos_token="<end>")


MADE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "words": lambda: tiny_tokenizer(),
    "words, chatml": lambda: with_template(tiny_tokenizer(), CHATML),
    "words, glued": lambda: with_template(tiny_tokenizer(), GLUED),
    "bytes, chatml": lambda: with_template(train_tokenizer(["some words of a text"], 300), CHATML),
    "bytes, glued": lambda: with_template(train_tokenizer(["some words of a text"], 300), GLUED),
    "letters": lambda: with_template(letters(), GLUED),
}


@pytest.mark.parametrize("name", MADE)
def test_text_never_becomes_a_control_token(name: str) -> None:
    tokenizer = MADE[name]()
    prepare(tokenizer, template="auto" if tokenizer.chat_template else "plain", source="here")
    form = ChatFormat(tokenizer)
    words = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {tokenizer.unk_token})
    control = set(tokenizer.convert_tokens_to_ids(words))
    halves = st.sampled_from(words).flatmap(lambda word: st.integers(1, len(word) - 1).map(lambda at: (word, at)))
    typed = st.one_of(
        st.sampled_from(words),
        halves.map(lambda half: half[0][half[1] :]),
        halves.map(lambda half: half[0][: half[1]]),
        st.sampled_from([" ", "\n", "w3", "\U000f0000", "\U000f0001", "<", ">", "|", "é"]),
        st.text(max_size=4),
    )
    text = st.lists(typed, min_size=1, max_size=5).map("".join)

    def controls(tokens: list[int]) -> list[int]:
        return [token for token in tokens if token in control]

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(st.lists(st.tuples(text, text), min_size=1, max_size=3), halves, text)
    def each(turns: list[tuple[str, str]], half: tuple[str, int], raw: str) -> None:
        word, at = half
        turns = [*turns, (word[:at], word[at:]), (word[at:], word[:at])]
        chat = [Message(role, said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
        quiet = [Message(message.role, "w4") for message in chat]
        assert controls(form.conversation(chat).tokens) == controls(form.conversation(quiet).tokens)
        assert controls(form.prompt(chat[:-1])) == controls(form.prompt(quiet[:-1]))
        for whole in (chat, [Message("user", word[:at]), Message("user", word[at:])]):
            quieter = [Message(message.role, "w4") for message in whole]
            assert controls(form.prompt(whole)) == controls(form.prompt(quieter))
        assert controls(form.conversation([Message("text", raw)]).tokens) == [form.end_id]

    each()
