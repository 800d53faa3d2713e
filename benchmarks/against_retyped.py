"""Our dialects of OpenRLHF and verl against their formulas, retyped."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import retyped
from benchmarks.cases import GROUP, SAMPLES, WIDTH, Case, pair_tensors, policy_tensors
from benchmarks.ours import differentiated, settings
from benchmarks.table import Row, difference, shown
from kinkajou.algos import kl, losses
from kinkajou.batch import GRPOBatch, ScoredRollout
from kinkajou.config import GRPOConfig, PPOConfig
from kinkajou.models.forward import TokenScores
from kinkajou.parallel.strategy import Single
from kinkajou.train.estimates import grpo_advantages, ppo_estimates
from kinkajou.train.policy import correction, kl_term, policy_loss
from kinkajou.train.rollouts import shaped

OPENRLHF, VERL = "openrlhf-0.11", "verl-2026.01"
SOURCE = {OPENRLHF: "OpenRLHF 0.11.0, retyped", VERL: "verl 2026-01, retyped"}
Flags = dict[str, Any]


def ppo(dialect: str, flags: Flags) -> PPOConfig:
    return settings(PPOConfig, dialect, longest=WIDTH, samples=SAMPLES, **flags)


def grpo(dialect: str, flags: Flags) -> GRPOConfig:
    return settings(GRPOConfig, dialect, longest=WIDTH, samples=SAMPLES, group_size=GROUP, **flags)


def row(dialect: str, name: str, flags: Flags, value: float, gradient: float | None = None) -> Row:
    return Row(SOURCE[dialect].split()[0], name, shown({"dialect": dialect} | flags), SOURCE[dialect], value, gradient)


def inputs(*, holes: bool = False) -> dict[str, Tensor]:
    """Some log-ratios and one score lie beyond the clamps; `holes` cuts tool output out of the answers."""
    x = policy_tensors()
    x["ref_logp"] = x["ref_logp"].clone()
    x["ref_logp"][0, 0] += 13.0
    x["ref_logp"][1, 0] -= 14.0
    x["scores"][2] = 17.0
    if holes:
        x["mask"] = x["mask"] & (torch.arange(WIDTH) % 4 != 2)
    return x


def compared(dialect: str, name: str, flags: Flags, leaf: Tensor, mask: Tensor, pair: tuple[Any, Any]) -> Row:
    """Value and gradient: `pair` is our loss of a float32 tensor and theirs of rows."""
    ours_of, theirs_of = pair
    own, other = leaf.clone().requires_grad_(), leaf.double().requires_grad_()
    ours, theirs = ours_of(own), theirs_of(retyped.rows(other, mask))
    gradients = (torch.autograd.grad(ours, own)[0], torch.autograd.grad(theirs, other)[0])
    return row(dialect, name, flags, difference(ours, theirs), difference(*gradients))


def kl_rows(dialect: str) -> list[Row]:
    x, found = inputs(), []
    logp, ref = (retyped.rows(x[key], x["mask"]) for key in ("logp", "ref_logp"))
    theirs_of = retyped.openrlhf_kl if dialect == OPENRLHF else retyped.verl_kl
    for kind in ("k1", "k2", "k3") + (("abs",) if dialect == VERL else ()):
        flags = {"kl_estimator": kind}
        ours = kl_term(ppo(dialect, flags), x["logp"], x["ref_logp"]) * x["mask"]
        pairs = [list(zip(*sample, strict=True)) for sample in zip(logp, ref, strict=True)]
        theirs = retyped.wide([[theirs_of(a, b, kind) for a, b in sample] for sample in pairs], x["mask"])
        found.append(row(dialect, f"KL {kind}", flags, difference(ours, theirs)))
    if dialect == VERL:
        found.append(straight_through_row(x))
    return found


def straight_through_row(x: dict[str, Tensor]) -> Row:
    flags, ones = {"kl_in": "loss", "kl_estimator": "k3", "kl_gradient": "k2"}, torch.ones_like(x["logp"])
    cfg = ppo(VERL, flags)
    ref = retyped.rows(x["ref_logp"], x["mask"])

    def ours(leaf: Tensor) -> Tensor:
        term = kl.with_gradient(kl_term(cfg, leaf, x["ref_logp"]), leaf, x["ref_logp"], ones, cfg.kl.kl_gradient)
        return losses.aggregated(term, x["mask"], count(x["mask"]), "token_mean")

    def theirs(logp: retyped.Rows) -> Tensor:
        pairs = [list(zip(*sample, strict=True)) for sample in zip(logp, ref, strict=True)]
        terms = [[retyped.straight_through(retyped.verl_kl(a, b, "k3"), a, b) for a, b in one] for one in pairs]
        return retyped.aggregate(terms, "token-mean")

    return compared(VERL, 'KL "k3+" (gradient of k2)', flags, x["logp"], x["mask"], (ours, theirs))


def count(mask: Tensor) -> Tensor:
    return torch.tensor([float(mask.sum()), float(len(mask))])


def rollout(x: dict[str, Tensor]) -> ScoredRollout:
    tokens, ended = torch.zeros(SAMPLES, WIDTH + 1, dtype=torch.long), torch.ones(SAMPLES, dtype=torch.bool)
    return ScoredRollout(tokens, x["mask"], x["logp"], ended, x["scores"])


def paid_out(dialect: str, logp: retyped.Sample, ref: retyped.Sample, score: Tensor) -> retyped.Sample:
    """Rewards of one answer: 0.1 x k1 taken from each token, the score (OpenRLHF: within 10) on the last."""
    kl_of = retyped.openrlhf_kl if dialect == OPENRLHF else retyped.verl_kl
    paid = [-0.1 * kl_of(a, b, "k1") for a, b in zip(logp, ref, strict=True)]
    paid[-1] = paid[-1] + (retyped.clamp(score, -10, 10) if dialect == OPENRLHF else score)
    return paid


def estimate_rows(dialect: str) -> list[Row]:
    """Rewards, advantages and returns of PPO, over answers with holes."""
    x, flags = inputs(holes=True), {"kl_coef": 0.1, "gamma": 0.97, "lam": 0.9}
    cfg, mask = ppo(dialect, flags), x["mask"]
    kl_ours = kl_term(cfg, x["logp"], x["ref_logp"])
    ours = ppo_estimates(cfg, shaped(cfg, rollout(x)), kl_ours, x["values"], mask, kl_coef=0.1, s=Single())
    names = ("logp", "ref_logp", "values")
    samples = zip(*(retyped.rows(x[key], mask) for key in names), x["scores"].double(), strict=True)
    rewards, advantages, returns = [], [], []
    for logp, ref, values, score in samples:
        paid = paid_out(dialect, logp, ref, score)
        gained, targets = retyped.gae(paid, values, 0.97, 0.9)
        rewards.append(paid)
        advantages.append(gained)
        returns.append(targets)
    normal = (retyped.openrlhf_normalised if dialect == OPENRLHF else retyped.verl_whitened)(advantages)
    pairs = {"rewards": (ours.rewards, rewards), "returns": (ours.returns, returns)}
    pairs["whitened advantages"] = (ours.advantages, normal)
    return [
        row(dialect, f"PPO {name}", flags, difference(own, retyped.wide(theirs, mask)))
        for name, (own, theirs) in pairs.items()
    ]


def policy_row(
    dialect: str,
    name: str,
    cfg: Any,
    flags: Flags,
    how: str,
    level: str = "token",
    *,
    far: bool = False,
    **clips: float,
) -> Row:
    x = inputs()
    mask, advantages = x["mask"], torch.randn(x["logp"].shape, generator=torch.Generator().manual_seed(5))
    old = x["old_logp"].clone()
    if far:  # a ratio of e^4 where the advantage is negative: what the dual clip is for
        old[3, 0], advantages[3, 0] = x["logp"][3, 0] - 4, -1.0
    tokens = torch.zeros(SAMPLES, WIDTH + 1, dtype=torch.long)
    batch = GRPOBatch(tokens, mask, old, x["ref_logp"], advantages, torch.ones_like(old))
    rows_of = {"old": retyped.rows(old, mask), "advantages": retyped.rows(advantages, mask)}

    def ours(leaf: Tensor) -> Tensor:
        return policy_loss(cfg, TokenScores(leaf, torch.zeros_like(leaf)), batch, batch.count, kl_coef=0.0).value

    def theirs(logp: retyped.Rows) -> Tensor:
        terms = retyped.policy_terms(logp, rows_of["old"], rows_of["advantages"], level=level, **clips)
        return retyped.aggregate(terms, how, WIDTH)

    return compared(dialect, name, flags, x["logp"], mask, (ours, theirs))


AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "fixed_length",
}


def policy_rows(dialect: str) -> list[Row]:
    dual = 3.0 if dialect == VERL else 0.0
    found = [
        policy_row(dialect, "PPO policy loss", ppo(dialect, {}), {}, "token-mean", far=True, dual=dual),
        policy_row(
            dialect,
            "GSPO policy loss",
            grpo(dialect, {"algorithm": "gspo"}),
            {"algorithm": "gspo"},
            "seq-mean-token-mean",
            "sequence",
            low=3e-4,
            high=4e-4,
        ),
    ]
    if dialect == OPENRLHF:
        flags: Flags = {"dual_clip": 3.0}
        name = "PPO policy loss, dual clip 3"
        return [*found, policy_row(dialect, name, ppo(dialect, flags), flags, "token-mean", far=True, dual=3.0)]
    for theirs, ours in AGGREGATIONS.items():
        flags = {"aggregation": ours}
        found.append(policy_row(dialect, f"policy loss, {theirs}", ppo(dialect, flags), flags, theirs, dual=3.0))
    return found


def value_row(dialect: str) -> Row:
    x, cfg = inputs(), ppo(dialect, {})
    mask, returns = x["mask"], x["values"] + x["scores"].clamp(-2, 2)[:, None]
    others = (retyped.rows(x["values"], mask), retyped.rows(returns, mask))

    def ours(leaf: Tensor) -> Tensor:
        clip = cfg.algo.value_clip
        return losses.clipped_value_loss(leaf, x["values"], returns, mask, mask.sum().float(), clip=clip).value

    def theirs(values: retyped.Rows) -> Tensor:
        return retyped.aggregate(retyped.value_terms(values, *others, 0.5), "token-mean")

    return compared(dialect, "value loss", {}, x["new_values"], mask, (ours, theirs))


GROUPS: dict[str, tuple[tuple[str, Flags, str, bool], ...]] = {
    OPENRLHF: (
        ("rloo", {"algorithm": "rloo"}, "rloo", False),
        ("dr_grpo", {"algorithm": "dr_grpo"}, "mean", False),
        ("group_norm", {"algorithm": "grpo"}, "openrlhf", False),
        ("reinforce_baseline", {"algorithm": "reinforce++_baseline"}, "mean", True),
    ),
    VERL: (("GRPO", {"algorithm": "grpo"}, "verl", False), ("RLOO", {"algorithm": "rloo"}, "rloo", False)),
}


def group_rows(dialect: str) -> list[Row]:
    """Advantages from scores; with the KL in the rewards where the dialect has it there."""
    x, found = inputs(), []
    mask = x["mask"]
    normal = retyped.openrlhf_normalised if dialect == OPENRLHF else retyped.verl_whitened
    for name, flags, kind, whitened in GROUPS[dialect]:
        in_reward = dialect == OPENRLHF
        flags = flags | ({"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.1} if in_reward else {})
        cfg = grpo(dialect, flags)
        kl_ours = kl_term(cfg, x["logp"], x["ref_logp"])
        coefficient = cfg.kl.kl_coef if in_reward else 0.0
        ours = grpo_advantages(cfg, x["scores"], kl_ours, mask, kl_coef=coefficient, s=Single())
        gained = torch.tensor(retyped.grouped(x["scores"].double().tolist(), GROUP, kind), dtype=torch.float64)
        if in_reward:
            both = (retyped.rows(x[key], mask) for key in ("logp", "ref_logp"))
            paid = [paid_out(dialect, *sample) for sample in zip(*both, gained, strict=True)]
            spread = [retyped.to_go(rewards, 1.0) for rewards in paid]
        else:
            spread = [[a] * int(n) for a, n in zip(gained, mask.sum(1), strict=True)]
        theirs = retyped.wide(normal(spread) if whitened else spread, mask)
        found.append(row(dialect, f"advantages, {name}", flags, difference(ours, theirs)))
    flags = {"algorithm": "reinforce++", "kl_coef": 0.1}
    cfg = grpo(dialect, flags)
    kl_ours = kl_term(cfg, x["logp"], x["ref_logp"])
    ours = grpo_advantages(cfg, shaped(cfg, rollout(x)), kl_ours, mask, kl_coef=0.1, s=Single())
    both = (retyped.rows(x[key], mask) for key in ("logp", "ref_logp"))
    paid = [paid_out(dialect, *sample) for sample in zip(*both, x["scores"].double(), strict=True)]
    gains = [retyped.to_go(rewards, 1.0) for rewards in paid]
    return [*found, row(dialect, "advantages, REINFORCE++", flags, difference(ours, retyped.wide(normal(gains), mask)))]


def correction_rows() -> list[Row]:
    x, found = inputs(), []
    kinds: dict[str, Callable[[Tensor, Tensor, float], float]] = {"truncate": retyped.truncated, "mask": retyped.icepop}
    for how, weight in kinds.items():
        flags = {"rollout_correction": how, "correction_cap": 1.2, "correction_bound": 0.0}
        mask = x["mask"]
        ours = correction(ppo(OPENRLHF, flags), x["logp"], x["old_logp"], mask, Single())[0] * mask
        both = zip(retyped.rows(x["old_logp"], mask), retyped.rows(x["logp"], mask), strict=True)
        theirs = retyped.wide([[weight(a, b, 1.2) for a, b in zip(*sample, strict=True)] for sample in both], mask)
        name = {"truncate": "TIS", "mask": "IcePop"}[how]
        found.append(row(OPENRLHF, f"rollout correction, {name}", flags, difference(ours, theirs)))
    return found


def preference_rows() -> list[Row]:
    """DPO with smoothed labels (cDPO) and IPO on sums, which TRL has not; the ranking loss."""
    x, beta, smoothing = pair_tensors(), 0.1, 0.1

    def cdpo(gap: Tensor) -> Tensor:
        return -(1 - smoothing) * retyped.log_sigmoid(beta * gap) - smoothing * retyped.log_sigmoid(-beta * gap)

    kinds: dict[str, tuple[Flags, Callable[[Tensor], Tensor]]] = {
        "DPO": ({"loss": "sigmoid"}, lambda gap: -retyped.log_sigmoid(beta * gap)),
        "cDPO": ({"loss": "cdpo", "label_smoothing": smoothing}, cdpo),
        "IPO on sums": ({"loss": "ipo"}, lambda gap: (gap - 1 / (2 * beta)) ** 2),
    }
    found = []
    for name, (flags, loss) in kinds.items():
        value, gradient = differentiated(Case("dpo", name, {}, flags), x)
        leaf = x["logp"].double().requires_grad_()
        ratios = [sum(sample) for sample in retyped.rows(leaf - x["ref_logp"].double(), x["mask"])]
        half = len(ratios) // 2
        theirs = retyped.pair_mean(ratios[:half], ratios[half:], loss)
        gap = difference(gradient, torch.autograd.grad(theirs, leaf)[0])
        found.append(Row("OpenRLHF", name, shown(flags), SOURCE[OPENRLHF], difference(value, theirs), gap))
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    value, gradient = differentiated(Case("reward", "RM", {}, {"loss": "log_sig"}), {"scores": scores})
    leaf = scores.double().requires_grad_()
    theirs = retyped.pair_mean(list(leaf[:6]), list(leaf[6:]), lambda gap: -retyped.log_sigmoid(gap))
    gap = difference(gradient, torch.autograd.grad(theirs, leaf)[0])
    return [
        *found,
        Row("OpenRLHF", "RM ranking loss", "--loss log_sig", SOURCE[OPENRLHF], difference(value, theirs), gap),
    ]


def controller_row() -> Row:
    own = theirs = 0.2
    for measured in (9.0, 5.8, 6.1, 0.3, -1.0):
        own = kl.adapted_coefficient(own, measured, target=6.0, horizon=10_000, samples=512)
        theirs = retyped.next_coefficient(theirs, measured, 6.0, 10_000, 512)
    flags = {"kl_target": 6.0, "kl_horizon": 10_000}
    return row(OPENRLHF, "adaptive KL, 5 steps", flags, abs(own - theirs) / theirs)


def rows() -> list[Row]:
    found: list[Row] = []
    for dialect in (OPENRLHF, VERL):
        found += kl_rows(dialect) + estimate_rows(dialect) + policy_rows(dialect) + [value_row(dialect)]
        found += group_rows(dialect)
        if dialect == OPENRLHF:
            found += [*correction_rows(), *preference_rows(), controller_row()]
    return found
