"""What a profile says in words: the largest share of time and of memory, and the setting that changes it."""

from typing import Any

from kinkajou import config
from kinkajou.train.profile_memory import Standing
from kinkajou.train.profile_rows import OTHER, PASSING, Measured, Memory, Row, share_of
from kinkajou.train.profile_trace import Traced

IDLE = 0.4
"""Share of a step outside operators from which on the host, and not the arithmetic, decides its time."""


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def advice(cfg: Any, measured: Measured, traced: Traced, rows: list[Row], memory: Memory) -> list[str]:
    """One sentence on time, one on memory."""
    return [*filter(None, [of_time(cfg, measured, traced, rows)]), of_memory(cfg, measured.standing, memory)]


def of_time(cfg: Any, measured: Measured, traced: Traced, rows: list[Row]) -> str:
    rollout, score = (share_of(rows, name) for name in ("rollout", "score"))
    judge, optimizer = share_of(rows, "judge"), share_of(rows, "optimizer", "clip")
    head, attention = share_of(rows, "head"), share_of(rows, "attention", below="update")
    update, data = share_of(rows, "update"), share_of(rows, "data")
    outside = traced.outside_s / traced.wall_s
    if judge > 0.25:
        return f"{percent(judge)} of a step is the judge: {of_judge(cfg)}."
    if rollout > 0.5:
        return f"{percent(rollout)} of a step is rollouts: {of_rollouts(cfg)}."
    if score > 0.35:
        return f"{percent(score)} of a step is log-probabilities before the update: {of_scores(cfg)}."
    if data > 0.1:
        return f"{percent(data)} of a step is making batches of records: a larger model or a GPU would wait for it."
    if optimizer > 0.25:
        return (
            f"{percent(optimizer)} of a step is the optimiser, once for each batch however small it is: "
            f"raise --{batch_setting(cfg)}."
        )
    if outside > IDLE:
        return (
            f"{percent(outside)} of a step lies outside of torch's operators, as with little work at a time: raise "
            f"--{batch_setting(cfg)} or --tokens_per_microbatch (now {cfg.optim.tokens_per_microbatch:,})."
        )
    if head > 0.3:
        return (
            f"the LM head takes {percent(head)} of a step in forward passes alone, and only for tokens that count: "
            f"{cheaper(cfg, 'a smaller vocabulary would pay most')}."
        )
    if attention > 0.3:
        return (
            f"attention takes {percent(attention)} of a step in forward passes alone: sequences are long, "
            f"lower --max_len (now {cfg.base.max_len:,}) if the records allow it."
        )
    return f"{percent(update)} of a step is forward and backward passes: {cheaper(cfg, 'the arithmetic itself')}."


def cheaper(cfg: Any, otherwise: str) -> str:
    if cfg.base.gradient_checkpointing:
        return "without --gradient_checkpointing they take about a quarter less, if memory allows it"
    return "--dtype bf16 makes them cheaper" if cfg.base.dtype == "fp32" else otherwise


def of_rollouts(cfg: config.RLConfig) -> str:
    samples = cfg.rollout.prompts_per_step * getattr(cfg.algo, "group_size", 1)
    if samples < 64:
        return f"only {samples} samples decode at once; raise --prompts_per_step"
    if cfg.base.dtype == "fp32":
        return "--dtype bf16 halves the weights that each token reads, and --max_new_tokens bounds the longest answer"
    return (
        f"--max_new_tokens (now {cfg.rollout.max_new_tokens}) bounds the longest answer, "
        f"and more --epochs (now {cfg.algo.epochs}) learn more from each"
    )


def of_scores(cfg: config.RLConfig) -> str:
    if cfg.rollout.old_logp == "trainer":
        return "--old_logp auto takes the sampler's where they are the same, which saves a pass"
    return cheaper(cfg, "a larger --tokens_per_microbatch packs more into a pass")


def of_judge(cfg: config.RLConfig) -> str:
    if any("http" in spec for spec in cfg.judge.reward):
        return "the service behind --reward sets the pace"
    if any(spec.startswith(("rule:", "module:")) for spec in cfg.judge.reward):
        return "the rule or function behind --reward sets the pace"
    return "a smaller reward model, or --dtype bf16, makes it cheaper"


def batch_setting(cfg: Any) -> str:
    return "minibatch_size" if isinstance(cfg, config.PPOConfig | config.GRPOConfig) else "batch_size"


def of_memory(cfg: Any, lies: Standing, memory: Memory) -> str:
    """The largest part that a setting changes."""
    passing, state = memory.size(PASSING), lies.parts.get("optimiser state", 0) + lies.gradients
    where = " > ".join(memory.path) or "between the phases"
    fixed = memory.size(OTHER)
    if fixed > 0.8 * memory.peak:
        share = percent(fixed / memory.peak)
        return f"{share} of the memory is Python, libraries and the records: no setting makes it less."
    if passing >= state:
        fix = f"lower --tokens_per_microbatch (now {cfg.optim.tokens_per_microbatch:,})"
        if not cfg.base.gradient_checkpointing:
            fix += ", or --gradient_checkpointing"
        return f"Most tensors are alive in {where}; of what passes again {fix} makes less."
    if cfg.base.lora_rank:
        return f"Most tensors are alive in {where}; a smaller --lora_rank makes the optimiser's part less."
    return "Optimiser state and gradients are the largest part; --lora_rank 8 trains adapters and needs next to none."
