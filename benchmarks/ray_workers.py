"""`python -m benchmarks.ray_workers [same kill ahead-0 ... long-1]`: workers on Ray against the local engine.

same: the samples of 1, 2 and 4 workers; kill: a run in which a worker is killed ten times; ahead-K: scores of
runs that sample up to K steps ahead of the trainer, over seeds; long-K: the same for three times as many steps.
The figures go to benchmarks/results/ray.json.
"""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from kinkajou.batch import Rollout, Sampling
from kinkajou.config import GRPOConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.tokenizer import character_tokenizer, prepare
from kinkajou.engine import pool, ray_engine
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.sampling import derive_seed
from kinkajou.engine.worker import Chunk, Plan, Reply
from kinkajou.models.load import load_language_model
from kinkajou.models.replica import shape_of
from kinkajou.train import STARTERS

RESULTS = Path(__file__).parent / "results" / "ray.json"
WORKERS, KILLS, SEEDS, STEPS = (1, 2, 4), 10, (0, 1, 2), 60
COMMON = {
    "model": "llama-pico",
    "tokenizer": "characters",
    "template": "plain",
    "reward": ("rule:sequence",),
    "max_len": 16,
    "max_new_tokens": 4,
    "prompts_per_step": 16,
    "group_size": 8,
    "minibatch_size": 64,
    "epochs": 2,
    "kl_coef": 0.02,
    "kl_gradient": "k2",
    "lr": 3e-3,
    "schedule": "constant",
    "log_every": 50,
}


def write_prompts(folder: Path) -> dict[str, str]:
    """Arithmetic sequences as `rule:sequence` asks for them, with small numbers; every fifth is held out."""
    rows = [f"{a},{b}:{m},{n}" for m in (2, 3) for a in range(m) for b in range(m) for n in (1, 2)]
    parts = {"eval_prompts": rows[::5], "prompts": [row for i, row in enumerate(rows) if i % 5]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in part))
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def train(folder: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """A GRPO run; the rows of its metrics, each with the seconds since the start."""
    flat = {**COMMON, **write_prompts(folder), "output": str(folder / name), **changes}
    groups = {item.name: item.default_factory for item in dataclasses.fields(GRPOConfig)}
    known = {group: {field.name for field in dataclasses.fields(make)} for group, make in groups.items()}
    cfg = GRPOConfig(**{g: groups[g](**{k: v for k, v in flat.items() if k in known[g]}) for g in groups})
    STARTERS["grpo"](cfg)
    metrics, timing = (
        [json.loads(line) for line in (folder / name / file).read_text().splitlines()]
        for file in ("metrics.jsonl", "timing.jsonl")
    )
    return [{**row, "time_s": clock["time_s"]} for row, clock in zip(metrics, timing, strict=True)]


def same() -> dict[str, Any]:
    """Samples of the workers against those of the local engine, with first and with moved weights."""
    tokenizer = character_tokenizer(["0123456789,:"])
    prepare(tokenizer, template="plain", source="llama-pico")
    form = ChatFormat(tokenizer)
    model = load_language_model("llama-pico", tokenizer)
    prompts = [[4 + (5 * i + j) % (len(tokenizer) - 4) for j in range(2 + i % 7)] for i in range(256)]
    seeds = [derive_seed("samples", i) for i in range(len(prompts))]

    def ask(engine: Any) -> tuple[Rollout, float]:
        start = time.monotonic()
        found: Rollout = engine.generate(prompts, Sampling(1.0, 10), max_new_tokens=32, seeds=seeds)
        return found, time.monotonic() - start

    def plan(device: str) -> Plan:
        return Plan(shape_of(model), sorted(form.end_ids), form.pad_id, 64, device)

    found: dict[str, Any] = {"prompts": len(prompts), "workers": {}}
    for workers in WORKERS:
        engine = ray_engine.make_ray_engine(model, plan, workers=workers, address=None, say=print)
        own = LocalEngine(model, end_ids=form.end_ids, pad_id=form.pad_id)
        row = {"same_tokens": 0, "of_tokens": 0, "worst_logp_gap": 0.0}
        for _ in range(2):
            start = time.monotonic()
            engine.load(model.named_parameters())
            row["load_s"] = round(time.monotonic() - start, 4)
            (there, row["s"]), (here, row["local_s"]) = ask(engine), ask(own)
            row["same_tokens"] += int((there.tokens[:, 1:] == here.tokens[:, 1:])[here.mask].sum())
            row["of_tokens"] += int(here.mask.sum())
            gap = float((there.sampler_logp - here.sampler_logp).abs().max())
            row["worst_logp_gap"] = max(row["worst_logp_gap"], gap)
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(1.02)
        engine.close()
        found["workers"][str(workers)] = row
    return found


def kill() -> dict[str, Any]:
    """The process of a worker is killed while it samples, ten times in a run; what is asked and answered is counted."""
    answered: Counter[int] = Counter()
    killed: list[int] = []
    honest, sample = pool.check_reply, ray_engine.RayHand.sample

    def counted(reply: Reply, chunk: Chunk) -> None:
        honest(reply, chunk)
        answered.update(chunk.seeds)

    def deadly(hand: ray_engine.RayHand, chunk: Chunk) -> Reply:
        if len(killed) < KILLS and chunk.rows[0] == 0 and not chunk.tries:
            process = hand.ray.get(hand.actor.__ray_call__.remote(lambda worker: os.getpid()))
            hand.actor.sample.remote(chunk)
            killed.append(process)
            os.kill(process, signal.SIGKILL)
        return sample(hand, chunk)

    with tempfile.TemporaryDirectory() as name:
        folder, steps = Path(name), KILLS + 2
        local = train(folder, "local", steps=steps)
        with mock.patch.object(pool, "check_reply", counted), mock.patch.object(ray_engine.RayHand, "sample", deadly):
            there = train(folder, "ray", steps=steps, rollout="ray", workers=2)
        place = f"checkpoints/step-{steps:06d}/model.safetensors"
        one, other = load_file(folder / "local" / place), load_file(folder / "ray" / place)
    return {
        "killed": len(killed),
        "prompts": steps * COMMON["prompts_per_step"] * COMMON["group_size"],  # type: ignore[operator]
        "answered": len(answered),
        "answered_twice": sum(count > 1 for count in answered.values()),
        "worst_weight_gap": max(float((one[key] - other[key]).abs().max()) for key in one),
        "worst_score_gap": max(abs(a["score"] - b["score"]) for a, b in zip(local, there, strict=True) if "score" in a),
    }


def ahead(behind: int, *, steps: int = STEPS, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Scores over seeds after equally many steps: by the local engine, or sampled up to `behind` steps ahead."""
    engine = {"rollout": "ray", "workers": 2, "max_staleness": behind} if behind else {}
    first, last, staleness, seconds = [], [], Counter[str](), []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows = train(Path(folder), "run", steps=steps, eval_every=0, seed=seed, **engine)
        scores = [row["score"] for row in rows if "score" in row]
        first.append(fmean(scores[:3]))
        last.append(fmean(scores[-10:]))
        seconds.append(rows[-1]["time_s"])
        staleness.update(f"{row.get('staleness', 0.0):g}" for row in rows if "score" in row)
    return {
        "steps": steps,
        "score_of_first_3_steps": round(fmean(first), 4),
        "scores_of_last_10_steps": [round(score, 4) for score in last],
        "score": round(fmean(last), 4),
        "sd_over_seeds": round(stdev(last), 4),
        "batches_by_staleness": dict(sorted(staleness.items())),
        "run_s": round(fmean(seconds), 1),
    }


def main(asked: list[str]) -> None:
    parts: dict[str, Callable[[], dict[str, Any]]] = {"same": same, "kill": kill}
    parts |= {f"ahead-{behind}": partial(ahead, behind) for behind in (0, 1, 2)}
    parts |= {f"long-{behind}": partial(ahead, behind, steps=180, seeds=(0, 1)) for behind in (0, 1)}
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in asked or list(parts):
        known[name] = parts[name]()
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(name, json.dumps(known[name], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
