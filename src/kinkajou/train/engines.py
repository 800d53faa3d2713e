"""Who samples the answers of a run: the trainer itself, workers on Ray, or vLLM servers."""

from kinkajou.config import RLConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.engine.engine import Engine, LocalEngine
from kinkajou.models.forward import LanguageModel


def make_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat) -> Engine:
    return local_engine(cfg, language, form)


def local_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat) -> LocalEngine:
    """As many rows at once as a micro-batch has tokens for, 64 at least."""
    rows = max(64, cfg.optim.tokens_per_microbatch // cfg.base.max_len)
    return LocalEngine(language, end_ids=form.end_ids, pad_id=form.pad_id, max_rows=rows)
