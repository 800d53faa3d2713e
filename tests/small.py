"""A whole stage in a second: a tiny source model, a few rows of every kind, and configs over them."""

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou import config
from kinkajou.train import STARTERS
from tiny import save_source, tiny_tokenizer

KINDS = {
    "sft": config.SFTConfig,
    "reward": config.RewardConfig,
    "prefer": config.PreferConfig,
    "ppo": config.PPOConfig,
    "grpo": config.GRPOConfig,
}


def say(dice: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{dice.randint(3, 90)}" for _ in range(dice.randint(low, high)))


def write_rows(path: Path, rows: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@dataclasses.dataclass(frozen=True)
class Small:
    """Paths of what every stage reads.  Words are w3..w90, one token each; the template adds none."""

    folder: Path
    policy: str
    judge: str
    chats: str
    pairs: str
    prompts: str
    held_out: str

    def settings(self, stage: str, output: Path | str, **changes: Any) -> Any:
        """A stage's config: 5 steps of 8 rows unless the changes say otherwise."""
        own: dict[str, dict[str, Any]] = {
            "sft": {"data": self.chats, "batch_size": 8, "epochs": 1},
            "reward": {"data": self.pairs, "batch_size": 8, "epochs": 1},
            "prefer": {"data": self.pairs, "batch_size": 8, "epochs": 1},
            "ppo": {
                "prompts": self.prompts,
                "reward": self.judge,
                "steps": 5,
                "prompts_per_step": 8,
                "minibatch_size": 4,
                "epochs": 2,
                "max_new_tokens": 8,
            },
            "grpo": {
                "prompts": self.prompts,
                "reward": self.judge,
                "steps": 5,
                "prompts_per_step": 4,
                "group_size": 4,
                "minibatch_size": 8,
                "epochs": 2,
                "max_new_tokens": 8,
            },
        }
        common = {"model": self.policy, "output": str(output), "template": "plain", "max_len": 48, "lr": 1e-3}
        return grouped(KINDS[stage], {**common, **own[stage], **changes})

    def run(self, stage: str, output: Path | str, **changes: Any) -> list[dict[str, Any]]:
        """Trains and returns the rows of `metrics.jsonl`."""
        STARTERS[stage](self.settings(stage, output, **changes))  # type: ignore[operator]
        return metrics(output)


def make_small(folder: Path, family: str = "llama") -> Small:
    dice = random.Random(0)
    policy, judge = folder / "policy", folder / "judge"
    save_source(policy, AutoModelForCausalLM, family, tiny_tokenizer())
    save_source(judge, AutoModelForSequenceClassification, family, tiny_tokenizer(), seed=1)

    def rows(count: int, **fields: int) -> list[dict[str, str]]:
        return [{name: say(dice, 1, longest) for name, longest in fields.items()} for _ in range(count)]

    return Small(
        folder,
        str(policy),
        str(judge),
        chats=write_rows(folder / "chats.jsonl", rows(40, instruction=9, output=12)),
        pairs=write_rows(folder / "pairs.jsonl", rows(40, prompt=9, chosen=12, rejected=12)),
        prompts=write_rows(folder / "prompts.jsonl", rows(40, prompt=9)),
        held_out=write_rows(folder / "held_out.jsonl", rows(3, prompt=9)),
    )


def grouped(kind: type[Any], flat: dict[str, Any]) -> Any:
    """A config of groups from flat settings; a name that no group knows is an error."""
    given: dict[str, Any] = {}
    left = dict(flat)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            names = [field.name for field in dataclasses.fields(item.type)]
            given[item.name] = item.type(**{name: left.pop(name) for name in names if name in left})
    return kind(**given, **left)


def metrics(run: Path | str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / file).read_text().splitlines()]


def steps_kept(run: Path | str) -> list[int]:
    """Whole steps that have a checkpoint; those inside a step are left out."""
    names = [path.name.removeprefix("step-") for path in (Path(run) / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if "+" not in name)


def weights(run: Path | str, step: int) -> dict[str, Tensor]:
    folder = Path(run) / "checkpoints" / f"step-{step:06d}"
    return {name: x for file in folder.glob("model*.safetensors") for name, x in load_file(file).items()}


def nearly(rows: list[dict[str, Any]], rel: float = 1e-4) -> list[Any]:
    return [pytest.approx(row, rel=rel, abs=1e-5) for row in rows]
