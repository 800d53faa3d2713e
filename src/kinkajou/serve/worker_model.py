"""Loads a language model for serving: checked, with a cache for all its slots, its first token proven."""

from typing import Any

import torch

from kinkajou.batch import Sampling
from kinkajou.data.chat import ChatFormat
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.scheduler import Sample
from kinkajou.engine.session import Session
from kinkajou.errors import UserError
from kinkajou.models.forward import PackedModel
from kinkajou.models.load import LoadOptions, find_model, load_language_model
from kinkajou.serve.worker_engine import Engine, Write
from kinkajou.serve.worker_prompts import Pieces, Prompts

LONGEST_CONTEXT = 4096
"""Tokens of the context where neither the settings nor the model name fewer."""


def load_engine(settings: dict[str, Any], write: Write) -> tuple[Engine, dict[str, Any]]:
    """The engine and what there is to know of it; UserError for what cannot be served."""
    source = find_model(settings["source"])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    tokenizer, template = load_tokenizer(source, template=settings["template"])
    form = ChatFormat(tokenizer)
    options = LoadOptions(dtype=settings["dtype"], bits=settings["bits"])
    model = load_language_model(source, tokenizer, options).freeze()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    context, slots = context_of(model, settings["context"]), settings["slots"]
    engine = LocalEngine(model, end_ids=form.end_ids, pad_id=form.pad_id)
    session = engine.session([], rows=slots, room=context, steady=True)
    prove(session, form)
    facts = {
        "context": context,
        "slots": slots,
        "vocabulary": len(tokenizer),
        "template": template,
        "dtype": settings["dtype"],
        "bits": settings["bits"],
        "device": model.device.type,
    }
    longest = min(settings["max_tokens"] or context, context)
    return Engine(session, Prompts(form, context=context, longest=longest), Pieces(form), write), facts


def context_of(model: PackedModel, asked: int | None) -> int:
    """Tokens of prompt and answer together."""
    config: Any = model.inner.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if asked and most and asked > most:
        raise UserError(
            "the context is longer than the model's",
            evidence=f"{asked:,} tokens were asked for, the model has positions for {most:,}",
            fix=f"--context {most} or less",
        )
    return asked or min(most or LONGEST_CONTEXT, LONGEST_CONTEXT)


def prove(session: Session, form: ChatFormat) -> None:
    """Two greedy tokens, so that every part of a step has run once; MemoryError's words are for users."""
    try:
        sample = Sample(0, (form.end_id,), 0, 2, Sampling(temperature=0.0))
        session.add(sample)
        while session.busy:
            session.step()
    except (MemoryError, RuntimeError) as fault:
        if isinstance(fault, RuntimeError) and "memory" not in str(fault):
            raise
        raise UserError(
            "there is not enough memory for the cache",
            evidence=f"{session.scheduler.rows} slots of {session.room:,} tokens",
            fix="fewer --slots, or a shorter --context",
            exit_code=4,
        ) from None
    if not sample.logps or not all(logp <= 0.0 for logp in sample.logps):
        raise UserError("the model says no token", evidence="its log-probabilities are not numbers", exit_code=4)
