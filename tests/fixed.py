"""Every stage's loss on a fixed batch and one optimiser step on it: what test_invariance.py takes in many forms."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kinkajou.algos.advantages import extended
from kinkajou.algos.losses import Loss
from kinkajou.algos.preferences import RANKING
from kinkajou.batch import GRPOBatch, PairBatch, PPOBatch, Sampling, TokenBatch, pad_rows
from kinkajou.config import ALGORITHMS, PreferenceLossConfig
from kinkajou.config.preference import PREFERENCE_LOSSES
from kinkajou.data.chat import Encoded
from kinkajou.models.forward import ActorCritic
from kinkajou.models.heads import scalar_head
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model
from kinkajou.parallel.strategy import Single, Strategy
from kinkajou.train.optim import adamw
from kinkajou.train.policy import policy_loss
from kinkajou.train.ppo import losses_of
from kinkajou.train.preference_rows import JudgedRow
from kinkajou.train.preference_tasks import JudgedTask, PairTask
from kinkajou.train.sft import token_loss
from kinkajou.train.update import Objective, update
from small import Small
from tiny import PAD, ragged, tiny_tokenizer

LENGTHS = (17, 3, 9, 2, 12, 5, 14, 7)
SAMPLING = Sampling(temperature=0.8, top_k=60, top_p=0.95)
LossFn = Callable[[nn.Module, Any, Tensor], Loss]


@dataclass(frozen=True)
class Case:
    kind: str  # of model: language, scalar or shared
    batch: TokenBatch
    loss_fn: LossFn


@dataclass(frozen=True)
class Outcome:
    numbers: dict[str, float]  # losses, metrics, grad_norm
    gradients: dict[str, Tensor]  # before clipping
    weights: dict[str, Tensor]  # after the step


class Here(Single):
    """One process on the CPU, whatever the machine has."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")


@cache
def loaded(folder: str, kind: str, rank: int, checkpointing: bool) -> nn.Module:
    options = LoadOptions(lora_rank=rank, gradient_checkpointing=checkpointing)
    if kind == "scalar":
        return load_scalar_model(folder, tiny_tokenizer(), options)
    language = load_language_model(folder, tiny_tokenizer(), options)
    if kind == "language":
        return language
    head = scalar_head(language.width, seed=0)
    with torch.no_grad():
        head.weight.mul_(10)
    return ActorCritic(language, head)


def model_of(small: Small, kind: str, *, rank: int = 0, checkpointing: bool = False) -> nn.Module:
    """The same weights every time; adapters that are not 0."""
    folder = small.judge if kind == "scalar" else small.policy
    model = copy.deepcopy(loaded(folder, kind, rank, checkpointing))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(0.05 * torch.randn(param.shape, generator=generator))
    return model


def noise(seed: int, like: Tensor, size: float) -> Tensor:
    return size * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def chats(*, holes: bool = True) -> TokenBatch:
    """Rows of very different lengths; prompts of a third, and a hole."""
    tokens, real = ragged(LENGTHS, width=max(LENGTHS))
    mask = real[:, 1:].clone()
    for row, length in zip(mask, LENGTHS, strict=True):
        row[: length // 3] = False
    mask[0, 9] = not holes
    return TokenBatch(tokens, mask)


def pairs() -> PairBatch:
    tokens, real = ragged((*LENGTHS, *reversed(LENGTHS)), width=max(LENGTHS), seed=5)
    b = len(LENGTHS)
    return PairBatch(tokens.view(b, 2, -1), real[:, 1:].reshape(b, 2, -1))


def ranking(model: nn.Module, batch: PairBatch, count: Tensor) -> Loss:
    both = batch.stacked()
    return RANKING["log_sig"](*model(both.tokens, both.mask, at="end").view(-1, 2).unbind(1), count)


def preferred(small: Small, s: Strategy, *loss: str, **options: Any) -> Case:
    """This rank's share of a batch as `prefer` prepares it; the reference is near the policy, not the policy."""
    method = PreferenceLossConfig(loss=loss, **options)
    policy = model_of(small, "language")
    b, places = len(LENGTHS), list(range(len(LENGTHS)))
    prompts = [ragged((n,), width=n, seed=n)[0][0].tolist() for n in range(2, 2 + b)]
    answers = [ragged((n,), width=n, seed=90 + i)[0][0].tolist() for i, n in enumerate((*LENGTHS, *LENGTHS[::-1]))]
    encoded = [Encoded(answer, [True] * len(answer)) for answer in answers]
    task: Any
    if method.reads == "judged":
        rows = [JudgedRow(prompts[i], encoded[i], i % 3 != 1) for i in places]
        task = JudgedTask(method, rows, PAD, 64)
        asked = task.questions([places])
        plain = pad_rows([row.tokens for row in asked.rows], [row.counts for row in asked.rows], pad_id=PAD)
        with torch.no_grad():
            logp = policy(plain.tokens, plain.mask).logp.sum(-1)
        task = task.with_reference(logp - 2 + noise(1, logp, 6.0))  # lower, so that KTO's point is above 0
    else:
        both = [
            tuple(Encoded([*prompts[i], *x.tokens], [False] * len(prompts[i]) + x.counts) for x in encoded[i::b])
            for i in places
        ]
        task = PairTask(method, both, PAD)
        plain = task.batch(places)
        with torch.no_grad():
            logp = policy(plain.stacked().tokens, plain.stacked().mask).logp.view(plain.mask.shape) * plain.answer
        # Pairs of such lengths lie tens of nats apart: AOT must sort the two differently all the same.
        far = noise(1, torch.zeros(b, 2), 60.0 if "aot" in method.names else 6.0)
        task = task.with_reference((logp.sum(-1) + far).flatten())
    batch = task.prepare(policy, task.batch(places[s.rank :: s.world]), places, s, 40)
    return Case("language", batch, task.loss)


def policy_batch(small: Small, sampling: Sampling) -> GRPOBatch:
    """Old log-probabilities a little off the model's, so that some tokens are clipped; one answer is left out."""
    base = chats()
    base.mask[3] = False
    with torch.no_grad():
        logp = model_of(small, "language")(base.tokens, base.mask, sampling).logp
    old, ref = ((logp + noise(seed, logp, size)) * base.mask for seed, size in ((11, 0.15), (12, 0.3)))
    advantages = noise(13, logp, 1.0) * base.mask
    correction = 1 + 0.3 * torch.rand(logp.shape, generator=torch.Generator().manual_seed(14)) * base.mask
    return GRPOBatch(base.tokens, base.mask, old, ref, advantages, correction)


def grpo(small: Small, **changes: Any) -> Case:
    cfg = small.settings("grpo", "unused", **changes)
    plain = Sampling()

    def loss(model: nn.Module, b: GRPOBatch, count: Tensor) -> Loss:
        return policy_loss(cfg, model(b.tokens, b.mask, plain, entropy=True), b, count, kl_coef=cfg.kl.kl_coef)

    return Case("language", policy_batch(small, plain), loss)


def ppo(small: Small, which: int, **changes: Any) -> Case:
    """`which` of the policy's loss, the critic's, and both over one trunk."""
    cfg = small.settings("ppo", "unused", **changes)
    parts: Any = SimpleNamespace(sampling=SAMPLING, state=SimpleNamespace(kl_coef=cfg.kl.kl_coef))
    b = policy_batch(small, SAMPLING).widen(1)
    value_mask = extended(b.mask, 12) if cfg.numerics.score_at == "after_last" else b.mask
    old_values = noise(15, b.old_logp, 0.5) * value_mask
    returns = noise(16, b.old_logp, 1.0) * value_mask
    policy = b.tokens, b.mask, b.old_logp, b.ref_logp, b.advantages, b.correction
    batch = PPOBatch(*policy, value_mask, old_values, returns)
    parts_of = (batch.for_policy(), batch.for_critic(), batch)
    return Case(("language", "scalar", "shared")[which], parts_of[which], losses_of(cfg, parts)[which])


SMOOTHED = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
CASES: dict[str, Callable[[Small, Strategy], Case]] = {
    "sft": lambda small, _: Case("language", chats(), token_loss),
    "reward": lambda small, _: Case("scalar", pairs(), ranking),
    **{
        f"prefer-{name}": lambda small, s, name=name: preferred(small, s, name, **SMOOTHED.get(name, {}))
        for name in PREFERENCE_LOSSES
    },
    "prefer-js": lambda small, s: preferred(small, s, "sigmoid", divergence="js"),
    "prefer-ld": lambda small, s: preferred(small, s, "ipo_mean", ld_alpha=0.4),
    "prefer-wpo": lambda small, s: preferred(small, s, "sigmoid", use_weighting=True),
    "prefer-sum": lambda small, s: preferred(small, s, "sigmoid", "0.3*sft", "0.2*aot"),
    "prefer-kto-sum": lambda small, s: preferred(small, s, "kto", "0.3*sft", undesirable_weight=1.3),
    "ppo": lambda small, _: ppo(small, 0),
    "ppo-verl": lambda small, _: ppo(small, 0, dialect="verl-2026.01"),
    "ppo-coati": lambda small, _: ppo(small, 0, dialect="coati-2023"),
    "ppo-kl-in-loss": lambda small, _: ppo(small, 0, kl_in="loss", kl_coef=0.3, kl_gradient="k2"),
    "ppo-critic": lambda small, _: ppo(small, 1),
    "ppo-critic-trl": lambda small, _: ppo(small, 1, dialect="trl-1.12"),
    "ppo-shared": lambda small, _: ppo(small, 2, backbone="shared"),
    "ppo-shared-trl": lambda small, _: ppo(small, 2, backbone="shared", dialect="trl-1.12"),
    **{name: lambda small, _, name=name: grpo(small, algorithm=name) for name in ALGORITHMS},
    "grpo-kl": lambda small, _: grpo(small, kl_coef=0.2, kl_gradient="ratio"),
    "grpo-verl": lambda small, _: grpo(small, dialect="verl-2026.01", kl_coef=0.2, aggregation="sequence_sum"),
}


def make_case(name: str, small: Small, s: Strategy | None = None) -> Case:
    """The case with this rank's rows; alone by default."""
    s = s or Here()
    case = CASES[name](small, s)
    if name.startswith("prefer-"):  # took its share before the batch was prepared
        return case
    return dataclasses.replace(case, batch=case.batch.select(torch.arange(len(case.batch))[s.rank :: s.world]))


class Recording:
    """Keeps the gradients that a strategy was about to clip."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.gradients = strategy, dict[str, Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.strategy, name)

    def clip_grads(self, model: nn.Module, max_norm: float) -> Tensor:
        named = self.strategy.unwrap(model).named_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        return self.strategy.clip_grads(model, max_norm)


def take_step(
    case: Case, model: nn.Module, *, budget: int = 10**6, cuts: int = 1, strategy: Strategy | None = None
) -> Outcome:
    """One update; with `cuts` the batch is handed over in that many objectives that share the count of the whole."""
    recording: Any = Recording(strategy or Here())
    wrapped = recording.wrap(model)
    optimizer = adamw(model, lr=0.01, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3  # Adam would otherwise blow the rounding of a vanishing gradient up to a whole step
    objectives = [Objective(case.batch, case.loss_fn)]
    if cuts > 1:
        whole = case.batch.count
        objectives = [
            Objective(case.batch.select(rows), lambda model, b, _: case.loss_fn(model, b, whole))
            for rows in torch.arange(len(case.batch)).chunk(cuts)
        ]
    numbers = update(recording, wrapped, optimizer, objectives, tokens_per_microbatch=budget, max_norm=1.0)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return Outcome(numbers, recording.gradients, weights)


def widened(batch: TokenBatch, columns: int, token: int) -> Any:
    """More padding, of another value, in every field that has a column for each token."""
    width = batch.tokens.shape[-1]

    def wide(name: str, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-1] not in (width, width - 1):
            return x
        return pad(x, (0, columns), value=token if name == "tokens" else 0)

    names = [field.name for field in dataclasses.fields(batch)]
    return type(batch)(**{name: wide(name, getattr(batch, name)) for name in names})
