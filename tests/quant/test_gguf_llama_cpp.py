"""The round trip through llama.cpp, where KINKAJOU_LLAMA_CPP names a Python that has llama-cpp-python.

`python -m venv llama && CMAKE_BUILD_PARALLEL_LEVEL=1 llama/bin/pip install llama-cpp-python` builds it (ten minutes).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kinkajou.config import ExportConfig
from kinkajou.data.tokenizer import train_tokenizer
from kinkajou.quant.export import export
from kinkajou.quant.gguf_tokens import BLOOM, LLAMA3
from tiny import save_source, tiny_config

PYTHON = os.environ.get("KINKAJOU_LLAMA_CPP", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="KINKAJOU_LLAMA_CPP names no Python with llama-cpp-python")
CHILD = Path(__file__).with_name("llama_cpp_child.py")
CORPUS = ["the cat sat on the mat and the dog sat on the log", "it's 12 o'clock, isn't it?", "x = y + 1\n\n  z"]
TEXTS = [
    "the cat sat",
    "Hello  world!",
    "  two blanks",
    "It's 12345 o'clock\n\nnew\tline",
    "naïve café ™ 日本語 🙂 \u00a0é",
    "a" * 30,
    " ",
    "\n",
    "... ,,, !?",
    "I'LL you're we'Ve",
    "### Instruction:\nTell me\n\n### Response:\n",
    "<end> typed <pad>",
    "१२३ ٣ ½ Ⅷ",
    "ends in blanks   ",
]
GAP = {"llama": 1e-4, "gpt2": 2e-2, "bloom": 2e-2}
"""Of logits: llama.cpp looks GELU up in a table of half precision, which GPT-2 and BLOOM have and LLaMA has not."""


def asked(path: Path, **what: Any) -> dict[str, Any]:
    question = {"path": str(path), "texts": [], "prompts": [], "chats": [], "tokens": 20, **what}
    done = subprocess.run([PYTHON, str(CHILD)], input=json.dumps(question), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def exported(folder: Path, dtype: str = "f32") -> Path:
    path = folder.with_suffix(".gguf")
    export(str(folder), ExportConfig(to="gguf", output=str(path), dtype=dtype, overwrite=True))  # type: ignore[arg-type]
    return path


def same_tokens(tokenizer: Any, found: list[list[int]]) -> None:
    for text, tokens in zip(TEXTS, found, strict=True):
        assert tokens == tokenizer(text).input_ids, text


@pytest.mark.parametrize("family", ["llama", "llama-llama3", "gpt2", "bloom", "bloom-6-heads"])
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    tokenizer: Any = train_tokenizer(CORPUS * 20, 300)
    changes: dict[str, object] = {}
    if family == "llama-llama3":
        scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
        changes["rope_parameters"] = scaled | {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    module = save_source(
        tmp_path / "model",
        AutoModelForCausalLM,
        family.removesuffix("-llama3"),
        tokenizer,
        vocab_size=len(tokenizer),
        **changes,
    )
    prompts = [tokenizer(text).input_ids for text in TEXTS[:3]]
    found = asked(exported(tmp_path / "model"), texts=TEXTS, prompts=prompts)
    same_tokens(tokenizer, found["texts"])
    assert found["words"] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert found["ends"] == [tokenizer.eos_token_id]
    gap = GAP[family.partition("-")[0]]
    for prompt, logits, answer in zip(prompts, found["logits"], found["answers"], strict=True):
        whole = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            wanted = module(input_ids=whole).logits[0]
        worst = float((torch.tensor(logits) - wanted[: len(prompt)]).abs().max())
        print(f"{family}: logits differ by {worst:.2g}, the largest is {float(wanted.abs().max()):.3g}")
        assert worst < gap
        for token, row in zip(answer, wanted[len(prompt) - 1 :], strict=False):  # the likeliest, ties apart
            assert row[token] > row.max() - 2 * gap


@pytest.mark.parametrize(("dtype", "gap"), [("f32", 1e-4), ("f16", 0.1), ("bf16", 0.5), ("q8_0", 1.5)])
def test_a_trained_model_with_a_sentencepiece_tokenizer(
    dtype: str, gap: float, tmp_path: Path, shared_data: Path
) -> None:
    """stories260k: the answer in float32 is the same token by token, and through the chat template."""
    (tmp_path / "model").symlink_to(shared_data / "models" / "stories260k")
    module = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"), dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "Lily and Tom went to the park.", "é")]
    path = exported(tmp_path / "model", dtype)
    found = asked(path, texts=TEXTS, prompts=prompts, tokens=60, chats=[[{"role": "user", "content": "Hello."}]])
    texts = [text for text in TEXTS if "<pad>" not in text]  # the export adds <pad>, the folder has none
    got = [tokens for text, tokens in zip(TEXTS, found["texts"], strict=True) if text in texts]
    assert got == [tokenizer(text).input_ids for text in texts]
    assert found["words"][:512] == tokenizer.convert_ids_to_tokens(list(range(512)))
    for prompt, logits, answer in zip(prompts, found["logits"], found["answers"], strict=True):
        with torch.no_grad():
            wanted = module(input_ids=torch.tensor([prompt])).logits[0]
            whole = torch.tensor([prompt])
            for _ in range(60):
                whole = torch.cat([whole, module(input_ids=whole).logits[:, -1:].argmax(-1)], 1)
        worst = float((torch.tensor(logits)[:, :512] - wanted).abs().max())
        same = next((i for i, (a, b) in enumerate(zip(answer, whole[0, len(prompt) :], strict=True)) if a != b), 60)
        print(f"{dtype}: logits differ by {worst:.2g}, greedy answers are the same for {same} of 60 tokens")
        assert worst < gap
        assert dtype != "f32" or same == 60
    assert found["replies"][0][1] in ("stop", "length")


LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTS = {
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), LETTERS]),
    "bloom": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(BLOOM), "isolated"), LETTERS]),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_other_ways_to_cut_words(name: str, tmp_path: Path) -> None:
    raw = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    raw.pre_tokenizer, raw.decoder = CUTS[name], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator((*CORPUS, *TEXTS) * 5, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    config = tiny_config("llama", vocab_size=len(tokenizer))
    save_source(tmp_path / "model", AutoModelForCausalLM, "llama", tokenizer, vocab_size=config.vocab_size)
    same_tokens(tokenizer, asked(exported(tmp_path / "model"), texts=TEXTS)["texts"])
