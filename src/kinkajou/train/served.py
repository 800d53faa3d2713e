"""The vLLM servers of a run, from its settings."""

import secrets
from collections.abc import Iterable
from pathlib import Path

from kinkajou.config import RLConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.engine.engine import Engine
from kinkajou.engine.vllm import Peer, Sync, VllmEngine, Wanted
from kinkajou.engine.vllm_server import Server
from kinkajou.engine.vllm_start import Started
from kinkajou.errors import UserError
from kinkajou.models.adapters import Save
from kinkajou.models.forward import LanguageModel
from kinkajou.models.load import find_model, save_model
from kinkajou.models.replica import build, shape_of
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.together import Together

BOUND = {"fp32": 1e-3, "bf16": 0.3}
"""Nats of the worst token that the parity gate lets pass, by the trainer's type."""
TYPES = {"fp32": "float32", "bf16": "bfloat16"}
START = "start:"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that a server can be made ready for."""


def vllm_engine(cfg: RLConfig, language: LanguageModel, form: ChatFormat, s: Strategy) -> Engine:
    """One process reads the policy itself; of several the first holds a copy, and all ask through it."""
    sync = sync_of(cfg)
    if s.world == 1:
        return made(cfg, language, form, sync)
    shape = shape_of(language, lora_rank=cfg.base.lora_rank, lora_alpha=cfg.base.lora_alpha)
    return Together(lambda: made(cfg, build(shape).to(s.device), form, sync), s, pad_id=form.pad_id)


def made(cfg: RLConfig, model: LanguageModel, form: ChatFormat, sync: Sync) -> VllmEngine:
    longest = min(cfg.base.max_len, getattr(model.inner.config, "max_position_embeddings", None) or cfg.base.max_len)
    folder = Path(cfg.run.output) / "vllm"

    def write(into: Path) -> None:
        lora: Save = "adapter" if sync == "adapter" else "merged"
        save_model(model, form.tokenizer, into, end_ids=form.end_ids, lora=lora)

    wanted = Wanted(
        sync=sync,
        bound=BOUND[cfg.base.dtype] if cfg.engine.server_gap is None else cfg.engine.server_gap,
        longest=longest,
        end_ids=tuple(sorted(form.end_ids)),
        pad_id=form.pad_id,
        folder=folder,
        run=f"kinkajou-{secrets.token_hex(4)}",
        base=Path(find_model(cfg.base.model)),
    )
    peers = [
        peer_of(cfg, model, where, wanted, folder / f"server-{number}.log")
        for number, where in enumerate(cfg.engine.server)
    ]
    return VllmEngine(model, peers, wanted, write=write)


def peer_of(cfg: RLConfig, model: LanguageModel, where: str, wanted: Wanted, log: Path) -> Peer:
    starts = where.startswith(START)
    server = Server(
        "" if starts else where,
        vocabulary=int(model.inner.get_input_embeddings().num_embeddings),
        end_ids=wanted.end_ids,
        timeout_s=cfg.engine.server_timeout_s,
    )
    if not starts:
        server.meet(wanted.longest)
        return Peer(server)
    cpu = model.device.type == "cpu"
    return Peer(server, Started(where.removeprefix(START), log, list(options(cfg, wanted)), cpu=cpu))


def options(cfg: RLConfig, wanted: Wanted) -> Iterable[str]:
    """What a server of our own is started with, besides its model and address."""
    yield from ("--dtype", TYPES[cfg.base.dtype], "--max-model-len", str(wanted.longest))
    yield from ("--logprobs-mode", "processed_logprobs")  # of the distribution that is sampled from
    if wanted.sync == "adapter":
        rank = next((rank for rank in RANKS if rank >= cfg.base.lora_rank), cfg.base.lora_rank)
        yield from ("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2")


def sync_of(cfg: RLConfig) -> Sync:
    """The means that the settings name, or the cheapest that they allow."""
    how, own = cfg.engine.server_sync, all(where.startswith(START) for where in cfg.engine.server)
    if how == "adapter" and not cfg.base.lora_rank:
        raise UserError("without LoRA there is no adapter to load", fix="--lora_rank 8, or another --server_sync")
    if how == "restart" and not own:
        raise UserError(
            "only servers that the run has started can be restarted",
            evidence=f"--server {' '.join(cfg.engine.server)}",
            fix="--server start:ENVIRONMENT, a folder with vLLM in it (docs/scaling.md)",
        )
    if how != "auto":
        return how
    if cfg.base.lora_rank:
        return "adapter"
    return "restart" if own else "reload"
