"""transformers' `generate` on given prompts, in batches of 32, by the cache that the job names."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed.line import Line

BATCH = 32


def main() -> None:
    line = Line()
    job, folder = line.job, Path(line.folder)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(folder / job["model"], dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / job["model"], padding_side="left")
    prompts = json.loads((folder / "data.json").read_text())["prompts"][: job["prompts"]]
    model.generation_config.eos_token_id = job["end_ids"] or None
    torch.manual_seed(0)

    @torch.inference_mode()
    def batch(asked: list[list[int]]) -> torch.Tensor:
        """Tokens of the answers, each up to its end token and with it.  (b,)"""
        padded = tokenizer.pad({"input_ids": asked}, return_tensors="pt")
        out = model.generate(
            **padded,
            do_sample=True,
            top_k=0,
            max_new_tokens=job["max_new_tokens"],
            pad_token_id=tokenizer.pad_token_id,
            cache_implementation=job["cache"],
            disable_compile=True,
        )
        answers = out[:, padded["input_ids"].shape[1] :]
        return (answers != tokenizer.pad_token_id).sum(1)

    def work(whole: bool) -> dict[str, Any]:
        asked, repeats = (prompts, job["repeats"]) if whole else (prompts[:32], 1)
        start = time.perf_counter()
        parts = [batch(asked[i : i + BATCH]) for _ in range(repeats) for i in range(0, len(asked), BATCH)]
        seconds, lengths = time.perf_counter() - start, torch.cat(parts)
        found = {"tokens": int(lengths.sum()), "samples": len(lengths), "longest": int(lengths.max())}
        return {"seconds": seconds, **found}

    line.serve(work)


if __name__ == "__main__":
    main()
