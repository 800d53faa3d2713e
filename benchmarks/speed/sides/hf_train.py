"""A hand-written loop over padded batches: transformers' model and its own loss, fused AdamW, no trainer.

bf16 is autocast over float32 weights (`how` autocast), or bfloat16 weights and nothing else (`how` pure).
"""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.speed.line import Line

BATCH = 8


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}


def main() -> None:
    line = Line()
    job, folder = line.job, Path(line.folder)
    pure = job["dtype"] == "bf16" and job["how"] == "pure"
    dtype = torch.bfloat16 if pure else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / job["model"], dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rows = json.loads((folder / "data.json").read_text())[job["data"]][: job["rows"]]
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    batches = [padded(part) for part in parts]
    halved = job["dtype"] == "bf16" and not pure

    def work(whole: bool) -> dict[str, Any]:
        chosen = batches if whole else batches[:1]
        start, losses, norms = time.perf_counter(), [], []
        for batch in chosen:
            with torch.autocast("cpu", torch.bfloat16) if halved else nullcontext():
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        tokens = sum(int(batch["attention_mask"].sum()) for batch in chosen)
        first = {"first_loss": losses[0], "first_norm": float(norms[0])}
        return {"seconds": seconds, "tokens": tokens, "samples": BATCH * len(chosen), **first}

    line.serve(work)


if __name__ == "__main__":
    main()
