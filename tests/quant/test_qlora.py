"""Quantised folders in every other command: adapters are trained on them, merged and beside them; judges and chats."""

import json
from pathlib import Path

import pytest
import torch
from test_quantize import logits, made, source
from transformers import AutoModelForCausalLM

from kinkajou.cli import main
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.models import quantised
from kinkajou.models.load import find_model, load_language_model, load_scalar_model
from tiny import FOUR


def rows_of(folder: Path) -> str:
    rows = [{"prompt": f"w{i} w7 ", "response": "w9 w8 w9 w8"} for i in range(4, 36)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft(folder: Path, model: Path, *more: str, data: str = "", steps: int = 8) -> int:
    output = folder / "run"
    told = f"--template plain --batch-size 8 --epochs {steps / 4} --lr 1e-2 --max-len 32 --preflight off"
    flags = ["--model", str(model), "--data", data or rows_of(folder), "--output", str(output), *told.split(), *more]
    return main(["sft", *flags])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("save", ["merged", "adapter"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_adapters_on_four_bits_train_and_are_saved(name: str, save: str, tmp_path: Path) -> None:
    """Merged weights are the dequantised ones and more: what was trained answers as what is read again."""
    base = made(tmp_path, source(tmp_path, name), 4)
    before = (base / "model.safetensors").read_bytes()
    assert sft(tmp_path, base, "--lora-rank", "4", "--lora-save", save) == 0
    curve = losses(tmp_path)
    assert curve[-1] < 0.7 * curve[0]
    assert (base / "model.safetensors").read_bytes() == before
    saved = find_model(str(tmp_path / "run"))
    tokenizer, _ = load_tokenizer(saved)
    model = load_language_model(saved, tokenizer)
    assert not quantised.is_quantised(model.module)
    tokens = torch.arange(3, 43).view(2, 20)
    got = logits(model, tokens)
    assert (got - logits(load_language_model(str(base), tokenizer), tokens)).abs().max() > 0.1
    if save == "merged":
        plain = AutoModelForCausalLM.from_pretrained(saved).eval()
        assert not hasattr(plain.config, "quantization_config")
        with torch.no_grad():
            torch.testing.assert_close(got, plain(tokens).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(x, marks=pytest.mark.slow) for x in FOUR if x != "gpt2")])
def test_merging_adds_the_adapters_to_the_numbers_that_were_multiplied(name: str, tmp_path: Path) -> None:
    """The model in training, with its adapters beside int8, against the merged folder."""
    from kinkajou.models.load import LoadOptions, save_model

    base = made(tmp_path, source(tmp_path, name), 8)
    tokenizer, _ = load_tokenizer(str(base))
    model = load_language_model(str(base), tokenizer, LoadOptions(lora_rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.2 * torch.randn(param.shape, generator=generator))
    tokens = torch.arange(3, 43).view(2, 20)
    want = logits(model, tokens)
    save_model(model, tokenizer, tmp_path / "merged")
    got = logits(load_language_model(str(tmp_path / "merged"), tokenizer), tokens)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_gradients_pass_a_quantised_layer_as_they_pass_its_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for bits in (8, 4):
        layer = quantised.quantised_layer(torch.nn.Linear(64, 32), bits)
        x = torch.randn(5, 64, requires_grad=True)
        y = torch.randn(5, 32)
        (layer(x) * y).sum().backward()
        torch.testing.assert_close(x.grad, y @ layer.dequantised(), atol=1e-5, rtol=1e-5)


def test_training_without_adapters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = made(tmp_path, source(tmp_path, "llama"), 8)
    assert sft(tmp_path, base) == 2
    assert "quantised weights cannot be trained" in capsys.readouterr().err


@pytest.mark.slow
def test_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    base = made(tmp_path, source(tmp_path, "llama"), 4)
    assert sft(tmp_path, base, "--lora-rank", "2", "--save-every", "4") == 0
    whole = losses(tmp_path)
    second = tmp_path / "second"
    second.mkdir()
    place = str(tmp_path / "run" / "checkpoints" / "step-000004")
    more = ("--lora-rank", "2", "--save-every", "4", "--resume", place)
    assert sft(second, base, *more, data=str(tmp_path / "rows.jsonl")) == 0
    assert losses(tmp_path / "second")[-4:] == whole[-4:]


def test_reward_model_and_critic_from_a_quantised_folder(tmp_path: Path) -> None:
    base = made(tmp_path, source(tmp_path, "llama"), 8)
    tokenizer, _ = load_tokenizer(str(base))
    model = load_scalar_model(str(base), tokenizer)
    assert quantised.is_quantised(model.module)
    assert type(model.score_head) is torch.nn.Linear


def test_chat_with_a_quantised_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = made(tmp_path, source(tmp_path, "llama"), 8)
    capsys.readouterr()
    assert main(["chat", str(base), "--message", "w5 w6", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
def test_ppo_from_and_against_a_quantised_folder(tmp_path: Path) -> None:
    base = made(tmp_path, source(tmp_path, "llama"), 8)
    told = (
        "--lora-rank 2 --template plain --reward rule:ended --steps 1 --prompts-per-step 4 --minibatch-size 4 "
        "--max-len 32 --max-new-tokens 4 --preflight off --backbone shared"
    )
    flags = ["--model", str(base), "--prompts", rows_of(tmp_path), "--output", str(tmp_path / "run"), *told.split()]
    assert main(["ppo", *flags]) == 0
