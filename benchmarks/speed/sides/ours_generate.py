"""Our engine on given prompts."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.speed.line import Line
from kinkajou.batch import Sampling
from kinkajou.engine.engine import LocalEngine
from kinkajou.models.load import LoadOptions, load_language_model


def main() -> None:
    line = Line()
    job, folder = line.job, Path(line.folder)
    source = folder / job["model"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = load_language_model(str(source), tokenizer, LoadOptions(dtype=job["dtype"])).freeze()
    prompts = json.loads((folder / "data.json").read_text())["prompts"][: job["prompts"]]
    engine = LocalEngine(model, end_ids=job["end_ids"], pad_id=tokenizer.pad_token_id, max_rows=32)
    count = 0

    def work(whole: bool) -> dict[str, Any]:
        nonlocal count
        asked, repeats = (prompts, job["repeats"]) if whole else (prompts[:32], 1)
        start, tokens, longest = time.perf_counter(), 0, 0
        for _ in range(repeats):
            seeds = range(count, count + len(asked))
            count += len(asked)
            rollout = engine.generate(asked, Sampling(), max_new_tokens=job["max_new_tokens"], seeds=seeds)
            tokens += int(rollout.mask.sum())
            longest = max(longest, int(rollout.mask.sum(1).max()))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "samples": repeats * len(asked), "longest": longest}

    line.serve(work)


if __name__ == "__main__":
    main()
