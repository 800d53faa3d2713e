"""Run by torchrun in test_run_findings.py: one of two ranks alone has what is not finite, or has a finding."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kinkajou.algos.losses import Loss, cross_entropy
from kinkajou.batch import TokenBatch
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel
from kinkajou.parallel.make import make_strategy
from kinkajou.train.optim import adamw
from kinkajou.train.run import Run
from kinkajou.train.update import Objective, update
from small import Small
from tiny import ours, peer, ragged, tiny_config

NAN = float("nan")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    s = make_strategy("ddp")
    said: dict[str, str] = {}

    def refused(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except UserError as fault:
            said[name] = str(fault)

    def spoilt(how: str) -> Callable[[nn.Module, TokenBatch, Tensor], Loss]:
        def loss(model: nn.Module, batch: TokenBatch, count: Tensor) -> Loss:
            value = cross_entropy(model(batch.tokens, batch.mask).logp, batch.mask, count).value
            if s.rank == 1:
                value = value * NAN if how == "loss" else value + (policy.module.lm_head.weight * 0).sum().sqrt()
            return Loss(value, {})

        return loss

    def step(how: str) -> Callable[[], object]:
        tokens, real = ragged((9, 4, 6), width=9, seed=s.rank)
        given = {"tokens_per_microbatch": 9, "max_norm": 1.0}
        objective = Objective(TokenBatch(tokens, real[:, 1:]), spoilt(how))
        return lambda: update(s, model, optimizer, [objective], **given)  # type: ignore[arg-type]

    policy = LanguageModel(
        ours(AutoModelForCausalLM, tiny_config("llama"), peer(AutoModelForCausalLM, tiny_config("llama")))
    )
    model = s.wrap(policy)
    optimizer = adamw(policy, lr=0.1, weight_decay=0.1)
    for how in ("loss", "gradient", "loss"):
        refused(how, step(how))

    small = Small(folder, *["-"] * 6)
    run = Run("sft", small.settings("sft", folder / "run", stop_on=("lr_zero",), data="x"), s, total=9, shown=())
    for _ in zip(range(3), run.steps(), strict=False):
        refused("stop", lambda: run.end_step({"lr": 0.0 if s.rank == 1 else 1.0}))
    (folder / f"{s.rank}.json").write_text(json.dumps(said))
    s.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
