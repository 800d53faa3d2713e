"""vLLM's CPU build on given prompts: in this process, eager, 32 slots, the log-probability of each sampled token."""

import json
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.speed.line import Line


def main() -> None:
    line = Line()
    job, folder = line.job, Path(line.folder)
    engine = LLM(
        str(folder / job["model"]),
        dtype={"fp32": "float32", "bf16": "bfloat16"}[job["dtype"]],
        enforce_eager=True,
        max_num_seqs=32,
        max_model_len=512,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # every run asks the same prompts again
        disable_log_stats=True,
        seed=0,
    )
    prompts = json.loads((folder / "data.json").read_text())["prompts"][: job["prompts"]]
    settings = SamplingParams(
        temperature=1.0,
        max_tokens=job["max_new_tokens"],
        stop_token_ids=job["end_ids"] or None,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
    )

    def work(whole: bool) -> dict[str, Any]:
        asked, repeats = (prompts, job["repeats"]) if whole else (prompts[:32], 1)
        start, lengths = time.perf_counter(), []
        for _ in range(repeats):
            outputs = engine.generate([{"prompt_token_ids": x} for x in asked], settings, use_tqdm=False)
            lengths += [len(output.outputs[0].token_ids) for output in outputs]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(lengths), "samples": len(lengths), "longest": max(lengths)}

    line.serve(work)


if __name__ == "__main__":
    main()
