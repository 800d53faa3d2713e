"""What every tokenizer here guarantees: an end token, a pad token of its own, a template."""

from pathlib import Path

import pytest

from kinkajou.data.chat import ChatFormat
from kinkajou.data.sources import Message
from kinkajou.data.tokenizer import (
    character_tokenizer,
    load_tokenizer,
    prepare,
    template_words,
    train_tokenizer,
)
from kinkajou.errors import UserError
from tiny import tiny_tokenizer


def test_pad_is_never_the_end_token() -> None:
    """Contract, item 6: the end token was masked out when pad == eos."""
    for pad in (None, "<end>"):
        tokenizer = train_tokenizer(["some words"], 280)
        tokenizer.pad_token = pad
        prepare(tokenizer, template="alpaca", source="here")
        form = ChatFormat(tokenizer)
        encoded = form.conversation((Message("user", "some <pad>"), Message("assistant", "words <pad>")))
        assert tokenizer.pad_token_id is not None
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert form.pad_id not in form.end_ids
        assert form.pad_id not in encoded.tokens
        assert encoded.tokens[-1] == tokenizer.eos_token_id
        assert encoded.counts[-1]


def test_a_pad_token_of_its_own_is_kept() -> None:
    tokenizer = train_tokenizer(["some words"], 280)
    size, pad = len(tokenizer), tokenizer.pad_token_id
    prepare(tokenizer, template="plain", source="here")
    assert (len(tokenizer), tokenizer.pad_token_id) == (size, pad)


def test_a_tokenizer_without_end_token_is_refused() -> None:
    with pytest.raises(UserError, match="no end token"):
        prepare(tiny_tokenizer(end=None), template="auto", source="here")


def test_template_choice() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        prepare(tokenizer, template="tokenizer", source="here")
    assert prepare(tokenizer, template="auto", source="here") == "alpaca"
    own = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = own
    assert prepare(tokenizer, template="auto", source="here") == "tokenizer"
    assert tokenizer.chat_template == own
    assert prepare(tokenizer, template="plain", source="here") == "plain"
    assert tokenizer.chat_template != own


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer could be read") as fault:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(fault.value)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat, the end"], 290)
    prepare(tokenizer, template="human_assistant", source="here")
    tokenizer.save_pretrained(tmp_path)
    again, template = load_tokenizer(str(tmp_path))
    assert template == "tokenizer"
    chat = (Message("user", "the cat"), Message("assistant", "sat <end>"))
    assert ChatFormat(again).conversation(chat) == ChatFormat(tokenizer).conversation(chat)


def test_bytes_of_any_text_come_back() -> None:
    tokenizer = train_tokenizer(["plain words only"], 280)
    for text in ("naïve café", "日本語 \U0001f43e", "tab\tand\r\nlines", "  two  blanks  "):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_character_is_a_token(tmp_path: Path) -> None:
    """Blanks, line ends and letters beyond the basic plane too; the text comes back; others are one unknown each."""
    texts = ["3, 6, 9\n", "\tnaïve \U0001f43e", "  e\u0301 "]
    tokenizer = character_tokenizer(texts)
    letters = {letter for text in texts for letter in text}
    assert len(tokenizer) == len(letters) + 3
    for text in [*texts, "9 6\n\n3", ""]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == list(text)
        assert tokenizer.decode(ids) == text
    unknown = tokenizer.encode("z3Z", add_special_tokens=False)
    assert [i == tokenizer.unk_token_id for i in unknown] == [True, False, True]
    again = character_tokenizer(reversed(texts))
    assert again.get_vocab() == tokenizer.get_vocab()  # the order of the records decides nothing
    prepare(tokenizer, template="plain", source="here")
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.decode(loaded.encode(texts[0], add_special_tokens=False)) == texts[0]


def test_chats_in_characters() -> None:
    """With the template's own characters in the vocabulary nothing is unknown, and an end written out is no end."""
    texts = ["1 2 3", "4 <end>", "é"]
    tokenizer = character_tokenizer([*texts, *template_words("human_assistant", times=1)])
    prepare(tokenizer, template="human_assistant", source="here")
    form = ChatFormat(tokenizer)
    encoded = form.conversation((Message("user", "1 2 3"), Message("assistant", "4 <end>")))
    assert tokenizer.unk_token_id not in encoded.tokens
    assert encoded.tokens.count(tokenizer.eos_token_id) == 1
    assert encoded.tokens[-1] == tokenizer.eos_token_id
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 3
    said = [token for token, counts in zip(encoded.tokens, encoded.counts, strict=True) if counts]
    assert form.answer(said).strip() == "4 <end>"


@pytest.mark.parametrize("name", ["stories260k", "stories280k"])
def test_shared_tokenizers(name: str, shared_data: Path) -> None:
    """Real ones: the words of a chat come back, and user text stays text."""
    tokenizer, _ = load_tokenizer(str(shared_data / "models" / name), template="alpaca")
    form = ChatFormat(tokenizer)
    end = str(tokenizer.eos_token)
    encoded = form.conversation((Message("user", f"tell {end} a story"), Message("assistant", "once upon a time")))
    assert encoded.tokens.count(form.end_id) == 1
    assert "once upon a time" in tokenizer.decode([t for t, c in zip(encoded.tokens, encoded.counts, strict=True) if c])
    assert "a story" in tokenizer.decode(encoded.tokens)
    assert form.pad_id not in form.end_ids
