"""What every side reads: models with fixed random weights, a tokenizer of whole words, token batches, prompts.

`python -m benchmarks.speed.material FOLDER` writes them; the driver calls it, since it must not load torch itself.
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

PAD, END, UNKNOWN, FIRST = 0, 1, 2, 3
TINY, SMALL = 8192, 50257
"""Vocabularies."""
LENGTHS = {"mean": 185, "sigma": 0.7, "least": 8, "most": 512}
NEVER = -5.0
"""Beside the loud channel's 4 it makes a token's logit about 140 lower than that of others."""
LOUD = 4.0


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token for each word w3, w4, ..."""
    words = {"<pad>": PAD, "<end>": END, "<unk>": UNKNOWN, **{f"w{i}": i for i in range(FIRST, vocabulary)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def tiny_config() -> PreTrainedConfig:
    """LLaMA, 5.3 million parameters."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=TINY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        num_labels=1,
    )


def small_config() -> PreTrainedConfig:
    """GPT-2's smallest, 124 million parameters, no dropout."""
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(vocab_size=SMALL, pad_token_id=PAD, bos_token_id=END, eos_token_id=END, **quiet)


@torch.no_grad()
def quieten(module: nn.Module) -> None:
    """Makes the first channel the same, and loud, at every position; pad and end are then never said.

    A token's own entry in that channel moves its logit by nearly the same everywhere, so how often the end comes
    can be chosen (`end_with`).
    """
    rows = module.get_input_embeddings().weight
    rows[:, 0] = LOUD
    rows[[PAD, END], 0] = NEVER
    for layer in module.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0


@torch.no_grad()
def end_with(module: nn.Module, probability: float) -> None:
    """Gives the end token that probability, on the average over positions of random text."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(FIRST, TINY, (16, 96), generator=generator)
    hidden = module.model(tokens).last_hidden_state[:, 16:].flatten(0, 1)
    logits = hidden @ module.lm_head.weight.T
    logits[:, END] = -torch.inf
    others, first = logits.logsumexp(-1), hidden[:, 0]
    rest = hidden[:, 1:] @ module.lm_head.weight[END, 1:]
    low, high = NEVER, 3 * LOUD
    for _ in range(40):
        middle = (low + high) / 2
        said = torch.sigmoid(rest + middle * first - others).mean()
        low, high = (middle, high) if said < probability else (low, middle)
    module.lm_head.weight[END, 0] = low


def write_models(folder: Path) -> None:
    """`tiny` never ends, `tiny-long` and `tiny-short` end with probability 1/130 and 1/48; `tiny-reward` scores."""
    torch.manual_seed(0)
    tiny = AutoModelForCausalLM.from_config(tiny_config())
    quieten(tiny)
    kept = {"tiny": None, "tiny-long": 1 / 130, "tiny-short": 1 / 48}
    for name, probability in kept.items():
        if probability:
            end_with(tiny, probability)
        save(tiny, folder / name, TINY)
    torch.manual_seed(1)
    reward = AutoModelForSequenceClassification.from_config(tiny_config())
    quieten(reward)
    save(reward, folder / "tiny-reward", TINY)
    torch.manual_seed(2)
    save(AutoModelForCausalLM.from_config(small_config()), folder / "small", SMALL)


def save(module: nn.Module, folder: Path, vocabulary: int) -> None:
    module.save_pretrained(folder)
    tokenizer(vocabulary).save_pretrained(folder)


def lengths(dice: random.Random, *, mean: float, sigma: float, least: int, most: int) -> Iterator[int]:
    """Log-normal: `mean` is that of the numbers before they are cut to [least, most]."""
    while True:
        drawn = dice.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
        yield min(most, max(least, round(drawn)))


def rows(seed: int, count: int, vocabulary: int, **shape: float) -> list[list[int]]:
    dice = random.Random(seed)
    wanted = lengths(dice, **(LENGTHS | shape))  # type: ignore[arg-type]
    return [[dice.randrange(FIRST, vocabulary) for _ in range(next(wanted))] for _ in range(count)]


def pairs(seed: int, count: int) -> list[dict[str, list[int]]]:
    """A prompt of a few tokens and two answers with their end; each side has the lengths of `rows`."""
    sides = iter(rows(seed, 2 * count, TINY, least=16))
    found = []
    for first, second in zip(sides, sides, strict=True):
        cut = min(40, len(first) // 2, len(second) // 2)
        found.append({"prompt": first[:cut], "chosen": [*first[cut:-1], END], "rejected": [*second[cut:-1], END]})
    return found


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def write_data(folder: Path) -> None:
    prompts = rows(5, 128, TINY, mean=40, most=96)
    data = {
        "tiny": rows(1, 48, TINY),
        "small": rows(12, 8, SMALL),
        "pairs": pairs(3, 40),
        "prompts": prompts,
    }
    (folder / "data.json").write_text(json.dumps(data))
    lines = [json.dumps({"prompt": text(prompt)}) for prompt in prompts[:32]]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in data["tiny"]]
    chats = [json.dumps({"instruction": text(asked) + " ", "output": text(said)}) for asked, said in halves]
    (folder / "chats.jsonl").write_text("\n".join(chats) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_models(Path(sys.argv[1]))
    write_data(Path(sys.argv[1]))
