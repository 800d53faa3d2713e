"""vLLM opens a policy's folder, samples from it, and gives log-probabilities of tokens.

`FOLDER` holds `jobs.json` (tokens; by name what the folder is) and gets `found.json`.  Run by vLLM's own Python.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main() -> None:
    folder = Path(sys.argv[1])
    given = json.loads((folder / "jobs.json").read_text())
    (name,) = given["jobs"]
    model = LLM(str(folder / name), dtype="float32", enforce_eager=True, max_model_len=32, max_num_seqs=4)
    prompts: Any = [{"prompt_token_ids": row} for row in given["tokens"]]
    drawn = model.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=0), use_tqdm=False)
    numbers = [
        [place[token].logprob for token, place in zip(row[1:], one.prompt_logprobs[1:], strict=True)]
        for row, one in zip(given["tokens"], drawn, strict=True)
    ]
    found = {name: {"numbers": numbers, "drawn": [list(one.outputs[0].token_ids) for one in drawn]}}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
