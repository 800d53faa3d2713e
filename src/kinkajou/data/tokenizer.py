"""Tokenizers: a byte-level BPE trained from texts, and the guarantees that every tokenizer here gives."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kinkajou.data.template_probe import check_template
from kinkajou.data.templates import TEMPLATES
from kinkajou.errors import UserError
from kinkajou.hub import from_disk
from kinkajou.untrusted import check_tokenizer

TemplateName = Literal["auto", "tokenizer", "alpaca", "human_assistant", "plain"]
PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"
CHARACTERS = "characters"
"""Stands in place of a tokenizer's folder: one token for each character of the records."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE (Sennrich 2016; bytes as in GPT-2) of at most `vocab_size` entries, `<pad>` and `<end>` apart."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """One token for each character that occurs: for tasks with a small alphabet, learnt from random weights."""
    letters = sorted({letter for text in texts for letter in text})
    vocabulary = {word: i for i, word in enumerate((PAD, END, UNKNOWN, *letters))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def template_words(template: TemplateName, times: int = 1000) -> list[str]:
    """A template's own words, often enough that a tokenizer trained with them spends few tokens on each."""
    name = "alpaca" if template in ("auto", "tokenizer") else template
    return [re.sub(r"\{[{%].*?[%}]\}", "", TEMPLATES[name])] * times


def load_tokenizer(source: str, *, template: TemplateName = "auto") -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer with an end token, a pad token of its own and a chat template, and the template's name.

    Raises UserError when the source has no tokenizer or no end token, or `template` is "tokenizer" and it has none.
    """
    local = from_disk(source)
    check_tokenizer(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except Exception as fault:
        # A broken tokenizer.json is a plain Exception of the library's Rust; broken settings are any of a dozen kinds.
        here = "" if Path(source).is_dir() else "no folder of that name is here; "
        raise UserError(
            f"no tokenizer could be read from {source!r}",
            evidence=here + (" ".join(str(fault).split())[:300] or type(fault).__name__),
            fix="correct the path, or give a folder that holds tokenizer.json (or vocab files) and config.json",
        ) from fault
    name = prepare(tokenizer, template=template, source=source)
    if name == "tokenizer":
        check_template(tokenizer.chat_template, source)
    return tokenizer, name


def check_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase, *, other: str, fix: str) -> None:
    """UserError unless the tokenizer of `source` has the policy's entries; `other` is what `source` is to the policy.

    What reads the policy's tokens as they are would otherwise read other words, and say nothing.
    """
    own, _ = load_tokenizer(source)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"policy and {other} have different vocabularies",
            evidence=f"{len(tokenizer)} entries in the policy's, {len(own)} in {source}",
            fix=fix,
        )


def prepare(tokenizer: PreTrainedTokenizerBase, *, template: TemplateName, source: str) -> str:
    """Checks the end token, sets pad and template in place; returns the template's name.

    Pad gets a token of its own even where a tokenizer shares it with the end token: programs that find a
    text's end by looking for pad (transformers' sequence classifiers among them) would cut the end token off.
    """
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {source!r} has no tokenizer.json form", fix="convert it with transformers")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {source!r} has no end token",
            evidence="eos_token is not set, so no answer could ever end",
            fix='set "eos_token" in tokenizer_config.json to the token that ends an answer',
        )
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        tokenizer.add_special_tokens({"pad_token": PAD})
    own = tokenizer.chat_template
    if template == "tokenizer" and not own:
        raise UserError(
            f"the tokenizer of {source!r} has no chat template",
            fix="choose one with --template alpaca, human_assistant or plain",
        )
    if template == "tokenizer" or (template == "auto" and own):
        return "tokenizer"
    name = "alpaca" if template == "auto" else template
    # Models whose tokenizer opens every text with a begin token were trained to see it there.
    opening = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    tokenizer.chat_template = ("{{ bos_token }}" if opening else "") + TEMPLATES[name]
    return name
