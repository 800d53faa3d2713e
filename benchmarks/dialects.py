"""The dialects side by side: their conventions, and what each makes of the same tensors.

    python -m benchmarks.dialects            # prints both tables
    python -m benchmarks.dialects --write    # and puts them into docs/numerics.md

The tensors: 4 answers of 9, 6, 4 and 1 tokens (at most 9), scores up to 6.5, old and new log-probabilities that are a
little apart and, for the second policy loss, far apart.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinkajou import config
from kinkajou.algos import kl, losses
from kinkajou.batch import GRPOBatch
from kinkajou.config.dialects import GRPO
from kinkajou.models.forward import TokenScores
from kinkajou.parallel.strategy import Single
from kinkajou.train.estimates import ppo_estimates, value_targets
from kinkajou.train.policy import kl_term, policy_loss

PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
LENGTHS, LONGEST = (9, 6, 4, 1), 9
SHOWN = {
    "score sits": "score_at",
    "score bound": "score_clip",
    "KL estimator": "kl_estimator",
    "KL coefficient": "kl_coef",
    "KL bound": "kl_clamp",
    "k3: bound on the log-ratio, on the value": ("k3_input_clamp", "k3_output_clamp"),
    "advantage": "advantage",
    "gamma, lambda": ("gamma", "lam"),
    "advantages whitened": "whiten_advantages",
    "variance": "whiten_variance",
    "whitened over": "whiten_over",
    "clip, value clip": ("clip", "value_clip"),
    "dual clip": "dual_clip",
    "log-ratio bound": "log_ratio_clamp",
    "aggregation": "aggregation",
    "epochs": "epochs",
    "temperature, top-k": ("temperature", "top_k"),
    "learning rate, critic's": ("lr", "critic_lr"),
    "gradient norm bound": "max_norm",
}


def settings(dialect: str) -> config.PPOConfig:
    return config.PPOConfig(
        base=config.ModelConfig(model="m"),
        rollout=config.RolloutConfig(prompts="p", max_new_tokens=LONGEST),
        judge=config.JudgeConfig(reward=("r",)),
        run=config.RunConfig(output="o"),
        numerics=config.PPONumerics(dialect=dialect),
    )


def quantities(dialect: str) -> dict[str, Tensor]:
    """Everything that PPO computes from one batch, in a dialect and, so that only conventions differ, with
    kinkajou's coefficients (KL 0.05, gamma 1, lambda 0.95, clip 0.2, value clip 0.2)."""
    cfg, dice = settings(dialect), torch.Generator().manual_seed(0)
    same = {"kl_coef": 0.05, "lam": 0.95, "value_clip": 0.2}
    for group, names in ((cfg.kl, ("kl_coef",)), (cfg.algo, ("lam", "value_clip"))):
        for name in names:
            object.__setattr__(group, name, same[name])
    width = LONGEST + 1  # one free column
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(LENGTHS), width, generator=dice)

    old = -noise(1.0).abs() - 0.5
    ref, values = old + noise(0.3), noise(1.0)
    near, far = old + noise(0.15), old + noise(1.5)
    scores = torch.tensor([6.5, -1.0, 0.4, 2.0])
    bounded = kl.bounded(scores, cfg.numerics.score_clip)
    where = value_targets(cfg, mask)
    made = ppo_estimates(cfg, bounded, kl_term(cfg, old, ref), values * where, mask, kl_coef=0.05, s=Single())
    batch = GRPOBatch(torch.zeros(4, width + 1).long(), mask, old, ref, made.advantages, torch.ones_like(old))

    def policy(new: Tensor) -> Tensor:
        return policy_loss(cfg, TokenScores(new, torch.zeros_like(new)), batch, batch.count, kl_coef=0.0).value

    moved = values + noise(0.5)
    critic = losses.clipped_value_loss(
        moved, values, made.returns, made.value_mask, made.value_mask.sum(), clip=cfg.algo.value_clip
    )
    return {
        "rewards": made.rewards,
        "advantages": made.advantages * mask,
        "returns": made.returns,
        "policy loss, moderate ratios": policy(near),
        "policy loss, large ratios": policy(far),
        "value loss": critic.value,
    }


def conventions() -> list[str]:
    """The conventions of PPO."""
    names = list(config.DIALECTS)
    return table(names, SHOWN, {name: config.flat(settings(name)) for name in names})


GROUP_SHOWN = {
    "group deviation plus": "group_eps",
    "variance of a group": "group_variance",
    "KL in, estimator": ("kl_in", "kl_estimator"),
    "KL coefficient": "kl_coef",
    "gradient of the KL": "kl_gradient",
    "advantages": "returns",
    "aggregation": "aggregation",
    "clip, dual clip": ("clip", "dual_clip"),
    "log-ratio bound": "log_ratio_clamp",
}


def groups() -> list[str]:
    """The conventions of `kinkajou grpo --algorithm grpo` in the dialects that have critic-free methods."""
    names = list(GRPO)
    flat = {
        name: config.flat(
            config.GRPOConfig(
                base=config.ModelConfig(model="m"),
                rollout=config.RolloutConfig(prompts="p"),
                judge=config.JudgeConfig(reward=("r",)),
                run=config.RunConfig(output="o"),
                numerics=config.GRPONumerics(dialect=name),
            )
        )
        for name in names
    }
    return table(names, GROUP_SHOWN, flat)


def table(names: list[str], rows: dict[str, Any], flat: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| convention | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, keys in rows.items():
        cells = [
            ", ".join(shown(flat[name][key]) for key in ((keys,) if isinstance(keys, str) else keys)) for name in names
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def shown(value: Any) -> str:
    words = {True: "yes", False: "no", None: "as lr", float("inf"): "none"}
    if isinstance(value, bool) or value is None or value == float("inf"):
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")


def differences() -> list[str]:
    names = list(config.DIALECTS)
    found = {name: quantities(name) for name in names}
    lines = ["| quantity | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for quantity, ours in found["kinkajou"].items():
        cells = []
        for name in names:
            x = found[name][quantity]
            if x.ndim:
                worst = (x - ours).abs().max().item()
                cells.append("0" if worst == 0 else f"differs by {worst:.4f}")
            else:
                cells.append(f"{x.item():.4f}")
        lines.append(f"| {quantity} | " + " | ".join(cells) + " |")
    return lines


def insert(text: str, name: str, lines: list[str]) -> str:
    """The page with the lines between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return "\n".join([f"{head}{begin}", *lines, f"{end}{tail}"])


def main(arguments: list[str]) -> None:
    tables: dict[str, Callable[[], list[str]]] = {
        "conventions": conventions,
        "differences": differences,
        "groups": groups,
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, make in tables.items():
        lines = make()
        print("\n".join(lines), end="\n\n")
        text = insert(text, name, lines)
    if "--write" in arguments:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
