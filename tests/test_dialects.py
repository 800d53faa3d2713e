"""The table of conventions: its numbers against shared/numerics.md, and who wins when settings are resolved."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kinkajou.cli import main
from kinkajou.config import ALGORITHMS, DIALECTS, GRPOConfig, PPOConfig, flat, read_recipe, to_toml
from kinkajou.config.dialects import BOTH, GRPO, PPO, grpo_row, ppo_row
from kinkajou.errors import UserError
from small import grouped

GIVEN = {"model": "m", "prompts": "p", "reward": "r", "output": "o"}
CRITIC_FREE = ["kinkajou", "trl-1.12", "openrlhf-0.11", "verl-2026.01"]
INF = math.inf
# What a run without flags has in each dialect, by the frameworks' own defaults and formulas (numerics, 4.1 to 4.4).
PPO_OF: dict[str, dict[str, Any]] = {
    "kinkajou": {
        **{"kl_coef": 0.05, "kl_estimator": "k1", "kl_in": "reward", "clip": 0.2, "dual_clip": 0, "value_clip": 0.2},
        **{"gamma": 1, "lam": 0.95, "epochs": 4, "lr": 1e-5, "max_norm": 1, "temperature": 1, "top_k": 0},
        **{"score_at": "last", "score_clip": 0, "whiten_advantages": True, "whiten_rewards": False},
        **{"whiten_variance": "biased", "whiten_eps": 1e-8, "whiten_over": "all", "aggregation": "token_mean"},
        **{"kl_clamp": 0, "k3_input_clamp": 0, "k3_output_clamp": 0, "log_ratio_clamp": 0, "advantage": "gae"},
    },
    "trl-1.12": {
        **{"kl_coef": 0.05, "kl_estimator": "k1", "kl_in": "reward", "clip": 0.2, "dual_clip": 0, "value_clip": 0.2},
        **{"gamma": 1, "lam": 0.95, "epochs": 4, "lr": 3e-6, "max_norm": INF, "temperature": 0.7, "top_k": 0},
        **{"score_at": "after_last", "score_clip": 0, "whiten_advantages": True, "whiten_rewards": False},
        **{"whiten_variance": "unbiased", "whiten_eps": 1e-8, "whiten_over": "rank", "aggregation": "token_mean"},
        **{"kl_clamp": 0, "k3_input_clamp": 0, "k3_output_clamp": 0, "log_ratio_clamp": 0, "advantage": "gae"},
        **{"vf_coef": 0.1, "critic_lr": None},
    },
    "openrlhf-0.11": {
        **{"kl_coef": 0.01, "kl_estimator": "k1", "kl_in": "reward", "clip": 0.2, "dual_clip": 0, "value_clip": 0.5},
        **{"gamma": 1, "lam": 1, "lr": 1e-6, "critic_lr": 9e-6, "max_norm": 1, "temperature": 1},
        **{"score_at": "last", "score_clip": 10, "whiten_advantages": True, "whiten_variance": "biased"},
        **{"whiten_eps": 1e-8, "whiten_over": "all", "aggregation": "token_mean", "advantage": "gae"},
        **{"kl_clamp": 10, "k3_input_clamp": 0, "k3_output_clamp": 0, "log_ratio_clamp": 20},
    },
    "verl-2026.01": {
        **{"kl_in": "reward", "clip": 0.2, "dual_clip": 3, "gamma": 1, "lam": 1, "advantage": "gae"},
        **{"score_at": "last", "score_clip": 0, "whiten_advantages": True, "whiten_variance": "unbiased"},
        **{"whiten_eps": 1e-8, "whiten_over": "all", "aggregation": "token_mean"},
        **{"kl_clamp": 0, "k3_input_clamp": 20, "k3_output_clamp": 10, "log_ratio_clamp": 20},
    },
    "deepspeed-chat": {
        **{"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward", "clip": 0.2, "dual_clip": 0, "value_clip": 0.2},
        **{"score_at": "last", "score_clip": 5, "whiten_advantages": False, "gamma": 1, "lam": 0.95},
        **{"kl_clamp": 0, "log_ratio_clamp": 0, "aggregation": "token_mean", "advantage": "gae"},
    },
    "coati-2023": {
        **{"kl_coef": 0.1, "kl_in": "reward", "clip": 0.2, "dual_clip": 0, "value_clip": 0.4, "temperature": 1},
        **{"top_k": 50, "lr": 1e-7, "advantage": "bandit", "whiten_advantages": False, "kl_estimator": "k3"},
    },
}
GRPO_OF: dict[str, dict[str, Any]] = {
    "kinkajou": {
        "group_variance": "unbiased",
        "group_eps": 1e-6,
        "kl_coef": 0,
        "clip": 0.2,
        "aggregation": "sequence_mean",
    },
    # beta 0, k3 with the bias correction on, epsilon 0.2, 1e-4, lr 1e-6, transformers' gradient clipping
    "trl-1.12": {
        **{"group_variance": "unbiased", "group_eps": 1e-4, "kl_coef": 0, "kl_in": "loss", "kl_estimator": "k3"},
        **{"kl_gradient": "ratio", "clip": 0.2, "clip_high": None, "log_ratio_clamp": 0, "dual_clip": 0},
        **{"lr": 1e-6, "max_norm": 1, "ratio_cap": 0, "aggregation": "token_mean"},  # loss_type "dapo"
    },
    # The KL per token in the reward, after the baseline (numerics.md 4.2); token-level loss.
    "openrlhf-0.11": {
        **{"group_variance": "unbiased", "group_eps": 1e-9, "log_ratio_clamp": 20, "aggregation": "token_mean"},
        **{"returns": "token", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.01, "kl_clamp": 10},
    },
    "verl-2026.01": {
        **{"group_variance": "unbiased", "group_eps": 1e-6, "dual_clip": 3, "log_ratio_clamp": 20},
        **{"k3_input_clamp": 20, "k3_output_clamp": 10, "aggregation": "token_mean"},
    },
}
ALGORITHM_OF: dict[str, dict[str, Any]] = {
    "grpo": {"baseline": "group_mean", "scale": "group", "ratio": "token"},
    "dr_grpo": {"baseline": "group_mean", "scale": "none", "aggregation": "fixed_length"},
    "dapo": {
        **{"baseline": "group_mean", "scale": "group", "aggregation": "token_mean", "clip": 0.2, "clip_high": 0.28},
        **{"overlong_share": 0.2, "overlong_penalty": 1, "kl_coef": 0, "surrogate": "clip"},
    },
    "gspo": {"ratio": "sequence_mean", "aggregation": "sequence_mean", "clip": 3e-4, "clip_high": 4e-4, "dual_clip": 0},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean", "baseline": "group_mean", "scale": "group"},
    "sapo": {"surrogate": "sapo", "sapo_tau_positive": 1.0, "sapo_tau_negative": 1.05, "aggregation": "sequence_mean"},
    "rloo": {
        **{"baseline": "leave_one_out", "scale": "none", "ratio": "sequence_sum", "kl_in": "reward"},
        **{"kl_estimator": "k1", "kl_coef": 0.05, "surrogate": "clip", "whiten_advantages": False},
    },
    "reinforce++": {
        **{"baseline": "none", "scale": "none", "returns": "token", "whiten_advantages": True},
        **{"kl_in": "reward", "kl_estimator": "k1", "surrogate": "clip", "ratio": "token"},
    },
    "reinforce++_baseline": {
        **{"baseline": "group_mean", "scale": "none", "whiten_advantages": True},
        **{"kl_in": "loss", "kl_estimator": "k2"},
    },
    "reinforce_baseline": {"baseline": "batch_mean", "scale": "none", "surrogate": "reinforce"},
}
# What may be left out: None means "not given", and the trainers have a meaning for it.
OPTIONAL = {"ray_address", "interface", "device_share", "server_gap", "resume", "from_step"} | {
    *(
        "tokenizer",
        "family",
        "lora_alpha",
        "max_prompts",
        "gold",
        "eval_prompts",
        "clip_high",
        "kl_target",
        "reference",
    ),
    *("critic", "critic_lr", "lam_critic", "ptx_data", "export"),
}
EVERY = [("ppo", name, "") for name in DIALECTS] + [
    ("grpo", name, algorithm) for name in CRITIC_FREE for algorithm in ALGORITHMS
]


def ppo(**changes: Any) -> dict[str, Any]:
    return flat(grouped(PPOConfig, GIVEN | changes))


def grpo(**changes: Any) -> dict[str, Any]:
    return flat(grouped(GRPOConfig, GIVEN | changes))


def test_every_dialect_and_algorithm_has_its_numbers_here() -> None:
    assert set(PPO_OF) == set(DIALECTS) == set(BOTH) == set(PPO)
    assert set(GRPO_OF) == set(GRPO) == set(CRITIC_FREE)
    assert set(ALGORITHM_OF) == set(ALGORITHMS)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ppo_of_a_dialect(dialect: str) -> None:
    found = ppo(dialect=dialect)
    assert {name: found[name] for name in PPO_OF[dialect]} == PPO_OF[dialect]


@pytest.mark.parametrize("dialect", CRITIC_FREE)
def test_grpo_of_a_dialect(dialect: str) -> None:
    found = grpo(dialect=dialect)
    assert {name: found[name] for name in GRPO_OF[dialect]} == GRPO_OF[dialect]


@pytest.mark.parametrize("dialect", CRITIC_FREE)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_is_itself_in_every_dialect(algorithm: str, dialect: str) -> None:
    found = grpo(dialect=dialect, algorithm=algorithm)
    assert {name: found[name] for name in ALGORITHM_OF[algorithm]} == ALGORITHM_OF[algorithm]


def test_a_dialect_changes_only_what_it_says() -> None:
    """A setting that no row of a dialect names is kinkajou's."""
    for dialect in DIALECTS:
        said = BOTH[dialect].keys() | PPO[dialect].keys() | {"dialect"}
        own, base = ppo(dialect=dialect), ppo()
        assert {name for name in own if own[name] != base[name]} <= said


@pytest.mark.parametrize(("stage", "dialect", "algorithm"), EVERY)
def test_everything_is_resolved(stage: str, dialect: str, algorithm: str) -> None:
    found = ppo(dialect=dialect) if stage == "ppo" else grpo(dialect=dialect, algorithm=algorithm)
    assert {name for name, value in found.items() if value is None} <= OPTIONAL


@pytest.mark.parametrize(("stage", "kind"), [("ppo", PPOConfig), ("grpo", GRPOConfig)])
def test_every_setting_of_the_table_exists_and_every_marked_setting_is_in_the_table(stage: str, kind: type) -> None:
    fields = {
        item.name: item.default
        for group in dataclasses.fields(kind)
        if dataclasses.is_dataclass(group.type)
        for item in dataclasses.fields(group.type)
    }
    rows = [ppo_row(name) for name in DIALECTS]
    if stage == "grpo":
        rows = [grpo_row(dialect, algorithm) for dialect in CRITIC_FREE for algorithm in ALGORITHMS]
    for row in rows:
        assert row.keys() <= fields.keys()
        assert all(fields[name] is None for name in row)  # a default of its own would win over the table
    for name, default in fields.items():
        assert default is not None or name in rows[0] or name in OPTIONAL


def test_values_of_the_table_have_the_types_of_their_settings() -> None:
    """1 where a float belongs would be written as a whole number into config.toml."""
    wanted = {"whiten_advantages": bool, "whiten_rewards": bool, "epochs": int, "top_k": int, "dynamic_sampling": int}
    for table in (BOTH, PPO, GRPO, ALGORITHMS):
        for row in table.values():
            for name, value in row.items():
                assert type(value) is wanted.get(name, str if isinstance(value, str) else float), name


@pytest.mark.parametrize(
    ("changes", "name", "want"),
    [
        ({}, "group_eps", 1e-6),
        ({"dialect": "trl-1.12"}, "group_eps", 1e-4),
        ({"dialect": "trl-1.12", "group_eps": 0.5}, "group_eps", 0.5),
        ({"dialect": "openrlhf-0.11"}, "clip", 0.2),
        ({"dialect": "openrlhf-0.11", "algorithm": "gspo"}, "clip", 3e-4),
        ({"dialect": "openrlhf-0.11", "algorithm": "gspo", "clip": 0.1}, "clip", 0.1),
        ({"dialect": "trl-1.12"}, "aggregation", "token_mean"),
        ({"dialect": "trl-1.12", "algorithm": "sapo"}, "aggregation", "sequence_mean"),
        ({"dialect": "trl-1.12", "algorithm": "dapo"}, "aggregation", "token_mean"),
        ({"algorithm": "rloo"}, "kl_coef", 0.05),
        ({"algorithm": "rloo", "kl_coef": 0.0}, "kl_coef", 0.0),  # a given 0 is given
        ({"algorithm": "reinforce++", "whiten_advantages": False}, "whiten_advantages", False),
        ({"algorithm": "dapo", "dynamic_sampling": 0}, "dynamic_sampling", 0),
        ({"dialect": "verl-2026.01", "dual_clip": 0.0}, "dual_clip", 0.0),
    ],
)
def test_given_beats_algorithm_beats_dialect_beats_kinkajou(changes: dict[str, Any], name: str, want: Any) -> None:
    assert grpo(**changes)[name] == want


def test_the_same_for_ppo() -> None:
    assert ppo(dialect="trl-1.12", temperature=0.9)["temperature"] == 0.9
    assert ppo(dialect="trl-1.12", whiten_advantages=False)["whiten_advantages"] is False
    assert ppo(dialect="openrlhf-0.11", critic_lr=0.0)["critic_lr"] == 0.0
    assert ppo(lam=0.5)["lam"] == 0.5


@pytest.mark.parametrize(
    ("word", "near"),
    [("trl", "trl-1.12"), ("verl", "verl-2026.01"), ("kinkajoo", "kinkajou"), ("openrlhf-0.9", "openrlhf-0.11")],
)
def test_an_unknown_dialect_is_refused_with_the_nearest(word: str, near: str) -> None:
    for make in (ppo, grpo):
        with pytest.raises(UserError, match="unknown dialect") as fault:
            make(dialect=word)
        assert near in fault.value.fix
        assert fault.value.exit_code == 2


@pytest.mark.parametrize(("word", "near"), [("gropo", "grpo"), ("dr-grpo", "dr_grpo"), ("reinforce", "reinforce++")])
def test_an_unknown_algorithm_is_refused_with_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UserError, match="unknown algorithm") as fault:
        grpo(algorithm=word)
    assert near in fault.value.fix
    assert fault.value.exit_code == 2


@pytest.mark.parametrize("dialect", ["deepspeed-chat", "coati-2023"])
def test_dialects_without_critic_free_methods_say_so(dialect: str) -> None:
    with pytest.raises(UserError, match="no critic-free methods") as fault:
        grpo(dialect=dialect)
    assert all(name in fault.value.fix for name in CRITIC_FREE)


ALONE = {"reinforce++", "reinforce_baseline"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_group_of_one(algorithm: str) -> None:
    assert grpo(algorithm=algorithm, group_size=2)["group_size"] == 2
    if algorithm in ALONE:
        assert grpo(algorithm=algorithm, group_size=1)["group_size"] == 1
        return
    with pytest.raises(UserError, match="group_size is 1") as fault:
        grpo(algorithm=algorithm, group_size=1)
    assert all(name in fault.value.fix for name in ALONE)
    assert fault.value.exit_code == 2


@pytest.mark.parametrize("changes", [{"baseline": "leave_one_out"}, {"baseline": "group_mean"}, {"scale": "group"}])
def test_a_group_of_one_is_refused_by_what_is_computed_and_not_by_name(changes: dict[str, Any]) -> None:
    """score / (0 + 1e-6) would be a direction a million times too long."""
    with pytest.raises(UserError, match="group_size is 1"):
        grpo(algorithm="reinforce++", group_size=1, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": -0.1}, "--clip must be at least 0"),
        ({"dual_clip": 0.5}, "--dual_clip must be at least 1"),
        ({"kl_coef": -1.0}, "--kl_coef"),
        ({"temperature": 0.0}, "--temperature"),
        ({"overlong_share": 1.5}, "--overlong_share"),
        ({"group_eps": -1e-3}, "--group_eps"),
        ({"group_size": 0}, "--group_size"),
        ({"dynamic_sampling": -1}, "--dynamic_sampling"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "starts from kl_coef"),
    ],
)
def test_what_is_given_is_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        grpo(**changes)


FLAGS = ["--model", "m", "--prompts", "p", "--reward", "r", "--output", "o"]


@pytest.mark.parametrize(("stage", "dialect", "algorithm"), EVERY)
def test_settings_survive_toml(stage: str, dialect: str, algorithm: str) -> None:
    """Written with every value resolved, read again: nothing moves, infinite norms included."""
    found = ppo(dialect=dialect) if stage == "ppo" else grpo(dialect=dialect, algorithm=algorithm)
    table = tomllib.loads(to_toml({stage: found}))[stage]
    table |= {name: tuple(x) for name, x in table.items() if isinstance(x, list)}
    assert table == {name: x for name, x in found.items() if x is not None}
    again = grouped(PPOConfig if stage == "ppo" else GRPOConfig, table)
    assert flat(again) == found


# Each takes a second or two: every dialect, and every algorithm in one of them.
PRINTED = [row for row in EVERY if row[0] == "ppo"]
PRINTED += [("grpo", CRITIC_FREE[i % 4], algorithm) for i, algorithm in enumerate(ALGORITHMS)]


@pytest.mark.parametrize(("stage", "dialect", "algorithm"), PRINTED)
def test_the_printed_settings_are_a_recipe_of_the_same_run(
    stage: str, dialect: str, algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--dialect", dialect, *(["--algorithm", algorithm] if algorithm else [])]
    assert main([stage, *FLAGS, *chosen, "--seed", "7", "--print-config"]) == 0
    printed = capsys.readouterr().out
    want = ppo(dialect=dialect, seed=7) if stage == "ppo" else grpo(dialect=dialect, algorithm=algorithm, seed=7)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(printed)
    table = read_recipe(recipe)[stage]
    assert {name: tuple(x) if isinstance(x, list) else x for name, x in table.items()} == {
        name: x for name, x in want.items() if x is not None
    }
    assert main([stage, str(recipe), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["ppo", *FLAGS, "--dialect", "trl"], "unknown dialect 'trl'"),
        (["grpo", *FLAGS, "--algorithm", "gropo"], "did you mean 'grpo'?"),
        (["grpo", *FLAGS, "--dialect", "coati-2023"], "no critic-free methods"),
        (["grpo", *FLAGS, "--group-size", "1"], "group_size is 1"),
        (["grpo", *FLAGS, "--score-at", "last"], "error:"),  # PPO's alone
    ],
)
def test_a_wrong_word_on_the_command_line_is_one_sentence(
    line: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--print-config"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
