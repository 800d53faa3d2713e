"""From a stage's settings to what a plan is made for."""

from pathlib import Path

from kinkajou import config
from kinkajou.errors import UserError
from kinkajou.models.adapters import adapter_base
from kinkajou.models.load import find_model, read_settings
from kinkajou.models.presets import PRESETS, preset_config
from kinkajou.models.quantised_files import bits_of
from kinkajou.plan.activations import Pass
from kinkajou.plan.architecture import NAMED, Architecture, read
from kinkajou.plan.job import Job, Layout
from kinkajou.rewards.load import reward_model_folder
from kinkajou.rewards.specs import parse_specs
from kinkajou.train.setup import Say


def architecture_of(source: str, base: config.ModelConfig, *, vocabulary: int | None = None) -> Architecture:
    """A folder's config.json, a preset, or a name of the mission's table.  `vocabulary`: a trained tokenizer's."""
    if source in NAMED:
        return NAMED[source]
    if source in PRESETS:
        made = preset_config(source, vocab_size=vocabulary or base.vocab_size, context=base.max_len)
        return read(made.to_dict(), source=source)
    folder = find_model(source)
    folder = adapter_base(folder) or folder
    try:
        settings = read_settings(folder).to_dict()
    except UserError as fault:
        fix = f"give a folder, a hub id, a preset, or a name: {', '.join((*NAMED, *PRESETS))}"
        raise UserError(fault.problem, evidence=fault.evidence, fix=fix) from None
    return read(settings, source=source)


def stored_bits(source: str) -> int:
    """16 also for what is no folder."""
    folder = find_model(source)
    return bits_of(folder, read_settings(folder)) if (Path(folder) / "config.json").is_file() else 16


def job_of(
    cfg: config.StageConfig,
    *,
    ranks: int,
    gpu: bool,
    vocabulary: int | None = None,
    row_tokens: int | None = None,
    per_node: int = 8,
    say: Say = lambda text: None,
) -> Job:
    """`row_tokens`: tokens of a row, --max_len if not known."""
    policy = architecture_of(cfg.base.model, cfg.base, vocabulary=vocabulary)
    if (bits := stored_bits(cfg.base.model)) != 16:
        say(
            f"note: {cfg.base.model} has {bits}-bit weights; they are planned as float32, so the plan is an upper bound"
        )
    layout = Layout(cfg.parallel.strategy, ranks, cfg.parallel.tp, cfg.parallel.device_share, per_node)
    how = Pass(cfg.base.dtype == "bf16", gpu, cfg.base.lora_rank, cfg.base.gradient_checkpointing)
    length = row_tokens or cfg.base.max_len
    budget = cfg.optim.tokens_per_microbatch
    match cfg:
        case config.SFTConfig():
            return Job("sft", policy, layout, how, length, cfg.batch_size, budget)
        case config.RewardConfig():
            return Job("reward", policy, layout, how, length, 2 * cfg.batch_size, budget)
        case config.PreferConfig():
            each = 1 if cfg.method.reads == "judged" else 2
            return Job("prefer", policy, layout, how, length, each * cfg.batch_size, budget)
    return reinforced(cfg, policy, layout, how, length, vocabulary=vocabulary, say=say)


def reinforced(
    cfg: config.RLConfig,
    policy: Architecture,
    layout: Layout,
    how: Pass,
    length: int,
    *,
    vocabulary: int | None,
    say: Say,
) -> Job:
    ppo = isinstance(cfg, config.PPOConfig)
    group = cfg.algo.group_size if isinstance(cfg, config.GRPOConfig) else 1
    shared = isinstance(cfg, config.PPOConfig) and cfg.algo.backbone == "shared"
    judged = [spec for spec in parse_specs(cfg.judge.reward) if spec.kind in ("model", "ensemble")]
    folder = reward_model_folder(cfg.judge.reward)
    critic = cfg.algo.critic if isinstance(cfg, config.PPOConfig) else None
    source = critic or folder
    if source and source not in NAMED and not Path(find_model(source)).is_dir():  # an earlier stage will make it
        say(f"note: {source} is not there yet and is planned as large as the policy")
        source = None
    scorer = architecture_of(source, cfg.base, vocabulary=vocabulary) if source else policy
    cut = cfg.rollout.top_k > 0 or cfg.rollout.top_p < 1 or cfg.rollout.min_p > 0
    free = cfg.base.lora_rank > 0 and (cfg.kl.reference or cfg.base.model) == cfg.base.model
    return Job(
        stage="ppo" if ppo else "grpo",
        policy=policy,
        layout=layout,
        how=how,
        length=length,
        rows=cfg.algo.minibatch_size,
        microbatch=cfg.optim.tokens_per_microbatch,
        samples=cfg.rollout.prompts_per_step * group,
        new_tokens=min(cfg.rollout.max_new_tokens, length - 1),
        slots=max(64, cfg.optim.tokens_per_microbatch // cfg.base.max_len),
        epochs=cfg.algo.epochs,
        prompts=cfg.rollout.prompts_per_step,
        scorer=scorer,
        judges=sum(len(spec.body.split(",")) for spec in judged),
        critic=ppo,
        shared=shared,
        reference=needs_reference(cfg) and not free,
        average=cfg.algo.ema_decay > 0,
        entropy=True,
        sampled_cut=cut,
        engine_copy=cfg.parallel.engine_weights != "sharded",
        steps=cfg.algo.steps,
    )


def needs_reference(cfg: config.RLConfig) -> bool:
    """PPO always reports its KL; a critic-free method without a KL term saves the copy, unless LoRA makes it free."""
    return isinstance(cfg, config.PPOConfig) or cfg.kl.kl_coef > 0 or cfg.base.lora_rank > 0
