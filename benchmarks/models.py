"""Tiny models with weights far from their initial values, as the folders that every framework reads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY, PAD, END = 61, 0, 1
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w2, w3, ...; pad and end are tokens of their own."""
    words = {"<pad>": PAD, "<end>": END, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="w2")


def write_models(folder: Path) -> None:
    """Policy, reference (the policy a little aside), critic and reward model."""
    config = LlamaConfig(
        **SHAPE,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        num_labels=1,
    )
    for seed, name in enumerate(("policy", "reference", "critic", "reward")):
        scalar = name in ("critic", "reward")
        module = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(config)
        shake(module, seed=0 if name == "reference" else seed)
        if name == "reference":
            shake(module, seed=seed, share=0.1)
        if not scalar:
            with torch.no_grad():
                module.lm_head.weight[END] = 2 * module.lm_head.weight[END]  # some answers end early
        module.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


def shake(module: nn.Module, *, seed: int, share: float = 1.0) -> None:
    """Mixes random weights in; all of them by default, so that no bias is 0 and no distribution flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            noise = 0.2 * torch.randn(param.shape, generator=generator)
            param.copy_(1 + noise if param.ndim < 2 and share == 1 else (1 - share) * param + share * noise)
