"""Simulated steps against numbers that are counted by hand here, and against bytes of real tensors."""

from math import ceil
from typing import Any

import pytest
import torch
from benchmarks.plan_measured import measured

from kinkajou import config
from kinkajou.batch import TokenBatch
from kinkajou.errors import UserError
from kinkajou.models import attention, linear_logp
from kinkajou.models.imagined import language_model
from kinkajou.models.load import LoadOptions
from kinkajou.parallel.strategy import Single
from kinkajou.plan.simulate import Simulation
from kinkajou.train.optim import adamw
from kinkajou.train.sft import token_loss
from kinkajou.train.simulated import Cluster, Stage, search, simulate
from kinkajou.train.update import Objective, update

WIDTH, INNER, VOCABULARY, LAYERS = 64, 176, 1000, 2
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
MATRICES = [(VOCABULARY, WIDTH)] * 2 + LAYERS * (
    [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)] + [(WIDTH,)] * 2
)
MATRICES += [(WIDTH,)]
LENGTH = 32


def numbers(ranks: int) -> int:
    """Numbers of a rank's shards: of each matrix its part of the rows, rounded up."""
    return sum(ceil(rows / ranks) * (rest[0] if rest else 1) for rows, *rest in MATRICES)


def settings(stage: str = "sft", *, rows: int = 8, microbatch: int = 2 * LENGTH, **flags: Any) -> Stage:
    parallel = config.ParallelConfig(
        strategy=flags.pop("strategy", "zero3"), tp=flags.pop("tp", 1), device_share=flags.pop("device_share", None)
    )
    base = config.ModelConfig(model="-", max_len=LENGTH, dtype=flags.pop("dtype", "bf16"), **flags)
    common: dict[str, Any] = {"base": base, "parallel": parallel, "run": config.RunConfig(output="-")}
    if stage in ("sft", "reward", "prefer", "kto"):
        kind: Any = {"sft": config.SFTConfig, "reward": config.RewardConfig}.get(stage, config.PreferConfig)
        if stage == "kto":
            common["method"] = config.PreferenceLossConfig(loss=("kto",))
        optim = config.OptimConfig(tokens_per_microbatch=microbatch)
        made: Stage = kind(source=config.DataConfig(data="-"), batch_size=rows, optim=optim, **common)
        return made
    common |= {"optim": config.RLOptimConfig(tokens_per_microbatch=microbatch)}
    common |= {"judge": config.JudgeConfig(reward=("model:-",))}
    if stage == "grpo":
        rollout = config.RolloutConfig(prompts="-", prompts_per_step=rows // 4, max_new_tokens=8)
        return config.GRPOConfig(
            rollout=rollout, algo=config.GRPOAlgorithm(minibatch_size=rows, group_size=4), **common
        )
    rollout = config.RolloutConfig(prompts="-", prompts_per_step=rows, max_new_tokens=8)
    backbone: Any = "shared" if stage == "shared" else "separate"
    return config.PPOConfig(rollout=rollout, algo=config.PPOAlgorithm(minibatch_size=rows, backbone=backbone), **common)


def run(cfg: Stage, ranks: int, memory: float = 1e12, **how: Any) -> Simulation:
    return simulate(cfg, LLAMA, Cluster(ranks, memory, **how))


def test_shards_are_of_the_size_that_a_count_says() -> None:
    found = run(settings(rows=8), 8)
    (one,) = found.passes
    assert one.device["parameters"] == pytest.approx(4 * numbers(8), rel=0.002)  # besides: the rotary table
    assert one.device["optimizer"] == pytest.approx(8 * numbers(8), rel=0.002)  # besides: counts of steps
    assert found.standing["policy"].device["optimizer"] == one.device["optimizer"]


@pytest.mark.parametrize(("strategy", "gathers"), [("zero3", 2), ("zero2", 1)])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_traffic_is_that_of_the_papers(strategy: str, gathers: int, passes: int) -> None:
    """Rajbhandari 2020, section 7: weights once or twice, gradients once; each rank sends all but its own part."""
    ranks = 8
    found = run(settings(rows=2 * ranks * passes, strategy=strategy), ranks)
    units = LAYERS + 1
    sent_once = numbers(ranks) * (ranks - 1)
    assert found.calls["all_gather"] == gathers * units * passes
    assert found.sent["all_gather"] == gathers * passes * 2 * sent_once
    assert found.calls["reduce_scatter"] == units * passes
    assert found.sent["reduce_scatter"] == passes * 4 * sent_once


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_what_stands_falls_with_the_ranks(strategy: str) -> None:
    few, many = (run(settings(rows=64, strategy=strategy), ranks).standing["policy"].bytes for ranks in (2, 64))
    assert few / many == pytest.approx(numbers(2) / numbers(64), rel=0.02)


def test_a_shared_trunk_is_refused() -> None:
    with pytest.raises(UserError, match="not simulated"):
        run(settings("shared"), 8)


def test_an_offloading_strategy_keeps_all_states_on_the_host() -> None:
    found = run(settings(strategy="zero2_cpu"), 8)
    (one,) = found.passes
    assert one.device["parameters"] < 0.01 * 4 * numbers(8)
    assert one.device["optimizer"] == 0
    assert found.host == pytest.approx(16 * numbers(8), rel=0.01)
    half = run(settings(strategy="gemini", device_share=0.67), 8)  # two of three blocks
    assert 0 < half.host < found.host


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("prefer", "kto", "grpo", "ppo")]


@pytest.mark.parametrize("stage", ["sft", "reward", *SLOW])
def test_every_stage_on_a_thousand_ranks(stage: str) -> None:
    found = run(settings(stage, rows=2048), 1024)
    names = {
        "grpo": {"reward model scoring", "policy update"},
        "ppo": {"reward model scoring", "reference scoring", "critic update", "policy update"},
        "reward": {"reward model update"},
    }.get(stage, {"policy update"})
    assert {one.name for one in found.passes} == names
    assert found.peak > sum(model.bytes for model in found.standing.values())
    assert found.sent["all_gather"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        {"strategy": "naive", "dtype": "fp32"},
        {"strategy": "naive"},
        {"strategy": "ddp"},
        {"lora_rank": 4, "gradient_checkpointing": True},
        {"tp": 2},
        {"tp": 2, "lora_rank": 4},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_other_ways_to_lie(flags: dict[str, Any]) -> None:
    ranks = 1 if flags.get("strategy") == "naive" else 4
    found = run(settings(**flags), ranks)
    assert (found.sent.total() > 0) == (ranks > 1)
    assert found.split["activations"] > 0


def test_checkpointing_saves_activations() -> None:
    long = {"microbatch": 64 * LENGTH, "rows": 512}
    plain, kept = (run(settings(gradient_checkpointing=on, **long), 8).peak for on in (False, True))
    assert kept < 0.8 * plain


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_other_families(family: str) -> None:
    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
        "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
        "opt": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}
        | {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    }[family]
    shape = {"model_type": family, "vocab_size": 1000, **sizes}
    found = simulate(settings(), shape, Cluster(8))
    assert found.passes[0].calls["reduce_scatter"] == 3


def test_the_peak_is_that_of_real_tensors() -> None:
    """The same update, once without data and once with every allocation written down."""
    cfg = settings(strategy="naive", dtype="fp32", rows=4, microbatch=4 * LENGTH)
    found = run(cfg, 1, gpu=False)
    real: dict[str, int] = {}

    def train() -> None:
        torch.manual_seed(0)
        model = language_model(LLAMA, LoadOptions())
        optimizer = adamw(model, lr=1e-3, weight_decay=0.0)
        tokens, mask = torch.ones(4, LENGTH, dtype=torch.long), torch.ones(4, LENGTH - 1, dtype=torch.bool)
        for _ in range(2):
            batch = Objective(TokenBatch(tokens, mask), token_loss)
            update(Single(), model, optimizer, [batch], tokens_per_microbatch=4 * LENGTH, max_norm=1.0)

    real["peak"] = measured(train, sharded=False).peak
    assert found.peak == pytest.approx(real["peak"], rel=0.05)


def test_a_search_stops_at_the_first_setting_that_fits() -> None:
    cfg = settings(strategy="zero2", rows=512, microbatch=64 * LENGTH)
    need = run(settings(rows=512, microbatch=64 * LENGTH, gradient_checkpointing=True), 8).peak
    found = search(cfg, LLAMA, Cluster(8, need + 1))
    assert [one.fits(need + 1) for _, one in found] == [False] * (len(found) - 1) + [True]
    assert found[-1][0].text == "--gradient_checkpointing true --strategy zero3"


def test_nothing_of_it_is_left() -> None:
    before = dict(linear_logp.TILE), torch.nn.Module.to
    run(settings(), 8)
    assert (dict(linear_logp.TILE), torch.nn.Module.to) == before
    assert attention.STAND_INS == []
    assert type(torch.ones(1)) is torch.Tensor
    assert not torch.distributed.is_initialized()
