"""Who samples the answers of a run: the trainer itself, workers on Ray, or vLLM servers."""

import copy

from kinkajou.config import RLConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.engine.engine import Engine, LocalEngine
from kinkajou.models.forward import LanguageModel
from kinkajou.parallel.allocator import free_bytes
from kinkajou.parallel.strategy import Strategy

COPY_SHARE = 0.4
"""Share of the free memory that `auto` gives to the engine's copy: training takes the rest."""


def make_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat) -> Engine:
    return local_engine(cfg, language, form)


def sampled_from(cfg: RLConfig, language: LanguageModel, s: Strategy) -> LanguageModel:
    """The model that a local engine reads: the policy itself, or where its weights will be sharded a copy of it.

    Called before the strategy takes the policy.
    """
    if not s.sharded or cfg.engine.rollout != "local":
        return language
    size = sum(param.numel() for param in language.parameters()) * (2 if cfg.base.dtype == "bf16" else 4)
    free = free_bytes(s.device)
    if cfg.parallel.engine_weights == "sharded" or (cfg.parallel.engine_weights == "auto" and size > COPY_SHARE * free):
        s.notes.append(f"answers are sampled by the sharded model: a copy would take {size / 1e9:.1f} GB")
        return language
    s.notes.append(f"answers are sampled from a copy of the weights on each process, {size / 1e9:.3g} GB")
    return copy.deepcopy(language).freeze().to(s.device)


def local_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat) -> LocalEngine:
    """As many rows at once as a micro-batch has tokens for, 64 at least."""
    rows = max(64, cfg.optim.tokens_per_microbatch // cfg.base.max_len)
    return LocalEngine(language, end_ids=form.end_ids, pad_id=form.pad_id, max_rows=rows)
