"""`kinkajou export --to merged`: plain folders that compute what the source does, whole or absent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kinkajou.config import ExportConfig
from kinkajou.errors import UserError
from kinkajou.models import adapters, quantised, quantised_files
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model, save_model
from kinkajou.quant import export as exporting
from kinkajou.quant.export import export
from tiny import FOUR, PAD, save_source, tiny_tokenizer

CAUSAL, SCORING = AutoModelForCausalLM, AutoModelForSequenceClassification
IDS = torch.randint(3, PAD - 2, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def answers(module: nn.Module) -> Tensor:
    found: Tensor = module.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def merged(source: Path, output: Path, **settings: Any) -> Path:
    export(str(source), ExportConfig(output=str(output), **settings))
    return output


def plain(folder: Path, kind: type = CAUSAL, **settings: Any) -> nn.Module:
    module: nn.Module = kind.from_pretrained(str(folder), **settings)  # type: ignore[attr-defined]
    return module


def beside(base: nn.Module, folder: Path) -> Any:
    """PEFT's own model: the adapter is at work, not folded in."""
    from peft import PeftModel  # kinkajou wants to be the first that imports it

    with adapters.renames_ignored():
        return PeftModel.from_pretrained(base, str(folder))  # type: ignore[arg-type]


def adapter(folder: Path, family: str, *, scalar: bool = False) -> Path:
    """A base model and a trained-looking adapter on it."""
    tokenizer = tiny_tokenizer()
    save_source(folder / "base", SCORING if scalar else CAUSAL, family, tokenizer)
    load = load_scalar_model if scalar else load_language_model
    model: Any = load(str(folder / "base"), tokenizer, LoadOptions(lora_rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.2 * torch.randn(param.shape, generator=generator))
    (folder / "adapter").mkdir()
    save_model(model, tokenizer, folder / "adapter", lora="adapter")
    return folder / "adapter"


@pytest.mark.parametrize("family", FOUR)
def test_an_adapter_folded_in_is_the_model_with_the_adapter_beside(family: str, tmp_path: Path) -> None:
    """PEFT's own pass with the adapter at work, not folded in, on transformers' own model."""
    folder = adapter(tmp_path, family)
    base = plain(tmp_path / "base")
    before = answers(base)
    wanted = answers(beside(base, folder))
    found = answers(plain(merged(folder, tmp_path / "merged")))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - before).abs().max() > 0.1
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "llama", scalar=True)
    wanted = answers(beside(plain(tmp_path / "base", SCORING, num_labels=1), folder))
    found = plain(merged(folder, tmp_path / "merged"), SCORING)
    assert found.config.architectures == ["LlamaForSequenceClassification"]  # type: ignore[union-attr]
    torch.testing.assert_close(answers(found), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "kind"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_plain_model_is_written_in_the_type_that_is_asked(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    module = save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer())
    folder = merged(tmp_path / "model", tmp_path / "out", dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    original = {name: x for name, x in module.state_dict().items() if name in stored}
    assert len(stored) == len(original) >= 20
    for name, x in original.items():
        assert torch.equal(stored[name], x.to(kind)), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    assert next(plain(folder).parameters()).dtype == kind  # what somebody gets who says nothing


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_folder_becomes_plain(bits: int, tmp_path: Path) -> None:
    """Its numbers are those that the stored ones stand for by definition (Dettmers 2022, 2023)."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer(), **size)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    module = load_language_model(str(tmp_path / "model"), tokenizer).freeze().inner
    kept = quantised.quantise(module, bits)
    (tmp_path / "small").mkdir()
    quantised_files.write_quantised(module, tmp_path / "small", bits, kept, torch.float32)
    tokenizer.save_pretrained(str(tmp_path / "small"))
    stored = load_file(tmp_path / "small" / "model.safetensors")
    folder = merged(tmp_path / "small", tmp_path / "out")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found = load_file(folder / "model.safetensors")
    names = [name for name, x in stored.items() if name.endswith(".weight") and x.dtype in (torch.int8, torch.uint8)]
    assert len(names) == (15 if bits == 8 else 14)  # seven matrices in two layers, and a head that 4 bits do not fit
    for name in names:
        wanted = full_eight(stored, name) if bits == 8 else full_four(stored, name, found[name].shape)
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-5)
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert type(plain(folder).model.layers[0].mlp.up_proj) is nn.Linear  # type: ignore[union-attr,index]


def full_eight(stored: dict[str, Tensor], name: str) -> Tensor:
    """The largest magnitude of a row stands for 127."""
    return stored[name].float() * stored[name.removesuffix("weight") + "SCB"][:, None] / 127


def full_four(stored: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Two numbers of a level in each byte, the first in its upper half; a scale for 64 of them."""
    bytes_ = stored[name].flatten().to(torch.int64)
    levels = stored[f"{name}.quant_map"][torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten()]
    return (levels.view(-1, 64) * stored[f"{name}.absmax"][:, None]).view(shape)


def test_template_tokenizer_and_end_tokens_come_along(tmp_path: Path) -> None:
    module: Any = save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer())
    module.generation_config.eos_token_id = [2, 7]
    module.save_pretrained(str(tmp_path / "model"))
    folder = merged(tmp_path / "model", tmp_path / "out")
    read: Any = plain(folder)
    assert read.generation_config.eos_token_id == [2, 7]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert "### Response:" in tokenizer.chat_template
    assert tokenizer("w5 w6").input_ids == tiny_tokenizer()("w5 w6").input_ids


def test_it_says_how_near_the_written_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_source(tmp_path / "model", CAUSAL, "gpt2", tiny_tokenizer())
    merged(tmp_path / "model", tmp_path / "out", dtype="bf16")
    said = capsys.readouterr().out
    assert "transformers reads it: logits differ by " in said
    assert "bf16 changes the largest of " in said
    assert f"done: {tmp_path / 'out'}" in said


def test_a_folder_that_computes_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer())
    save = exporting.save_model

    def damaged(model: Any, *args: Any, **settings: Any) -> None:
        with torch.no_grad():
            model.inner.model.layers[1].mlp.up_proj.weight.neg_()
        save(model, *args, **settings)

    monkeypatch.setattr(exporting, "save_model", damaged)
    with pytest.raises(UserError, match="does not compute") as caught:
        merged(tmp_path / "model", tmp_path / "out")
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_there_is_replaced_only_when_asked_and_only_a_model(tmp_path: Path) -> None:
    save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer())
    out = merged(tmp_path / "model", tmp_path / "out")
    before = (out / "config.json").stat().st_ino
    with pytest.raises(UserError, match="is there already"):
        merged(tmp_path / "model", out)
    assert (out / "config.json").stat().st_ino == before
    merged(tmp_path / "model", out, overwrite=True)
    assert (out / "config.json").stat().st_ino != before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a model's folder"):
        merged(tmp_path / "model", tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "a.txt").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "model", "out"]


@pytest.mark.parametrize("output", ["model", "."])
def test_the_source_is_never_replaced(output: str, tmp_path: Path) -> None:
    save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer())
    with pytest.raises(UserError, match="would replace the model"):
        merged(tmp_path / "model", tmp_path / output, overwrite=True)
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer())
    out = merged(tmp_path / "model", tmp_path / "out")
    before = sorted(path.name for path in out.iterdir())

    def full(*args: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_model", full)
    with pytest.raises(UserError, match="could not be written") as caught:
        merged(tmp_path / "model", out, overwrite=True)
    assert caught.value.exit_code == 4
    assert sorted(path.name for path in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_weight_beyond_half_is_refused(tmp_path: Path) -> None:
    module: Any = save_source(tmp_path / "model", CAUSAL, "llama", tiny_tokenizer())
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    module.save_pretrained(str(tmp_path / "model"))
    with pytest.raises(UserError, match="does not fit f16"):
        merged(tmp_path / "model", tmp_path / "out", dtype="f16")
    assert not (tmp_path / "out").exists()


def test_a_run_folder_gives_its_best_checkpoint(tmp_path: Path) -> None:
    for step, seed in ((1, 0), (2, 1)):
        save_source(tmp_path / f"run/checkpoints/step-{step:06d}", CAUSAL, "llama", tiny_tokenizer(), seed=seed)
    (tmp_path / "run" / "best.json").write_text('{"step": 1}')
    found = load_file(merged(tmp_path / "run", tmp_path / "out") / "model.safetensors")
    wanted = load_file(tmp_path / "run/checkpoints/step-000001/model.safetensors")
    assert all(torch.equal(found[name], x) for name, x in wanted.items())


def test_eight_bit_blocks_belong_to_gguf() -> None:
    with pytest.raises(UserError, match="a plain folder has no q8_0"):
        ExportConfig(output="x", dtype="q8_0")
