"""GGUF files of trained models: what llama.cpp computes of them against transformers, in every type.

`python -m benchmarks.gguf --python LLAMA/bin/python NAME=FOLDER ...`; that Python has llama-cpp-python.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kinkajou.config import ExportConfig
from kinkajou.models.load import find_model
from kinkajou.quant.export import export

CHILD = Path(__file__).parents[1] / "tests" / "quant" / "llama_cpp_child.py"
RESULTS = Path(__file__).parent / "results" / "gguf.json"
DTYPES = ("f32", "f16", "bf16", "q8_0")
TEXTS = (
    "Once upon a time",
    "Hello  world!",
    "  two blanks",
    "It's 12345 o'clock\n\nnew\tline",
    "naïve café ™ 日本語 🙂",
    "</s> x <s> <end>",
    "a" * 30,
    " ",
    "\n",
    "... ,,, !?",
    "I'LL you're we'Ve",
    "### Instruction:\nTell me\n\n### Response:\n",
)
ASKED = ("Tell me a story about Lily and a dog.", "Tell me a story about Tom and a bird.", "Who are you?", "Why?")
TOKENS = 60


def answers(python: str, path: Path, prompts: list[list[int]]) -> dict[str, Any]:
    question = {"path": str(path), "texts": TEXTS, "prompts": prompts, "chats": [], "tokens": TOKENS}
    done = subprocess.run([python, str(CHILD)], input=json.dumps(question), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@torch.no_grad()
def row(python: str, path: Path, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Against the model in float32: largest gap of logits, mean KL of a token, greedy tokens up to the first other."""
    chats = [[{"role": "user", "content": text}] for text in ASKED]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]
    found = answers(python, path, prompts)
    gaps, kls, same = [], [], 0
    for prompt, logits, answer in zip(prompts, found["logits"], found["answers"], strict=True):
        wanted, got = model(input_ids=torch.tensor([prompt])).logits[0], torch.tensor(logits)
        gaps.append(float((wanted - got).abs().max()))
        p, q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
        kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
        whole = torch.tensor([prompt])
        for token in answer:
            likeliest = int(model(input_ids=whole).logits[0, -1].argmax())
            if likeliest != token:
                break
            same += 1
            whole = torch.cat([whole, torch.tensor([[token]])], 1)
    cut = sum(tokens == tokenizer(text).input_ids for text, tokens in zip(TEXTS, found["texts"], strict=True))
    return {
        "mb": round(path.stat().st_size / 1e6, 2),
        "largest_gap_of_logits": float(f"{max(gaps):.2g}"),
        "kl_per_token": float(f"{max(0.0, sum(kls) / len(kls)):.2g}"),
        "greedy_tokens_the_same": f"{same} of {TOKENS * len(prompts)}",
        "texts_cut_the_same": f"{cut} of {len(TEXTS)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as room:
        for named in given.models:
            name, _, folder = named.partition("=")
            plain = Path(room) / name
            export(find_model(folder), ExportConfig(output=str(plain)))
            model: Any = AutoModelForCausalLM.from_pretrained(str(plain), dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(str(plain))
            for dtype in DTYPES:
                path = Path(room) / f"{name}-{dtype}.gguf"
                export(str(plain), ExportConfig(to="gguf", output=str(path), dtype=dtype))
                found[f"{name} {dtype}"] = row(given.python, path, tokenizer, model)
                print(name, dtype, found[f"{name} {dtype}"], flush=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
