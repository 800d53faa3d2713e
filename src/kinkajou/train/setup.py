"""From settings and records to tokenizer, model options and encoded rows: what the trainers share before step 1."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TypeVar

from kinkajou import config
from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.sources import Chat, Message, Pair
from kinkajou.data.tokenizer import (
    CHARACTERS,
    character_tokenizer,
    load_tokenizer,
    prepare,
    template_words,
    train_tokenizer,
)
from kinkajou.errors import UserError
from kinkajou.models.forward import PackedModel
from kinkajou.models.load import LoadOptions, find_model
from kinkajou.models.presets import PRESETS
from kinkajou.parallel.make import make_strategy
from kinkajou.parallel.strategy import Strategy

Say = Callable[[str], None]
T = TypeVar("T")


def load_format(base: config.ModelConfig, texts: Iterable[str], say: Say) -> ChatFormat:
    """The tokenizer with its template; for a preset without a tokenizer, one trained on `texts`."""
    if base.tokenizer == CHARACTERS:
        tokenizer = character_tokenizer(chain(texts, template_words(base.template, times=1)))
        name = prepare(tokenizer, template=base.template, source=base.model)
        say(f"tokenizer: the records' characters, {len(tokenizer)} entries")
    elif base.model in PRESETS and not base.tokenizer:
        tokenizer = train_tokenizer(chain(texts, template_words(base.template)), base.vocab_size)
        name = prepare(tokenizer, template=base.template, source=base.model)
        say(f"tokenizer: trained on the records, {len(tokenizer)} entries")
    else:
        source = base.tokenizer or find_model(base.model)
        tokenizer, name = load_tokenizer(source, template=base.template)
        if source != base.model:
            say(f"tokenizer: {source}")
    say(f"chat template: {'the tokenizer has its own' if name == 'tokenizer' else name}")
    return ChatFormat(tokenizer)


def load_options(base: config.ModelConfig, seed: int) -> LoadOptions:
    if base.lora_rank and base.lora_save == "adapter" and base.model in PRESETS:
        raise UserError(
            "adapters of a model from scratch could not be loaded again",
            evidence=f"--model {base.model} is a preset, --lora_save is adapter",
            fix="--lora_save merged",
        )
    return LoadOptions(
        family=base.family,
        dtype=base.dtype,
        lora_rank=base.lora_rank,
        lora_alpha=base.lora_alpha,
        gradient_checkpointing=base.gradient_checkpointing,
        context=base.max_len,
        seed=seed,
    )


def voice(s: Strategy) -> Say:
    """What says things for all processes."""
    return print if s.main else lambda text: None


def strategy_of(where: config.ParallelConfig) -> Strategy:
    return make_strategy(
        where.strategy,
        tp=where.tp,
        device_share=where.device_share,
        interface=where.interface,
        start_timeout_s=where.start_timeout_s,
        collective_timeout_s=where.collective_timeout_s,
    )


def texts_of(messages: Iterable[Sequence[Message]]) -> Iterable[str]:
    return (message.content for chat in messages for message in chat)


def check_context(model: PackedModel, wanted: int) -> None:
    """Refuses sequences beyond the positions that the model was made for."""
    known = getattr(model.inner.config, "max_position_embeddings", None)  # BLOOM has no such bound
    if known is not None and wanted > known:
        raise UserError(
            "the sequences are longer than the model's context",
            evidence=f"up to {wanted} tokens, the model has positions for {known}",
            fix=f"--max_len {known} or less (for PPO: prompt plus --max_new_tokens)",
        )


def encode_chats(chats: Sequence[Chat], form: ChatFormat, max_len: int, say: Say) -> list[Encoded]:
    """Chats as tokens, cut to `max_len` at the end; one without an answer left in it is dropped and counted."""
    rows = form.conversations(chat.messages for chat in chats)
    cut = sum(len(row.tokens) > max_len for row in rows)
    kept = [Encoded(row.tokens[:max_len], row.counts[:max_len]) for row in rows]
    kept = [row for row in kept if any(row.counts[1:])]
    tell(say, f"{cut} of {len(rows)} chats are longer than {max_len} tokens and were cut", cut)
    lost = len(rows) - len(kept)
    tell(say, f"{lost} of {len(rows)} chats have no answer within {max_len} tokens and were dropped", lost)
    if chats and not kept:
        raise UserError(f"no chat has an answer within {max_len} tokens", fix="raise --max_len")
    return kept


def encode_pairs(pairs: Sequence[Pair], form: ChatFormat, max_len: int, say: Say) -> list[tuple[list[int], list[int]]]:
    """Both sides as tokens, cut to `max_len` at the beginning: the end, where the score is read, stays."""
    rows = form.pairs(pairs)
    cut = sum(max(map(len, row)) > max_len for row in rows)
    tell(say, f"{cut} of {len(rows)} pairs are longer than {max_len} tokens and lost their beginning", cut)
    kept = [(chosen[-max_len:], rejected[-max_len:]) for chosen, rejected in rows]
    different = [row for row in kept if row[0] != row[1]]
    same = len(kept) - len(different)
    tell(say, f"{same} of {len(rows)} pairs have the same tokens on both sides and were dropped", same)
    return different


def tell(say: Say, text: str, count: int) -> None:
    if count:
        say(f"note: {text}")


def pick(rows: Sequence[T], order: Iterable[int]) -> list[T]:
    return [rows[i] for i in order]
