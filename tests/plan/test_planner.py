"""The planner's numbers against sums by hand, published counts, and models that are built."""

import dataclasses

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.errors import UserError
from kinkajou.plan.activations import Pass, kept_by_layer
from kinkajou.plan.architecture import NAMED, Architecture, read
from kinkajou.plan.fitting import Room, fits, largest, remedies
from kinkajou.plan.job import Job, Layout
from kinkajou.plan.memory import memory_of
from kinkajou.plan.rates import MACHINES, machine, times_of

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 160, "num_key_value_heads": 2}
BUILT = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 32},
    "gpt2": {"n_embd": 64, "n_inner": 160, "n_layer": 3, "n_head": 4},
    "opt": {**SMALL, "ffn_dim": 160, "word_embed_proj_dim": 64},
    "opt-narrow": {**SMALL, "ffn_dim": 160, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4},
}
ONE = Architecture("llama", 2, 8, 2, 2, 4, 16, 32)
BLOCK = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8
WHOLE = 32 * 8 + 2 * BLOCK + 8


def job(**changes: object) -> Job:
    own = {"stage": "sft", "policy": ONE, "layout": Layout(), "how": Pass(), "length": 10, "rows": 4, "microbatch": 40}
    return Job(**{**own, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_built_model(name: str, tied: bool) -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = AutoConfig.for_model(
        name.partition("-")[0], vocab_size=300, tie_word_embeddings=tied, **BUILT[name], **ids
    )
    found = read(config.to_dict(), source=name)
    assert found.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    config.num_labels = 1
    scalar = AutoModelForSequenceClassification.from_config(config)
    assert found.scalar == sum(p.numel() for p in scalar.parameters())


def test_named_models_have_the_published_counts() -> None:
    published = {
        "llama-7b": 6_738_415_616,
        "llama-13b": 13_015_864_320,
        "llama-65b": 65_285_660_672,
        "opt-125m": 125_239_296,
        "opt-350m": 331_196_416,
        "gpt2": 124_439_808,
        "bloom-560m": 559_214_592,
        "bloom-175b": 176_247_271_424,
    }
    assert {name: NAMED[name].parameters for name in published} == published


def test_standing_parts_by_hand() -> None:
    """Float32 weights, and two moments of Adam."""
    parts = memory_of(job()).standing.device
    assert parts == {"policy": 4 * WHOLE, "optimiser state": 8 * WHOLE}


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_fall_with_the_processes(strategy: str, ranks: int) -> None:
    parts = memory_of(job(layout=Layout(strategy, ranks))).standing.device
    assert sum(parts.values()) == 12 * WHOLE / ranks


def test_the_host_holds_what_the_strategy_says() -> None:
    found = memory_of(job(layout=Layout("zero2_cpu", 2))).standing
    assert (found.on_device, found.on_host) == (0, 12 * WHOLE / 2)
    half = memory_of(job(layout=Layout("gemini", 2, device_share=0.5))).standing
    assert (half.on_device, half.on_host) == (12 * WHOLE / 4, 12 * WHOLE / 4)


def test_bf16_copies_leave_out_what_is_only_looked_up() -> None:
    how = Pass(half=True)
    tied = memory_of(job(how=how)).standing.device["bf16 copies"]
    assert tied == 2 * WHOLE
    apart = dataclasses.replace(ONE, tied=False)
    assert memory_of(job(how=how, policy=apart)).standing.device["bf16 copies"] == 2 * WHOLE  # its head, not its table


def test_adapters_alone_have_gradients_and_state() -> None:
    parts = memory_of(job(how=Pass(lora_rank=2))).standing.device
    adapters = 2 * 2 * (4 * (8 + 8) + 3 * (8 + 16))
    assert parts == {"policy": 4 * (WHOLE + adapters), "optimiser state": 8 * adapters}


def test_a_layer_of_llama_by_hand() -> None:
    """Both norms' inputs and normalised inputs, three inputs of products, q, k, v, what is attended to, four inner."""
    c, f, heads = 8, 16, 2
    numbers = 2 * (c + 1) + 2 * c + 3 * c + 4 * c + 4 * f + 2 * heads
    assert kept_by_layer(ONE, Pass(), length=10) == 4 * numbers


def test_checkpointing_keeps_one_layer_and_the_seams() -> None:
    deep = dataclasses.replace(ONE, layers=20)
    whole, thin = (
        memory_of(job(policy=deep, rows=64, microbatch=640, how=Pass(checkpointing=on))).phases[-1]
        for on in (False, True)
    )
    layer = 640 * kept_by_layer(deep, Pass(), length=10)
    assert whole.device["activations"] > 20 * layer
    assert thin.device["activations"] < 20 * 640 * 4 * 8 + 3 * layer


def test_a_cache_by_hand() -> None:
    made = job(stage="grpo", samples=6, new_tokens=4, rows=6)
    found = {phase.name: phase for phase in memory_of(made).phases}
    assert (
        found["rollout"].device["KV cache"] == 4 * 2 * 2 * 6 * 10 * 8
    )  # bytes, k and v, layers, slots, tokens, channels
    assert set(found) == {"load", "rollout", "scoring", "policy update"}


def test_ppo_holds_a_critic_a_reference_and_its_judges() -> None:
    made = job(stage="ppo", samples=4, new_tokens=4, scorer=ONE, judges=2, critic=True, reference=True)
    parts = memory_of(made).standing.device
    scalar = WHOLE + 8
    assert parts["critic"] == 4 * scalar
    assert parts["reference"] == 4 * WHOLE
    assert parts["reward models"] == 2 * 4 * scalar
    assert parts["optimiser state"] == 8 * (WHOLE + scalar)
    shared = memory_of(dataclasses.replace(made, shared=True)).standing.device
    assert "critic" not in shared


def test_remedies_make_it_fit_and_are_few() -> None:
    big = job(policy=NAMED["llama-7b"], length=512, rows=16, microbatch=8192, how=Pass(gpu=True))
    room = Room(24 * 2.0**30, None)
    assert not fits(big, room)
    found = remedies(big, room)
    assert found
    sizes = {len(one.changes) for one in found}
    assert len(sizes) == 1
    for one in found:
        after = big
        for change in sorted(one.changes, key=lambda change: change.kind == "--strategy"):
            after = change.apply(after)
        assert fits(after, room)


def test_the_largest_model_that_fits() -> None:
    small = job(policy=NAMED["gpt2"], length=512, rows=8, microbatch=512, how=Pass(gpu=True, checkpointing=True))
    found = largest(small, Room(24 * 2.0**30, None))
    assert found
    assert found[0] == "gpt2-large"  # 0.77 B parameters of 16 bytes are 12.4 GB; 1.56 B are 24.9
    assert largest(small, Room(1.5 * 2.0**30, None)) is None


def test_time_by_hand() -> None:
    on = dataclasses.replace(MACHINES["t4"], fp32=1e6, bandwidth=1e30, link=1e30, measured=True)
    found = times_of(job(), on)
    products = 2 * WHOLE + 2 * 2 * 8 * 10
    assert found.step_s == pytest.approx(3 * products * 40 / 1e6)
    assert found.tokens == 40


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(UserError, match="no plan for 'mamba'"):
        read({"model_type": "mamba"}, source="x")
    with pytest.raises(UserError, match="unknown GPU 'h10'"):
        machine("h10")
