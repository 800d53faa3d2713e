"""Who samples the answers of a run: the trainer itself, workers on Ray, or vLLM servers."""

import copy

from kinkajou.config import RLConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.engine.engine import Engine, LocalEngine
from kinkajou.engine.pool_engine import PoolEngine
from kinkajou.engine.ray_engine import make_ray_engine
from kinkajou.engine.worker import Plan
from kinkajou.models.forward import LanguageModel
from kinkajou.models.replica import shape_of
from kinkajou.parallel.allocator import free_bytes
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.served import vllm_engine
from kinkajou.train.together import Together

COPY_SHARE = 0.4
"""Share of the free memory that `auto` gives to the engine's copy: training takes the rest."""


def make_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat, s: Strategy) -> Engine:
    """The engine of a run, which has no weights before its first `load` where it is not the trainer itself."""
    if cfg.engine.rollout == "ray":
        return ray_engine(cfg, language, form, s)
    if cfg.engine.rollout == "vllm":
        return vllm_engine(cfg, language, form, s)
    return local_engine(cfg, language, form, s)


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


def local_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat, s: Strategy) -> LocalEngine:
    passes = s.passes if language.gathered else None
    return LocalEngine(language, end_ids=form.end_ids, pad_id=form.pad_id, max_rows=rows_at_once(cfg), passes=passes)


def rows_at_once(cfg: RLConfig) -> int:
    """As many as a micro-batch has tokens for, 64 at least."""
    return max(64, cfg.optim.tokens_per_microbatch // cfg.base.max_len)


def ray_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat, s: Strategy) -> Engine:
    """Workers that the first process owns; all processes ask them together."""
    shape = shape_of(language, lora_rank=cfg.base.lora_rank, lora_alpha=cfg.base.lora_alpha)

    def plan(device: str) -> Plan:
        return Plan(shape, sorted(form.end_ids), form.pad_id, rows_at_once(cfg), device)

    def make() -> PoolEngine:
        return make_ray_engine(language, plan, workers=cfg.engine.workers, address=cfg.engine.ray_address, say=print)

    return make() if s.world == 1 else Together(make, s, pad_id=form.pad_id)
