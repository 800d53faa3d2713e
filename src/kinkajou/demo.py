"""The demo: a toy world, SFT, a reward model, PPO, and a checker that knows the truth.

Everything it does can be done by hand: each stage is one config, written to its run folder as a recipe.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kinkajou import config
from kinkajou.batch import Sampling
from kinkajou.data.chat import ChatFormat
from kinkajou.data.sources import Prompt, read_prompts
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.data.world_files import write_world
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.sampling import derive_seed
from kinkajou.errors import UserError
from kinkajou.models.load import find_model, load_language_model
from kinkajou.report.html import write_report
from kinkajou.rewards.rules import Answer, parse_rule
from kinkajou.train import start_ppo, start_reward, start_sft

MAX_NEW_TOKENS = 24
LEAD = (
    "A small model learned to answer from demonstrations of which half are flawed, a reward model learned "
    "from ranked pairs, and PPO improved the answers against the reward model. The checker below knows the "
    "truth and trained nothing; the test prompts were seen by no stage, not even to choose the checkpoint."
)


def run_demo(cfg: config.DemoConfig) -> Path:
    """Runs the whole way; returns the report's path."""
    started = time.monotonic()
    folder = Path(cfg.output)
    make_room(folder, overwrite=cfg.overwrite)
    paths = write_data(folder / "data", cfg)
    sft, reward, ppo = stages(folder, {name: str(path) for name, path in paths.items()}, cfg)
    start_sft(sft)
    start_reward(reward)
    start_ppo(ppo)
    prompts = read_prompts(str(paths["prompts_test"])).rows
    before = examine(sft.run.output, prompts, cfg.seed)
    after = examine(ppo.run.output, prompts, cfg.seed)
    summary = summarise(folder, before, after, time.monotonic() - started)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    report = write_report(folder)
    show(summary, report)
    return report


def make_room(folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder with a whole demo; a stopped one goes on.  With `overwrite`, deletes a demo and nothing else."""
    parts = [folder / name for name in ("data", "sft", "reward", "ppo")]
    if not any(part.exists() for part in parts):
        return
    if not overwrite and (folder / "summary.json").is_file():
        raise UserError(f"{folder} already holds a demo", fix="kinkajou demo --overwrite, or --output OTHER")
    if not overwrite:
        return
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    for name in ("summary.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def write_data(folder: Path, cfg: config.DemoConfig) -> dict[str, Path]:
    def size(full: int, least: int) -> int:
        return max(least, round(full * min(1.0, cfg.scale)))

    return write_world(
        folder,
        seed=cfg.seed,
        num_demonstrations=size(8_000, 256),
        num_pairs=size(16_000, 256),
        num_test_pairs=size(600, 64),
        num_prompts=size(2_000, 256),
        num_validation_prompts=size(200, 32),
        num_test_prompts=size(300, 32),
    )


def stages(
    folder: Path, data: dict[str, str], cfg: config.DemoConfig
) -> tuple[config.SFTConfig, config.RewardConfig, config.PPOConfig]:
    """The three recipes of the demo; `scale` shortens them."""

    def steps(full: int) -> int:
        return max(2, round(full * cfg.scale))

    def run(stage: str, **settings: Any) -> config.RunConfig:
        # No preflight: a world of few facts repeats itself, and that is no fault of it.
        return config.RunConfig(output=str(folder / stage), seed=cfg.seed, preflight="off", **settings)

    sft = config.SFTConfig(
        base=config.ModelConfig(model="llama-nano", vocab_size=800, template="human_assistant", max_len=96),
        source=config.DataConfig(data=data["demonstrations"], eval_share=0.02),
        optim=config.OptimConfig(lr=3e-3, weight_decay=0.01),
        run=run("sft", eval_every=steps(100), log_every=steps(200)),
        batch_size=32,
        epochs=4,
    )
    reward = config.RewardConfig(
        base=config.ModelConfig(model=sft.run.output, max_len=96),
        source=config.DataConfig(data=data["pairs_train"], eval_data=data["pairs_test"]),
        optim=config.OptimConfig(lr=1e-3),
        run=run("reward", eval_every=steps(100), log_every=steps(200)),
        batch_size=32,
        epochs=1.7,
    )
    ppo = config.PPOConfig(
        base=config.ModelConfig(model=sft.run.output, max_len=96),
        rollout=config.RolloutConfig(
            prompts=data["prompts_train"], prompts_per_step=128, max_new_tokens=MAX_NEW_TOKENS
        ),
        judge=config.JudgeConfig(
            reward=(reward.run.output,), gold="rule:world", eval_prompts=data["prompts_validation"], keep_best="gold"
        ),
        algo=config.PPOAlgorithm(steps=steps(24), epochs=2, minibatch_size=64, critic_lr=1e-3),
        kl=config.KLConfig(kl_coef=0.1),
        optim=config.RLOptimConfig(lr=3e-4),
        run=run("ppo", eval_every=steps(4), log_every=steps(4), sample_every=steps(4)),
    )
    return sft, reward, ppo


@dataclass(frozen=True)
class Exam:
    """A model's answers to the test prompts and what the checker says of each."""

    prompts: list[str]
    texts: list[str]
    scores: list[float]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


def examine(model_folder: str, prompts: Sequence[Prompt], seed: int) -> Exam:
    """Answers every prompt once, sampled as in training, and asks the checker."""
    source = find_model(model_folder)
    tokenizer, _ = load_tokenizer(source)
    form, model = ChatFormat(tokenizer), load_language_model(source, tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = LocalEngine(model, end_ids=form.end_ids, pad_id=form.pad_id)
    rollout = engine.generate(
        [form.prompt(prompt.messages) for prompt in prompts],
        Sampling(),
        max_new_tokens=MAX_NEW_TOKENS,
        seeds=[derive_seed(seed, "exam", i) for i in range(len(prompts))],
    )
    texts = [form.answer(row[1:][mask].tolist()) for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]
    checker = parse_rule("rule:world")
    answers = map(Answer, prompts, texts, rollout.ended.tolist())
    return Exam([prompt.messages[-1].content for prompt in prompts], texts, [checker(answer) for answer in answers])


def summarise(folder: Path, before: Exam, after: Exam, seconds: float) -> dict[str, Any]:
    """What `report/` reads beside the run folders."""
    reward = last_row(folder / "reward", "eval_accuracy")
    best = json.loads((folder / "ppo" / "best.json").read_text())
    kept = row_at(folder / "ppo", best["step"])
    rows = [
        ["checker's score on test prompts, after SFT", f"{before.mean:.3f}"],
        ["checker's score on test prompts, after PPO", f"{after.mean:.3f}"],
        ["test prompts", len(before.scores)],
        [
            "reward model: accuracy on held-out pairs",
            f"{reward['eval_accuracy']:.3f} ({reward['eval_accuracy_low']:.3f} to {reward['eval_accuracy_high']:.3f})",
        ],
        ["KL to the reference at the kept step, nats an answer", f"{kept.get('eval_kl_ref', 0.0):.2f}"],
        ["kept step of PPO, by the checker on validation prompts", best["step"]],
        ["minutes", f"{seconds / 60:.1f}"],
    ]
    order = sorted(range(len(before.texts)), key=lambda i: before.scores[i] - after.scores[i])
    chosen = [*order[:8], *order[len(order) // 2 : len(order) // 2 + 4], *order[-3:]]
    return {
        "title": "Kinkajou demo",
        "lead": LEAD,
        "stages": ["sft", "reward", "ppo"],
        "tables": [{"title": "Before and after", "columns": ["what", "value"], "rows": rows, "note": ""}],
        "comparison": {
            "title": "The same test prompts, before and after (most improved, unchanged, worst)",
            "before": "after SFT",
            "after": "after PPO",
            "rows": [
                {
                    "prompt": before.prompts[i],
                    "before": before.texts[i],
                    "after": after.texts[i],
                    "before_score": before.scores[i],
                    "after_score": after.scores[i],
                }
                for i in dict.fromkeys(chosen)
            ],
        },
        "picture": {
            "stage": "ppo",
            "title": "Reward against truth",
            "note": "PPO sees the reward model alone. Where the score still rises and the checker no longer "
            "does, the policy has found answers that please the reward model and are not better.",
            "left": "eval_score",
            "right": "eval_gold",
            "mark": best["step"],
        },
        "next": f"Talk to it: kinkajou chat {folder / 'ppo'}",
    }


def last_row(run: Path, key: str) -> dict[str, Any]:
    return [row for row in metrics(run) if key in row][-1]


def row_at(run: Path, step: int) -> dict[str, Any]:
    return next(row for row in metrics(run) if row["step"] == step)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def show(summary: dict[str, Any], report: Path) -> None:
    """The table and a few answers side by side, on the terminal."""
    console = Console(highlight=False)
    table = Table(title=Text(summary["title"]), show_header=False)
    for what, value in summary["tables"][0]["rows"]:
        table.add_row(Text(what), Text(str(value)))
    console.print(table)
    samples = Table("prompt", "after SFT", "", "after PPO", "")
    for row in summary["comparison"]["rows"][:6]:
        scores = f"{row['before_score']:.1f}", f"{row['after_score']:.1f}"
        prompt, before, after = (Text(row[name]) for name in ("prompt", "before", "after"))  # brackets are no markup
        samples.add_row(prompt, before, scores[0], after, scores[1])
    console.print(samples)
    console.print(f"report: {report}", markup=False)
    console.print(summary["next"], markup=False)
