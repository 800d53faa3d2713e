"""Whole rollout batches: the same tokens through TRL's trainers and through ours."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks import peers
from benchmarks.layout import GROUP, LONGEST, SAMPLES, Layout, Recorded, draw_answers, draw_prompts
from benchmarks.ours import settings
from benchmarks.table import THROUGH_MODELS, TOLERANCE, Row, difference, shown, worst
from kinkajou.batch import PPOBatch, Sampling
from kinkajou.config import GRPOConfig, PPOConfig, RLConfig
from kinkajou.models.load import load_language_model, load_scalar_model
from kinkajou.parallel.strategy import Single
from kinkajou.train import grpo, ppo
from kinkajou.train.estimates import ppo_estimates
from kinkajou.train.policy import correction, kl_term
from kinkajou.train.rollouts import Sampled, shaped

Tensors = dict[str, Tensor]
COMMON = {"num_mini_batches": 2, "num_ppo_epochs": 2, "response_length": LONGEST, "learning_rate": 1e-3, "seed": 1}
PPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults, no end token costs 1": ({"missing_eos_penalty": 1.0}, {"missing_end_penalty": 1.0}),
    "k3, gamma 0.95, KL 0.2, whitened rewards": (
        {"kl_estimator": "k3", "gamma": 0.95, "kl_coef": 0.2, "whiten_rewards": True},
        {"kl_estimator": "k3", "gamma": 0.95, "kl_coef": 0.2, "whiten_rewards": True},
    ),
}
TRL_PPO = "TRL 1.12.0, PPOTrainer.train"
VLLM = {"use_vllm": True, "vllm_importance_sampling_correction": True}
ROLLOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "GRPO, group scale": ("grpo", {"scale_rewards": "group", "beta": 0.04}, {"kl_coef": 0.04}),
    "GRPO, batch scale": ("grpo", {"scale_rewards": "batch"}, {"scale": "batch"}),
    "GRPO, no scale (Dr. GRPO)": ("grpo", {"scale_rewards": "none"}, {"algorithm": "dr_grpo"}),
    "RLOO, KL 0.05 in the reward": ("rloo", {"beta": 0.05}, {"algorithm": "rloo"}),
}
CORRECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token_truncate": ({"vllm_importance_sampling_clip_max": 2.0}, {"correction_cap": 2.0}),
    "token_mask": (
        {"vllm_importance_sampling_clip_max": 2.0, "vllm_importance_sampling_clip_min": 0.5},
        {"correction_cap": 2.0},
    ),
    "sequence_mask": ({"vllm_importance_sampling_clip_max": 3.0}, {"correction_cap": 3.0}),
}
OURS = {"token_truncate": "truncate", "token_mask": "mask", "sequence_mask": "sequence_mask"}


class Models:
    """The four models of a folder, loaded as a run loads them."""

    def __init__(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
        self.policy, self.reference = (
            load_language_model(str(folder / name), tokenizer) for name in ("policy", "reference")
        )
        self.critic, self.reward = (
            load_scalar_model(str(folder / name), tokenizer, fresh=False) for name in ("critic", "reward")
        )


def parts(cfg: RLConfig, language: nn.Module, reference: nn.Module) -> Any:
    """What `score` and the losses read of a trainer's parts."""
    sampling = Sampling(cfg.rollout.temperature, cfg.rollout.top_k, cfg.rollout.top_p)
    state = SimpleNamespace(kl_coef=cfg.kl.kl_coef, trusted=0)

    def ref_logp(b: Any) -> Tensor:
        return reference(b.tokens, b.mask, sampling).logp

    return SimpleNamespace(language=language, policy=language, reference=ref_logp, sampling=sampling, state=state)


def by_prefix(x: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in x.items() if key.startswith(prefix)}


def ppo_rows(folder: Path) -> list[Row]:
    """TRL's PPO drives itself for one batch and four minibatches; ours repeats it, twice.

    From TRL's own log-probabilities, values and scores (the formulas), and from the tokens alone, through our models.
    """
    job = {"prompts": draw_prompts(), "cases": {name: COMMON | theirs for name, (theirs, _) in PPO.items()}}
    (folder / "ppo.json").write_text(json.dumps(job))
    peers.run("trl-1.12", "trl_ppo.py", folder)
    found = load_file(folder / "ppo.safetensors")
    rows: list[Row] = []
    for name, (_, flags) in PPO.items():
        x = by_prefix(found, f"{name}/")
        rows += tensor_rows(name, flags, x) + model_rows(name, flags, x, Models(folder))
    return rows


def ppo_row(
    group: str,
    name: str,
    flags: dict[str, Any],
    value: float,
    gradient: float | None,
    tolerance: float = TOLERANCE,
) -> Row:
    return Row(group, name, shown({"dialect": "trl-1.12"} | flags), TRL_PPO, value, gradient, tolerance)


def layout_of(x: Tensors) -> Layout:
    """The batch as TRL sampled it: left-padded prompts, answers up to their first end token."""
    context = int(x["context"])
    prompts = [[int(token) for token in row[:context] if token] for row in x["query_responses"]]
    lengths = x["sequence_lengths"] + 1
    answers = [row[: int(n)].tolist() for row, n in zip(x["responses"], lengths, strict=True)]
    assert all(0 not in answer for answer in answers), "a pad token was sampled: choose another seed"
    return Layout(prompts, answers)


def ppo_settings(flags: dict[str, Any], dialect: str = "trl-1.12") -> PPOConfig:
    return settings(PPOConfig, dialect, longest=LONGEST, samples=SAMPLES, **flags)


def scored(cfg: PPOConfig, made: Any, critic: nn.Module, sampled: Sampled) -> tuple[PPOBatch, Tensor]:
    """The batch that an update reads, and the rewards."""
    s = Single()
    batch, _ = ppo.score(cfg, made, SimpleNamespace(model=critic), sampled, s)  # type: ignore[arg-type]
    kl = kl_term(cfg, batch.old_logp, batch.ref_logp)
    told = shaped(cfg, sampled.rollout)
    estimates = ppo_estimates(cfg, told, kl, batch.old_values, batch.mask, kl_coef=made.state.kl_coef, s=s)
    return batch, estimates.rewards


def batch_rows(row: Any, layout: Layout, batch: PPOBatch, rewards: Tensor, x: Tensors) -> list[Row]:
    inside, more = layout.within(), layout.within(1)
    ours = {"rewards": rewards, "advantages": batch.advantages, "returns": batch.returns}
    where = {"rewards": more, "advantages": inside, "returns": more}
    return [row(key, difference(layout.answers(ours[key])[where[key]], x[key][where[key]])) for key in ours]


def tensor_rows(name: str, flags: dict[str, Any], x: Tensors) -> list[Row]:
    layout = layout_of(x)
    cfg = ppo_settings(flags | {"missing_end_penalty": 0.0})  # TRL's scores have lost it already
    recorded = {key: Recorded(layout, x[key]) for key in ("logprobs", "ref_logprobs", "values")}
    made = parts(cfg, recorded["logprobs"], recorded["ref_logprobs"])
    batch, rewards = scored(cfg, made, recorded["values"], layout.sampled(x["scores"], x["logprobs"]))

    def row(what: str, value: float, gradient: float | None = None) -> Row:
        return ppo_row("PPO, same tensors", f"{what}: {name}", flags, value, gradient)

    rows = batch_rows(row, layout, batch, rewards, x)
    actor_loss, value_loss, _ = ppo.losses_of(cfg, made)
    pairs: dict[str, list[tuple[Tensor, ...]]] = {"policy": [], "policy'": [], "value": [], "value'": []}
    for number in range(4):
        m = by_prefix(x, f"{number}/")
        own, part = batch.select(m["rows"]), layout.select(m["rows"])
        leaves = {key: m[key].clone().requires_grad_() for key in ("logp", "values")}
        policy, value = own.for_policy(), own.for_critic()
        losses = {
            "policy": actor_loss(Recorded(part, leaves["logp"]), policy, policy.count),
            "value": value_loss(Recorded(part, leaves["values"]), value, value.count),
        }
        for (key, loss), leaf, weight in zip(losses.items(), leaves.items(), (1.0, cfg.algo.vf_coef), strict=True):
            (gradient,) = torch.autograd.grad(weight * loss.value, leaf[1])
            pairs[key].append((loss.value, m[f"{key}_loss"], m.get(f"{key}_size", m[f"{key}_loss"])))
            pairs[f"{key}'"].append((gradient, m[f"grad/{leaf[0]}"]))
    rows.append(row("policy loss, 4 minibatches", worst(pairs["policy"]), worst(pairs["policy'"])))
    return [*rows, row("value loss, 4 minibatches", worst(pairs["value"]), worst(pairs["value'"]))]


def model_rows(name: str, flags: dict[str, Any], x: Tensors, models: Models) -> list[Row]:
    """The gradients are of all weights of a model, as one vector."""
    layout, cfg = layout_of(x), ppo_settings(flags)
    made = parts(cfg, models.policy, models.reference)
    with torch.no_grad():
        raw = models.reward(layout.batch.tokens, layout.batch.mask, at="end")
    sampled = layout.sampled(raw, x["logprobs"])
    batch, rewards = scored(cfg, made, models.critic, sampled)
    inside, more = layout.within(), layout.within(1)

    def row(what: str, value: float, gradient: float | None = None) -> Row:
        return ppo_row("PPO, from tokens", f"{what}: {name}", flags, value, gradient, THROUGH_MODELS)

    rows = [
        row("log-probabilities", difference(layout.answers(batch.old_logp)[inside], x["logprobs"][inside])),
        row("reference's", difference(layout.answers(batch.ref_logp)[inside], x["ref_logprobs"][inside])),
        row("values", difference(layout.answers(batch.old_values)[more], x["values"][more])),
        row("scores", difference(shaped(cfg, sampled.rollout), x["scores"])),
        *batch_rows(row, layout, batch, rewards, x),
    ]
    actor_loss, value_loss, _ = ppo.losses_of(cfg, made)
    kinds = (
        ("policy", models.policy, actor_loss, "policy.", 1.0),
        ("value", models.critic, value_loss, "value_model.", cfg.algo.vf_coef),
    )
    for key, model, loss_fn, prefix, weight in kinds:
        values, gradients, rounding = [], [], []
        for number in range(4):
            m = by_prefix(x, f"{number}/")
            load_weights(model.module, by_prefix(m, f"weight/{prefix}"))
            own = batch.select(m["rows"])
            part = own.for_policy() if key == "policy" else own.for_critic()
            loss = loss_fn(model, part, part.count)
            model.zero_grad()
            (weight * loss.value).backward()
            values.append((loss.value, m[f"{key}_loss"], m.get(f"{key}_size", m[f"{key}_loss"])))
            theirs = by_prefix(m, f"grad/{prefix}")
            whole = flat({name: p.grad for name, p in model.module.named_parameters()}, like=model.module)
            gradients.append((whole, flat(theirs, like=model.module)))
            exact = exact_gradients(model.module, layout.select(m["rows"]), m, cfg.rollout.temperature)
            rounding.append((gradients[-1][1], flat(exact, like=model.module)))
        what = f"{key} loss, 4 minibatches (TRL's gradient is {worst(rounding):.0e} from float64)"
        rows.append(row(what, worst(values), worst(gradients)))
    return rows


def flat(gradients: Tensors, like: nn.Module) -> Tensor:
    """One vector, in the order of the module's parameters."""
    return torch.cat([gradients[name].double().flatten() for name, _ in like.named_parameters()])


def exact_gradients(module: nn.Module, layout: Layout, m: Tensors, temperature: float) -> Tensors:
    """TRL's gradient of all weights in float64: its own gradient of the outputs, through transformers' model."""
    doubled = copy.deepcopy(module).double()
    doubled.config._attn_implementation = "sdpa"
    tokens = layout.batch.tokens[:, :-1]
    real = torch.arange(tokens.shape[1]) < layout.batch.lengths[:, None] + 1
    hidden = doubled.base_model(input_ids=tokens, attention_mask=real.long()).last_hidden_state
    if hasattr(doubled, "score"):
        found, gradient = doubled.score(hidden).squeeze(-1), m["grad/values"]
    else:
        logits = doubled.lm_head(hidden) / (temperature + 1e-7)
        found = logits.log_softmax(-1).gather(-1, layout.batch.tokens[:, 1:, None]).squeeze(-1)
        gradient = m["grad/logp"]
    (found * layout.placed(gradient, found.shape[1])).sum().backward()
    return {name: p.grad for name, p in doubled.named_parameters() if p.grad is not None}


def load_weights(module: nn.Module, weights: Tensors) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            param.copy_(weights[name])


def group_rows(folder: Path) -> list[Row]:
    """Advantages of TRL's GRPO and RLOO from tokens, scores and models; its correction for the engine's distance."""
    prompts = [prompt for prompt in draw_prompts()[: SAMPLES // GROUP] for _ in range(GROUP)]
    answers, generator = draw_answers(), torch.Generator().manual_seed(3)
    scores = torch.randn(SAMPLES, generator=generator)
    scores[:GROUP] = 0.5  # a group that teaches nothing
    layout, models = Layout(prompts, answers), Models(folder)
    with torch.no_grad():
        logp = layout.answers(models.policy(layout.batch.tokens, layout.batch.mask, Sampling(0.7)).logp)
    engine = logp + 0.5 * torch.randn(logp.shape, generator=generator)
    heat = {"temperature": 0.7}
    cases = {name: {"kind": kind, "settings": theirs | heat} for name, (kind, theirs, _) in ROLLOUTS.items()}
    for mode, (bounds, _) in CORRECTIONS.items():
        attributes = VLLM | {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": None} | bounds
        cases[mode] = {"kind": "grpo", "settings": heat, "attributes": attributes}
    job = {"cases": cases, "prompts": prompts, "answers": answers, "group": GROUP, "longest": LONGEST}
    (folder / "rollouts.json").write_text(json.dumps(job))
    save_file({"scores": scores, "sampler_logp": engine}, folder / "rollouts.safetensors")
    peers.run("trl-1.16", "trl_rollouts.py", folder)
    found = load_file(folder / "rollouts-found.safetensors")
    return [*advantage_rows(found, layout, scores, models), *correction_rows(found, layout)]


def group_settings(flags: dict[str, Any]) -> GRPOConfig:
    known = {"group_size": GROUP, "temperature": 0.7}
    return settings(GRPOConfig, "trl-1.12", longest=LONGEST, samples=SAMPLES, **known | flags)


def advantage_rows(found: Tensors, layout: Layout, scores: Tensor, models: Models) -> list[Row]:
    rows, first = [], layout.batch.mask.float().argmax(1)[:, None]
    for name, (kind, _, flags) in ROLLOUTS.items():
        cfg, x = group_settings(flags), by_prefix(found, f"{name}/")
        made = parts(cfg, models.policy, models.reference)
        batch, _ = grpo.score(cfg, made, layout.sampled(scores, torch.zeros(SAMPLES, LONGEST)), Single())
        ours = batch.advantages.gather(1, first).squeeze(1)
        trainer = {"grpo": "TRL 1.16.0, GRPOTrainer", "rloo": "TRL 1.16.0, RLOOTrainer"}[kind]
        told = shown({"dialect": "trl-1.12"} | flags)
        rows.append(Row("advantages", name, told, trainer, difference(ours, x["advantages"])))
        if "ref_per_token_logps" in x:
            for key, own in (("old", batch.old_logp), ("reference's", batch.ref_logp)):
                inside, theirs = layout.within(), x[f"{key[:3]}_per_token_logps"]
                gap = difference(layout.answers(own)[inside], theirs[inside])
                rows.append(Row("advantages", f"GRPO, {key} log-probabilities", told, trainer, gap))
    return rows


def correction_rows(found: Tensors, layout: Layout) -> list[Row]:
    rows, inside = [], layout.within()
    for mode, (_, bounds) in CORRECTIONS.items():
        x, flags = by_prefix(found, f"{mode}/"), {"rollout_correction": OURS[mode], **bounds, "correction_bound": 0.0}
        columns = layout.batch.mask.shape[1]
        engine, trainer = (
            layout.placed(x[key], columns) for key in ("sampling_per_token_logps", "old_per_token_logps")
        )
        ours = correction(group_settings(flags), engine, trainer, layout.batch.mask, Single())[0]
        theirs = x["importance_sampling_ratio"].expand(SAMPLES, LONGEST)
        gap = difference(layout.answers(ours)[inside], theirs[inside])
        rows.append(Row("rollout correction", mode, shown(flags), "TRL 1.16.0, GRPOTrainer", gap))
    return rows
