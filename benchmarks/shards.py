"""`python -m benchmarks.shards --write`: what each rank holds of weights, gradients and optimiser state.

One SFT step of `llama-tiny` on 1, 2 and 4 CPU ranks of every strategy; bytes of the tensors that live after the
backward pass and after the optimiser's step, counted on every rank (the largest is shown).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.models import PAD
from kinkajou.batch import TokenBatch
from kinkajou.data.tokenizer import train_tokenizer
from kinkajou.models.load import LoadOptions, load_language_model
from kinkajou.parallel import ranks
from kinkajou.parallel.make import make_strategy
from kinkajou.parallel.sharded import own_part
from kinkajou.train.optim import adamw
from kinkajou.train.sft import token_loss

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "shards.json"
STRATEGIES = ("ddp", "zero2", "zero2_cpu", "zero3", "gemini")
PARTS = ("weights", "gradients", "optimiser", "between passes")


def held(tensors: list[torch.Tensor]) -> int:
    storages = {own_part(x).untyped_storage().data_ptr(): own_part(x).untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def look(name: str) -> dict[str, int]:
    """Bytes of one rank: of weights, gradients, optimiser state, and of whole weights between forward and backward."""
    s = make_strategy(name)
    words = [f"word {i} of many {i * i}" for i in range(3000)]
    model = load_language_model("llama-tiny", train_tokenizer(words, 4096), LoadOptions())
    wrapped = s.wrap(model)
    optimizer = adamw(model, lr=1e-4, weight_decay=0.0)
    dice = torch.Generator().manual_seed(s.rank)
    tokens = torch.randint(PAD + 1, 200, (4, 33), generator=dice)
    batch = TokenBatch(tokens, torch.ones(4, 32, dtype=torch.bool))
    loss = token_loss(wrapped, batch, s.all_sum(batch.count)).value
    blocks = [param for block in model.blocks for param in block.parameters()]
    between = held(blocks)
    s.backward(loss)
    params = list(model.parameters())
    grads = held([param.grad for param in params if param.grad is not None])
    optimizer.step()
    state = [x for entry in optimizer.state.values() for x in entry.values() if x.ndim]
    found = {"weights": held(params), "gradients": grads, "optimiser": held(state), "between passes": between}
    return {part: int(max(s.gather([size]))) for part, size in found.items()}  # type: ignore[type-var]


def on_rank() -> None:
    torch.set_num_threads(1)
    rows = {}
    for name in STRATEGIES:
        rows[name] = look(name)
        ranks.join = lambda **_: torch.device("cpu")  # type: ignore[assignment]  # one group for all of them
    if os.environ["RANK"] == "0":
        print("rows " + json.dumps(rows))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--write", action="store_true", help=f"keep the figures in {RESULT.relative_to(ROOT)}")
    given = flags.parse_args()
    found = {}
    for number in (1, 2, 4):
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={number}",
            "-m",
            "benchmarks.shards",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        line = next(line for line in done.stdout.splitlines() if line.startswith("rows "))
        found[str(number)] = json.loads(line.removeprefix("rows "))
        for name, row in found[str(number)].items():
            print(
                f"{name:10} {number} ranks ",
                "  ".join(f"{part} {row[part] / 1e6:7.2f} MB" for part in PARTS),
                flush=True,
            )
    if given.write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    on_rank() if "RANK" in os.environ else main()
