"""Settings of reinforcement learning: what PPO and the critic-free methods share, and what each has of its own."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from kinkajou.config.dialects import FROM_TABLE, filled, grpo_row, known_dialect, ppo_row
from kinkajou.config.groups import ModelConfig, OptimConfig, RunConfig, at_least, require, within
from kinkajou.config.keep import KeepConfig
from kinkajou.config.parallel import EngineConfig, ParallelConfig
from kinkajou.config.rl_checks import check_adaptive, check_engine, check_judges, refuse_idle
from kinkajou.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts: str = ""
    """Prompts to answer, in any format of `data`."""
    max_prompts: int | None = None
    """Use the first N good prompts."""
    bad_rows: Literal["error", "skip", "skip_any"] = "error"
    """Stop at a bad or too long prompt, or skip it and count it: up to 1 % bad ones, or any number (`skip_any`)."""
    prompts_per_step: int = 64
    """Prompts answered in one step, over all processes."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    temperature: float = FROM_TABLE
    """Divides the logits before sampling; log-probabilities are of the same distribution. (dialect)"""
    top_k: int = FROM_TABLE
    """Sample among the K likeliest tokens; 0: all. (dialect)"""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this mass."""
    min_p: float = 0.0
    """Sample among tokens of at least this share of the likeliest one's probability."""
    old_logp: Literal["auto", "engine", "trainer"] = "auto"
    """Whose log-probabilities an update starts from. `auto`: the engine's, which saves a pass, as long as the trainer's
    own are the same to 0.001 nats in every token; that is looked at in the first step and every tenth after it."""
    rollout_correction: Literal["none", "truncate", "mask", "sequence_mask"] = "truncate"
    """What is done where engine and trainer disagree by more than `correction_bound`: weigh each token by its
    importance ratio up to `correction_cap`, drop tokens outside [1 / cap, cap], or drop whole answers."""
    correction_bound: float = 0.05
    """Largest distance of log-probabilities (nats, worst token of the step) that is left uncorrected."""
    correction_cap: float = 2.0
    """Largest importance weight."""

    def __post_init__(self) -> None:
        at_least(self, 1, "prompts_per_step", "max_new_tokens", "max_prompts", "correction_cap")
        at_least(self, 0, "top_k", "correction_bound")
        at_least(self, 1e-3, "temperature")
        within(self, 1e-6, 1.0, "top_p")
        within(self, 0.0, 1.0, "min_p")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    reward: tuple[str, ...] = ()
    """What the policy is trained on, `WEIGHT*` before it if not 1; several are summed: a reward model's folder,
    `ensemble:FOLDER,FOLDER`, `rule:NAME[:ARGUMENT]`, `http://...`, or a Python function `module:function`."""
    ensemble_penalty: float = 0.0
    """Standard deviations of an ensemble's opinions that are taken from their mean."""
    reward_timeout_s: float = 60.0
    """Longest wait for a reward function, or for one request to a reward service."""
    reward_retries: int = 5
    """Further tries of a request to a reward service, with growing pauses."""

    def __post_init__(self) -> None:
        if isinstance(self.reward, str):  # one judge, as Python callers write it
            object.__setattr__(self, "reward", (self.reward,) if self.reward else ())
        at_least(self, 0, "ensemble_penalty", "reward_retries")
        at_least(self, 1e-3, "reward_timeout_s")

    def require(self) -> None:
        if not self.reward:
            raise UserError("--reward is missing", fix="give --reward, or `reward = ...` in the recipe")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(ScoringConfig):
    gold: str | None = None
    """A second judge, of the same forms, that never trains anything: it scores the held-out prompts."""
    eval_prompts: str | None = None
    """Held-out prompts, answered every `eval_every` steps and scored by reward and gold."""
    keep_best: Literal["none", "score", "gold"] = "none"
    """Keep the checkpoint that is best on the held-out prompts by this judge."""


@dataclass(frozen=True, kw_only=True)
class ShapingConfig:
    score_scale: Literal["none", "std", "mean_std"] = "none"
    """Divide scores by the standard deviation of all scores of the run so far, and take their mean from them first."""
    missing_end_penalty: float = 0.0
    """Taken from the score of an answer that did not end by itself."""
    overlong_share: float = FROM_TABLE
    """Last share of `max_new_tokens` over which the penalty for length rises to `overlong_penalty` (DAPO); 0: none."""
    overlong_penalty: float = FROM_TABLE
    """Taken from the score of an answer of `max_new_tokens`, where `overlong_share` is above 0."""
    mask_truncated: bool = False
    """Answers that did not end by themselves are left out of the loss."""

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "overlong_share")
        at_least(self, 0, "overlong_penalty")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    kl_coef: float = FROM_TABLE
    """Weight of the KL to the reference, per token in nats. (dialect)"""
    kl_in: Literal["reward", "loss"] = FROM_TABLE
    """Taken from the reward, or added to the loss. (dialect)"""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = FROM_TABLE
    """Schulman's estimators from the sampled tokens. (dialect)"""
    kl_gradient: Literal["plain", "k2", "ratio"] = FROM_TABLE
    """In the loss: differentiate the estimator as it is, take k2's gradient (that of the exact KL) under its value,
    or weigh it by the probability ratio, which keeps it unbiased off-policy. (dialect)"""
    reference: str | None = None
    """Folder or hub id of the reference; the model that the training starts from if omitted."""
    kl_target: float | None = None
    """Adaptive KL: nats an answer to hold; `kl_coef` is where the controller starts. Omitted: fixed."""
    kl_horizon: float = 10_000.0
    """Samples over which the controller moves the coefficient."""
    kl_clamp: float = FROM_TABLE
    """Bound on any estimate per token; 0: none. (dialect)"""
    k3_input_clamp: float = FROM_TABLE
    """Bound on the log-ratio inside k3; 0: none. (dialect)"""
    k3_output_clamp: float = FROM_TABLE
    """Bound on k3; 0: none. (dialect)"""

    def __post_init__(self) -> None:
        at_least(self, 0, "kl_coef", "kl_clamp", "k3_input_clamp", "k3_output_clamp")
        at_least(self, 1e-6, "kl_target")
        at_least(self, 1, "kl_horizon")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    clip: float = FROM_TABLE
    """Lower bound on the probability ratio is 1 - clip, and the upper 1 + clip. (dialect)"""
    clip_high: float | None = None
    """Upper bound is 1 + clip_high where it is another one (DAPO's clip-higher)."""
    dual_clip: float = FROM_TABLE
    """Bound on the ratio where the advantage is negative (dual clip), at least 1; 0: none. (dialect)"""
    log_ratio_clamp: float = FROM_TABLE
    """Bound on the log-ratio before anything else; 0: none. (dialect)"""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"] = FROM_TABLE
    """Mean over tokens, over answers of their token means, over answers of their sums, or of their sums divided by
    `max_new_tokens`. (dialect)"""

    def __post_init__(self) -> None:
        at_least(self, 0, "clip", "clip_high", "dual_clip", "log_ratio_clamp")
        if self.dual_clip and self.dual_clip < 1:
            raise UserError("--dual_clip must be at least 1, or 0 for none", evidence=f"--dual_clip {self.dual_clip}")


@dataclass(frozen=True, kw_only=True)
class SurrogateConfig(ClipConfig):
    surrogate: Literal["clip", "cispo", "sapo", "reinforce"] = FROM_TABLE
    """The policy's objective. (algorithm)"""
    ratio: Literal["token", "sequence_mean", "sequence_sum"] = FROM_TABLE
    """The ratio of each token, the geometric mean of an answer's (GSPO), or their product (RLOO). (algorithm)"""
    ratio_cap: float = FROM_TABLE
    """Bound on the unclipped ratio (TRL's delta); 0: none. (dialect)"""
    sapo_tau_positive: float = FROM_TABLE
    """SAPO's temperature where the advantage is positive."""
    sapo_tau_negative: float = FROM_TABLE
    """SAPO's temperature where the advantage is negative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "ratio_cap")
        at_least(self, 1e-6, "sapo_tau_positive", "sapo_tau_negative")


@dataclass(frozen=True, kw_only=True)
class Numerics:
    dialect: str = "kinkajou"
    """Whose numeric conventions hold: trl-1.12, openrlhf-0.11, verl-2026.01, deepspeed-chat, coati-2023, kinkajou.
    Settings marked (dialect) take their default from it; docs/numerics.md shows them side by side."""
    score_clip: float = FROM_TABLE
    """Bound on the score (with `--returns token` on what is left of it after the baseline); 0: none. (dialect)"""
    whiten_advantages: bool = FROM_TABLE
    """Advantages to mean 0 and variance 1 over the tokens of the step. (dialect)"""
    whiten_variance: Literal["biased", "unbiased"] = FROM_TABLE
    """Divide squares by n, or by n - 1. (dialect)"""
    whiten_eps: float = FROM_TABLE
    """Added to the variance under the root. (dialect)"""
    whiten_over: Literal["all", "rank"] = FROM_TABLE
    """Over all processes, or over each one's own answers (then numbers depend on their number). (dialect)"""

    def __post_init__(self) -> None:
        known_dialect(self.dialect)
        at_least(self, 0, "score_clip", "whiten_eps")


@dataclass(frozen=True, kw_only=True)
class PPONumerics(Numerics):
    score_at: Literal["last", "after_last"] = FROM_TABLE
    """The score sits on the last sampled token, or one position later, where the critic sees that token. (dialect)"""
    whiten_rewards: bool = FROM_TABLE
    """Rewards to variance 1, their mean kept. (dialect)"""


@dataclass(frozen=True, kw_only=True)
class GRPONumerics(Numerics):
    group_variance: Literal["biased", "unbiased"] = FROM_TABLE
    """Divide a group's squares by n, or by n - 1. (dialect)"""
    group_eps: float = FROM_TABLE
    """Added to a group's standard deviation. (dialect)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "group_eps")


@dataclass(frozen=True, kw_only=True)
class RLOptimConfig(OptimConfig):
    lr: float = FROM_TABLE
    """Peak learning rate of AdamW. (dialect)"""
    max_norm: float = FROM_TABLE
    """Gradients are scaled down to this norm; inf: never. (dialect)"""


@dataclass(frozen=True, kw_only=True)
class PtxConfig:
    ptx_data: str | None = None
    """Chats whose likelihood is mixed into the policy's loss (InstructGPT's PPO-ptx)."""
    ptx_coef: float = 0.0
    """Share of that loss: ptx_coef x ptx + (1 - ptx_coef) x policy."""
    ptx_batch_size: int = 8
    """Chats of it in one optimiser step, over all processes."""

    def __post_init__(self) -> None:
        at_least(self, 1, "ptx_batch_size")
        within(self, 0.0, 1.0, "ptx_coef")
        if self.ptx_coef > 0 and not self.ptx_data:
            raise UserError("ptx_coef is above 0 but there is no ptx_data", fix="give --ptx_data, or --ptx_coef 0")


@dataclass(frozen=True, kw_only=True)
class PPOAlgorithm:
    steps: int = 100
    """Rounds of rollout and update."""
    epochs: int = FROM_TABLE
    """Passes over each round's rollouts. (dialect)"""
    minibatch_size: int = 32
    """Samples in one optimiser step, over all processes."""
    advantage: Literal["gae", "bandit"] = FROM_TABLE
    """Generalised advantages per token, or one per answer: score less KL less value (the 2023 system). (dialect)"""
    gamma: float = FROM_TABLE
    """Discount per token. (dialect)"""
    lam: float = FROM_TABLE
    """GAE's lambda. (dialect)"""
    lam_critic: float | None = None
    """Another lambda for the critic's returns (VC-PPO's decoupled GAE)."""
    value_clip: float = FROM_TABLE
    """Bound on the critic's move; 0: none. (dialect)"""
    critic: str | None = None
    """Folder the critic starts from; the reward model if omitted (the policy's trunk with any other judge)."""
    critic_lr: float | None = None
    """Peak learning rate of the critic; `lr` if omitted. (dialect)"""
    critic_warmup: int = 0
    """First steps in which the critic alone is trained."""
    backbone: Literal["separate", "shared"] = "separate"
    """The critic is a model of its own, or one linear unit on the policy's trunk."""
    vf_coef: float = FROM_TABLE
    """Weight of the critic's loss where the trunk is shared. (dialect)"""
    stop_kl: float = 0.0
    """Ends a step's updates once a minibatch has moved this far (kl_old, nats a token); 0: never."""
    ema_decay: float = 0.0
    """Keeps a moving average of the policy, saved as `ema/` in each checkpoint; 0: none."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "epochs", "minibatch_size")
        at_least(self, 0, "value_clip", "critic_lr", "critic_warmup", "vf_coef", "stop_kl")
        within(self, 0.0, 1.0, "gamma", "lam", "lam_critic")
        within(self, 0.0, 1.0 - 1e-12, "ema_decay")
        if self.backbone == "shared" and (self.critic or self.critic_warmup):
            raise UserError(
                "a shared trunk has no critic of its own to load or to train alone",
                evidence=f"--backbone shared, --critic {self.critic}, --critic_warmup {self.critic_warmup}",
                fix="--backbone separate, or leave --critic and --critic_warmup out",
            )


@dataclass(frozen=True, kw_only=True)
class GRPOAlgorithm:
    algorithm: str = "grpo"
    """grpo, dr_grpo, dapo, gspo, cispo, sapo, rloo, reinforce++, reinforce++_baseline, reinforce_baseline.
    Settings marked (algorithm) take their default from it."""
    steps: int = 100
    """Rounds of rollout and update."""
    epochs: int = FROM_TABLE
    """Passes over each round's rollouts. (dialect)"""
    minibatch_size: int = 64
    """Samples in one optimiser step, over all processes."""
    group_size: int = 8
    """Answers to each prompt."""
    baseline: Literal["group_mean", "leave_one_out", "batch_mean", "none"] = FROM_TABLE
    """What is taken from each score: its group's mean, the mean of the others, the step's mean, nothing. (algorithm)"""
    scale: Literal["group", "batch", "none"] = FROM_TABLE
    """What the difference is divided by: the group's standard deviation, the step's, nothing. (algorithm)"""
    returns: Literal["sequence", "token"] = FROM_TABLE
    """One advantage for the answer, or each token's reward to come. (algorithm)"""
    dynamic_sampling: int = FROM_TABLE
    """Further rounds of prompts to replace groups whose scores are all equal (DAPO); 0: none. (algorithm)"""
    stop_kl: float = 0.0
    """Ends a step's updates once a minibatch has moved this far (kl_old, nats a token); 0: never."""
    ema_decay: float = 0.0
    """Keeps a moving average of the policy, saved as `ema/` in each checkpoint; 0: none."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "epochs", "minibatch_size", "group_size")
        at_least(self, 0, "dynamic_sampling", "stop_kl")
        within(self, 0.0, 1.0 - 1e-12, "ema_decay")


def resolve(cfg: Any, row: dict[str, Any]) -> None:
    """Fills every group of a stage's config from the table, once."""
    for item in dataclasses.fields(cfg):
        group = getattr(cfg, item.name)
        if dataclasses.is_dataclass(group):
            object.__setattr__(cfg, item.name, filled(group, row))


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    surrogate: ClipConfig = field(default_factory=ClipConfig)
    algo: PPOAlgorithm = field(default_factory=PPOAlgorithm)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    numerics: PPONumerics = field(default_factory=PPONumerics)
    optim: RLOptimConfig = field(default_factory=RLOptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.rollout, "prompts")
        require(self.run, "output")
        check_judges(self)
        row = ppo_row(self.numerics.dialect)
        resolve(self, row)
        refuse_idle(self, row)
        check_engine(self)
        check_adaptive(self, self.rollout.prompts_per_step)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    surrogate: SurrogateConfig = field(default_factory=SurrogateConfig)
    algo: GRPOAlgorithm = field(default_factory=GRPOAlgorithm)
    numerics: GRPONumerics = field(default_factory=GRPONumerics)
    optim: RLOptimConfig = field(default_factory=RLOptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.rollout, "prompts")
        require(self.run, "output")
        check_judges(self)
        row = grpo_row(self.numerics.dialect, self.algo.algorithm)
        resolve(self, row)
        refuse_idle(self, row)
        check_engine(self)
        compares = self.algo.baseline in ("group_mean", "leave_one_out") or self.algo.scale == "group"
        if self.algo.group_size == 1 and compares:
            raise UserError(
                f"algorithm {self.algo.algorithm!r} compares the answers to one prompt, and group_size is 1",
                evidence=f"baseline {self.algo.baseline}, scale {self.algo.scale}: a group of one has no spread",
                fix="--group_size 8, or --algorithm reinforce++ or reinforce_baseline, which need no group",
            )
        check_adaptive(self, self.rollout.prompts_per_step * self.algo.group_size)


RLConfig = PPOConfig | GRPOConfig
