"""`kinkajou replay FOLDER`: makes the step that stopped a run once more, and looks where it first goes wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from kinkajou import config
from kinkajou.algos.losses import Loss
from kinkajou.batch import PPOBatch, TokenBatch
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.errors import UserError
from kinkajou.models.load import load_language_model, load_scalar_model
from kinkajou.parallel.strategy import Single
from kinkajou.train import grpo, ppo, reward, setup, sft
from kinkajou.train.nonfinite import Origin, first_origin
from kinkajou.train.parts import RLParts, drawn_from, with_critic
from kinkajou.train.preference_tasks import JudgedTask, PairTask
from kinkajou.train.replay_folder import WEIGHTS, read_replay
from kinkajou.train.tables import head
from kinkajou.train.update import Objective, Part, clipped, gradients

STAGES = {
    "sft": config.SFTConfig,
    "reward": config.RewardConfig,
    "prefer": config.PreferConfig,
    "ppo": config.PPOConfig,
    "grpo": config.GRPOConfig,
}
LossFn = Callable[[nn.Module, Any, Tensor], Loss]
SHOWN = 64
"""Rows in the table."""


def replay(folder: Path) -> None:
    """Prints the first bad tensor and each row's loss; UserError with exit code 1 where all is finite now."""
    about, batches, counts = read_replay(folder)
    cfg = settings(folder, about["stage"])
    s = Single()
    tokenizer, _ = load_tokenizer(str(folder))
    model = s.wrap(rebuilt(cfg, folder, tokenizer, about["objectives"][0]["name"]))
    load_exactly(model, folder / WEIGHTS)
    objectives = [
        Objective(batch.to(s.device), loss_of(cfg, one["name"], batch, about), one["weight"], one["name"])
        for one, batch in zip(about["objectives"], batches, strict=True)
    ]
    parts = [(objectives[i], counts[i].to(s.device), torch.tensor(rows)) for i, rows in about["parts"]]
    out = Console(highlight=False, soft_wrap=True)
    process = f", process {about['rank']}" if about["world"] > 1 else ""
    out.print(f"step {about['step']} of {about['stage']}{process}: first in {about['place']}", markup=False)
    out.print(f"  seen: {about['evidence']}", markup=False)
    origin = first_origin(model, parts, s) or summed(model, parts, s)
    table(out, model, parts, tokenizer)
    if origin is None:
        raise UserError(
            "not reproduced: every output and gradient is finite",
            evidence=f"the run saw: {about['evidence']}",
            fix="it came from another process's rows, or from the machine: look at its memory and GPU",
            exit_code=1,
        )
    out.print(head("found again"))
    for line in (f"first in {origin.place}", f"  seen: {origin.evidence}", f"  do:   {origin.fix}"):
        out.print(line, markup=False)


def summed(model: nn.Module, parts: Sequence[Part], s: Single) -> Origin | None:
    """Where only the sum over all micro-batches is not finite."""
    gradients(s, model, parts, (parts[0][0], parts[0][1]))
    norm = clipped(s, model, 1.0)
    model.zero_grad()
    if torch.isfinite(norm):
        return None
    return Origin("the sum of the gradients", f"gradient norm {norm.item()}", "lower --lr")


def settings(folder: Path, stage: str) -> config.StageConfig:
    """The run's, from the copy in the folder."""
    path = folder / "config.toml"
    tables = config.read_recipe(path)
    if stage not in STAGES or stage not in tables:
        raise UserError(f"{path} has no table [{stage}]", evidence=f"it has: {', '.join(tables)}")
    return cast(config.StageConfig, config.from_flat(STAGES[stage], tables[stage]))


def rebuilt(cfg: config.StageConfig, folder: Path, tokenizer: Any, name: str) -> nn.Module:
    """The model whose step it was, as its trainer makes it."""
    options = replace(setup.load_options(cfg.base, cfg.run.seed), family=None, checked=False)
    if isinstance(cfg, config.RewardConfig):
        return load_scalar_model(str(folder), tokenizer, options)
    if name == "value_loss":
        critic = folder / "critic"
        return load_scalar_model(str(critic if critic.is_dir() else folder), tokenizer, options)
    language = load_language_model(str(folder), tokenizer, options)
    return with_critic(cfg, language, str(folder)) if isinstance(cfg, config.PPOConfig) else language


def load_exactly(model: nn.Module, path: Path) -> None:
    found, own = load_file(path), dict(model.named_parameters())
    odd = sorted(found.keys() ^ own.keys()) or [name for name, x in found.items() if x.shape != own[name].shape]
    if odd:
        raise UserError(f"{path} does not fit the model", evidence=", ".join(odd[:5]))
    with torch.no_grad():
        for name, param in own.items():
            param.copy_(found[name])


def loss_of(cfg: config.StageConfig, name: str, batch: TokenBatch, about: dict[str, Any]) -> LossFn:
    """As the stage's trainer makes it."""
    if isinstance(cfg, config.SFTConfig) or name == "ptx_loss":
        return sft.token_loss
    if isinstance(cfg, config.RewardConfig):
        return reward.loss_of(cfg)
    if isinstance(cfg, config.PreferConfig):
        judged = cfg.method.reads == "judged"
        task = JudgedTask(cfg.method, (), 0, cfg.base.max_len) if judged else PairTask(cfg.method, (), 0)
        return task.loss
    state = SimpleNamespace(kl_coef=about["numbers"]["rl"]["kl_coef"])
    parts = cast(RLParts, SimpleNamespace(state=state, sampling=drawn_from(cfg)))
    if isinstance(cfg, config.GRPOConfig):
        return grpo.loss_of(cfg, parts)
    actor_loss, value_loss, shared_loss = ppo.losses_of(cfg, parts)
    return value_loss if name == "value_loss" else shared_loss if isinstance(batch, PPOBatch) else actor_loss


@torch.no_grad()
def table(out: Console, model: nn.Module, parts: Sequence[Part], tokenizer: Any) -> None:
    """Each row by itself: what it adds to the step's loss; bad ones first."""
    out.print(head("rows of the batch: tokens, part of the loss, text"))
    everything = [(o, count, row) for o, count, chosen in parts for row in chosen.tolist()]
    losses = [float(o.loss_fn(model, o.batch.select(torch.tensor([row])), count).value) for o, count, row in everything]
    order = sorted(range(len(losses)), key=lambda i: torch.tensor(losses[i]).isfinite().item())
    for i in order[:SHOWN]:
        objective, _, row = everything[i]
        tokens = objective.batch.tokens[row].reshape(-1, objective.batch.tokens.shape[-1])
        length = int(objective.batch.select(torch.tensor([row])).lengths.max())
        text = " | ".join(tokenizer.decode(side[:length].tolist()) for side in tokens)
        line = f"{objective.name} {row:<4} {length:6} {losses[i]:12.5g}  {' '.join(text.split())[:160]}"
        out.print(line, markup=False)
    if len(order) > SHOWN:
        out.print(f"and {len(order) - SHOWN} more")
