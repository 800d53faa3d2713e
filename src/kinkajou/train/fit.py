"""The loop of training on records: what SFT, the reward model and every offline method have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kinkajou.algos.losses import Loss
from kinkajou.batch import TokenBatch
from kinkajou.config import OptimConfig, PreferConfig, RewardConfig, SFTConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.loader import Shuffle, share
from kinkajou.models.forward import PackedModel
from kinkajou.models.load import find_model
from kinkajou.train.identity import digest_of_model
from kinkajou.train.kept import Kept, ModelFolder, OptimizerState, RandomState, digest_of_format
from kinkajou.train.optim import lr_at, set_lr
from kinkajou.train.run import Run
from kinkajou.train.update import Objective, update


def fit(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    optim: OptimConfig,
    *,
    order: Shuffle,
    collate: Callable[[Sequence[int]], TokenBatch],
    loss_fn: Callable[[nn.Module, Any, Tensor], Loss],
    evaluate: Callable[[], dict[str, float]] | None,
    prepare: Callable[[int, Any], TokenBatch] | None = None,
) -> Path:
    """One `update` for each of the run's steps.  `collate` turns row numbers into a batch on the device.

    `prepare(step, batch)`, steps from 0, adds what needs the whole batch before any of it is trained on.
    """
    s = run.strategy

    def batch_of(step: int) -> TokenBatch:
        return collate(share(order.batch(step - 1), rank=s.rank, world=s.world))

    batches = made_ahead(batch_of, range(run.behind + 1, run.total + 1), s.device)
    with run:
        for step in run.steps():
            lr = lr_at(step - 1, run.total, peak=optim.lr, warmup=optim.warmup, schedule=optim.schedule)
            set_lr(optimizer, lr)
            with run.phase("data"):
                batch = next(batches)
            with run.phase("train"):
                if prepare:
                    batch = prepare(step - 1, batch)
                metrics = update(
                    s,
                    model,
                    optimizer,
                    [Objective(batch, loss_fn)],
                    tokens_per_microbatch=run.budget,
                    max_norm=optim.max_norm,
                    guard=run.guard,
                )
            run.count_tokens("train", batch.lengths.sum())
            metrics |= {"lr": lr, "epoch": step / order.batches_per_epoch}
            if evaluate and (run.due(run.settings.eval_every) or step == run.total):
                metrics |= evaluate()
            run.end_step(metrics)
        return run.finish()


def kept_of_fit(
    cfg: SFTConfig | RewardConfig | PreferConfig,
    model: PackedModel,
    optimizer: Optimizer,
    form: ChatFormat,
    **records: str,
) -> Kept:
    """What training on records keeps; `records` are digests of what it reads."""
    source = find_model(cfg.base.model)
    return Kept(
        items=[
            ModelFolder("policy", "", model, form, lora=cfg.base.lora_save),
            OptimizerState("optimizer", optimizer, model),
            RandomState(),
        ],
        made_from={"model": digest_of_model(source), "tokenizer": digest_of_format(form), **records},
    )


def made_ahead(make: Callable[[int], TokenBatch], steps: Iterable[int], device: torch.device) -> Iterator[TokenBatch]:
    """The steps' batches in order; on a GPU the next one is made while it works on this one.

    On a CPU there is nothing to overlap with: a thread would take the cores that train.
    """
    if device.type == "cpu":
        yield from map(make, steps)
        return
    place = partial(torch.cuda.set_device, device) if device.index is not None else None
    with ThreadPoolExecutor(1, initializer=place) as thread:
        coming: Future[TokenBatch] | None = None
        for step in steps:
            now, coming = coming, thread.submit(make, step)
            if now:
                yield now.result()
        if coming:
            yield coming.result()
