"""Weights of 8 and 4 bits against their definitions; folders that plain transformers and every command take."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from kinkajou.config import QuantizeConfig
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.errors import UserError
from kinkajou.models import quantised
from kinkajou.models.forward import LanguageModel, pack
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model
from kinkajou.models.packing import Repacked
from kinkajou.quant.command import quantize
from kinkajou.quant.output import check_output
from tiny import FOUR, save_source, tiny_tokenizer

WIDTHS = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 64, "n_inner": 96},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "opt-350m": {"hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 96},
    "bloom": {"hidden_size": 64},
}
"""bitsandbytes needs rows of whole blocks; 96 units are none, so that blocks are widened."""
SIDES = [*FOUR, pytest.param("opt-350m", marks=pytest.mark.slow)]
TEXT = " ".join(f"w{3 + i * i % 90}" for i in range(600))
# Dettmers 2023, appendix E.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def source(folder: Path, name: str, *, scalar: bool = False, **changes: object) -> Path:
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    tokenizer = tiny_tokenizer(words=94)
    save_source(folder / name, auto, name, tokenizer, **{**WIDTHS[name], **changes})
    (folder / "text.txt").write_text(TEXT)
    return folder / name


def made(folder: Path, model: Path, bits: int, **settings: object) -> Path:
    out = folder / f"int{bits}"
    given = {"output": str(out), "data": str(folder / "text.txt"), "bits": bits, "max_kl": 10.0, "gate_tokens": 128}
    cfg = QuantizeConfig(**{**given, **settings})
    quantize(str(model), cfg)
    return Path(cfg.output)


def int8(w: np.ndarray) -> np.ndarray:
    """Row by row: the largest magnitude stands for 127."""
    largest = np.abs(w).max(1, keepdims=True)
    return np.round(w / largest * 127) / 127 * largest


def nf4(w: np.ndarray) -> np.ndarray:
    """Blocks of 64 weights of a row: each to the nearest of 16 levels times the largest magnitude."""
    blocks = w.reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    levels = np.array(NF4)
    nearest = np.abs((blocks / largest)[..., None] - levels).argmin(-1)
    return (levels[nearest] * largest).reshape(w.shape)


@pytest.mark.parametrize(("bits", "define"), [(8, int8), (4, nf4)])
def test_weights_in_the_folder_are_those_of_the_definition(bits: int, define, tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    folder = made(tmp_path, model, bits)
    before = load_file(model / "model.safetensors")
    tokenizer, _ = load_tokenizer(str(folder))
    layers = dict(load_language_model(str(folder), tokenizer).module.named_modules())
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        want = define(before[f"{name}.weight"].double().numpy())
        got = layers[name].dequantised().double().numpy()
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert np.abs(got - before[f"{name}.weight"].numpy()).max() > 1e-3


@torch.no_grad()
def logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    n = tokens.shape[1]
    rows = pack(tokens, torch.tensor([n] * len(tokens)))
    return model.logits(model.hidden(rows.ids, rows.positions, rows.layout)).view(len(tokens), n, -1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SIDES)
def test_plain_transformers_reads_the_folder_as_we_do(name: str, bits: int, tmp_path: Path) -> None:
    """It rounds activations too (int8) or computes in bfloat16 (nf4, some processors): near, not equal."""
    folder = made(tmp_path, source(tmp_path, name), bits)
    tokenizer, _ = load_tokenizer(str(folder))
    ours = load_language_model(str(folder), tokenizer)
    assert quantised.is_quantised(ours.module)
    inside = [m for part, m in ours.module.named_modules() if ".layers." in part or ".h." in part]
    assert not [m for m in inside if type(m) in (torch.nn.Linear, Conv1D)], "all are quantised"
    tokens = torch.arange(3, 43).view(2, 20)
    with quantised.quiet(), torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
        want = plain(tokens).logits.log_softmax(-1)
    got = logits(ours, tokens).log_softmax(-1)
    kl = (want.exp() * (want - got[..., : want.shape[-1]])).sum(-1).mean()
    full = load_language_model(str(tmp_path / name), tokenizer)
    lost = (want.exp() * (want - logits(full, tokens).log_softmax(-1))).sum(-1).mean()
    assert kl < 0.02
    assert bits == 8 or kl < lost / 4, "nearer to what lies on the disk than to the original"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_widening_changes_no_logit(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(words=94)
    folder = source(tmp_path, name)
    plain, wide = (load_language_model(str(folder), tokenizer) for _ in range(2))
    quantised.widen(wide.inner)
    tokens = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(logits(wide, tokens), logits(plain, tokens), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_while_loading_are_those_of_the_folder(bits: int, tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    folder = made(tmp_path, model, bits)
    tokenizer, _ = load_tokenizer(str(folder))
    tokens = torch.arange(3, 43).view(2, 20)
    at_once = load_language_model(str(model), tokenizer, LoadOptions(bits=bits))
    assert torch.equal(logits(at_once, tokens), logits(load_language_model(str(folder), tokenizer), tokens))
    again = load_language_model(str(folder), tokenizer, LoadOptions(bits=bits))
    assert torch.equal(logits(again, tokens), logits(at_once, tokens))
    with pytest.raises(UserError, match="-bit weights"):
        load_language_model(str(folder), tokenizer, LoadOptions(bits=12 - bits))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_laid_out_for_decoding_are_the_same(bits: int, dtype: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(words=94)
    options = LoadOptions(bits=bits, dtype=dtype)
    model = load_language_model(str(source(tmp_path, "llama")), tokenizer, options).freeze()
    tokens = torch.arange(3, 23).view(1, 20)
    with torch.no_grad(), model.computing():
        plain = logits(model, tokens)
        laid = Repacked(model.module, rows=20)
        assert laid.layers
        with laid.in_place():
            close = 1e-4 if dtype == "fp32" else 0.2
            torch.testing.assert_close(logits(model, tokens), plain, atol=close, rtol=0.02)


def test_head_and_embeddings_by_choice(tmp_path: Path) -> None:
    model = source(tmp_path, "llama", tie_word_embeddings=False)
    with_head = made(tmp_path, model, 8)
    assert load_file(with_head / "model.safetensors")["lm_head.weight"].dtype == torch.int8
    without = made(tmp_path, model, 8, head=False, output=str(tmp_path / "no-head"), embeddings=True)
    stored = load_file(without / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    with quantised.quiet(), torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(str(without))
        assert plain(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_tied_head_is_the_embedding_still(tmp_path: Path) -> None:
    folder = made(tmp_path, source(tmp_path, "llama", tie_word_embeddings=True), 8)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "gate.json").read_text())["not_quantised"] == ["lm_head"]


def test_reward_model(tmp_path: Path) -> None:
    model = source(tmp_path, "llama", scalar=True)
    folder = made(tmp_path, model, 8)
    tokenizer, _ = load_tokenizer(str(folder))
    tokens = torch.arange(3, 43).view(2, 20)
    mask = torch.ones(2, 19, dtype=torch.bool)
    with torch.no_grad():
        got = load_scalar_model(str(folder), tokenizer, fresh=False)(tokens, mask, at="end")
        want = load_scalar_model(str(model), tokenizer, fresh=False)(tokens, mask, at="end")
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    assert not torch.equal(got, want)
    figures = json.loads((folder / "gate.json").read_text())
    assert figures["kinkajou"]["agreement"] == 1.0


def test_fitted_rounding_is_nearer_than_each_weight_by_itself(tmp_path: Path) -> None:
    """On outputs of the text it was fitted to: what GPTQ makes smaller."""
    from kinkajou.quant import gptq

    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 32)
    x = torch.randn(512, 16) @ torch.randn(16, 128) + 0.1 * torch.randn(512, 128)
    for bits in (8, 4):
        nearest = quantised.quantised_layer(layer, bits)
        fitted = gptq.fitted(layer, x.t() @ x, bits, name="")
        want = layer(x)
        assert (fitted(x) - want).square().sum() < 0.5 * (nearest(x) - want).square().sum()


def test_gate_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    with pytest.raises(UserError, match="the gate refuses") as caught:
        made(tmp_path, model, 4, max_kl=1e-6)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "text.txt"]


def test_gate_sees_scales_that_were_damaged_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what lies there, and says when that is not what was written."""
    from kinkajou.models import quantised_files

    model, write = source(tmp_path, "llama"), quantised_files.write_quantised

    def damage(module, folder, *rest):
        write(module, folder, *rest)
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights["model.layers.0.mlp.down_proj.SCB"] *= 4
        save_file(weights, path, {"format": "pt"})

    monkeypatch.setattr(quantised_files, "write_quantised", damage)
    with pytest.raises(UserError, match="does not hold what was written"):
        made(tmp_path, model, 8)
    assert not (tmp_path / "int8").exists()


def test_without_a_text_the_gate_reads_the_models_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path, source(tmp_path, "llama"), 8, data="")
    assert "the gate reads what the original says itself" in capsys.readouterr().out
    assert json.loads((folder / "gate.json").read_text())["kinkajou"]["tokens"] >= 64


def test_gate_text_of_records_and_a_reward_model(tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    source(tmp_path, "opt", scalar=True)
    rows = [{"prompt": f"w{i} w7", "response": f"w{i + 1} w5 w6"} for i in range(4, 24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = made(tmp_path, model, 8, data=str(tmp_path / "rows.jsonl"), reward=str(tmp_path / "opt"))
    figures = json.loads((folder / "gate.json").read_text())
    assert figures["reward"]["answers"] == 16
    assert np.isfinite([figures["reward"]["before"], figures["reward"]["after"]]).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": "absent.txt"}, "no such file"),
        ({"data": "absent.jsonl"}, "no such file"),
        ({"calibrate": "text.txt"}, "must not read the text"),
    ],
)
def test_wrong_flags(change: dict[str, str], told: str, tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    with pytest.raises(UserError, match=told):
        made(tmp_path, model, 8, **{name: str(tmp_path / value) for name, value in change.items()})
    assert not (tmp_path / "int8").exists()


def test_output_that_is_there_and_a_folder_quantised_already(tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    folder = made(tmp_path, model, 8)
    with pytest.raises(UserError, match="is there already"):
        made(tmp_path, model, 8)
    with pytest.raises(UserError, match="quantised already"):
        made(tmp_path, folder, 8, output=str(tmp_path / "twice"))
    with pytest.raises(UserError, match="would replace the model"):
        made(tmp_path, model, 8, output=str(model), overwrite=True)
    before = (folder / "model.safetensors").read_bytes()
    made(tmp_path, model, 8, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_overwrite_replaces_models_alone(tmp_path: Path) -> None:
    notes, model = tmp_path / "notes", tmp_path / "run" / "model"
    notes.mkdir()
    (notes / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="not a model's folder"):
        check_output(notes, str(model), overwrite=True)
    model.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="would replace the model"):
        check_output(tmp_path / "run", str(model), overwrite=True)


def test_peft_may_be_imported_first() -> None:
    code = "import peft, peft.import_utils as p; p.is_bnb_available(); import kinkajou.models.adapters"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_no_layer_fits(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(words=94)
    save_source(tmp_path / "narrow", AutoModelForCausalLM, "bloom-6-heads", tokenizer)
    with pytest.raises(UserError, match="no layer"):
        load_language_model(str(tmp_path / "narrow"), tokenizer, LoadOptions(bits=4))


@pytest.fixture(scope="module")
def quantised_once(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """To be copied before it is damaged."""
    place = tmp_path_factory.mktemp("quantised")
    model = source(place, "llama")
    return {bits: made(place, model, bits) for bits in (8, 4)}


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("bits", "name", "change", "told"),
    [
        (8, f"{Q}.SCB", lambda x: x[:-1], "scales for"),
        (8, f"{Q}.SCB", lambda x: x * float("nan"), "NaN"),
        (8, f"{Q}.SCB", lambda x: -x, "negative"),
        (4, f"{Q}.weight.absmax", lambda x: x[:-1], "scales for"),
        (4, f"{Q}.weight.absmax", lambda x: x * float("inf"), "infinite"),
        (4, f"{Q}.weight", lambda x: x[:-64], "bytes for"),
        (4, f"{Q}.weight.quant_map", lambda x: x.flip(0), "other levels"),
        (4, f"{Q}.weight.quant_map", lambda x: x[:-1], "other levels"),
    ],
)
def test_damaged_folders_are_refused_before_a_kernel_reads_them(
    bits: int, name: str, change, told: str, tmp_path: Path, quantised_once: dict[int, Path]
) -> None:
    folder = Path(shutil.copytree(quantised_once[bits], tmp_path / "copy"))
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, path, {"format": "pt"})
    tokenizer, _ = load_tokenizer(str(folder))
    with pytest.raises(UserError, match=told):
        load_language_model(str(folder), tokenizer)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"quant_method": "gptq"}, "does not read"),
        ({"load_in_4bit": True}, "neither int8 nor"),
        ({"llm_int8_skip_modules": ["(a+)+$"]}, "no plain names"),
    ],
)
def test_settings_of_strangers(
    change: dict[str, object], told: str, tmp_path: Path, quantised_once: dict[int, Path]
) -> None:
    folder = Path(shutil.copytree(quantised_once[8], tmp_path / "copy"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    tokenizer = tiny_tokenizer(words=94)
    with pytest.raises(UserError, match=told):
        load_language_model(str(folder), tokenizer)


def test_bitsandbytes_stays_out_until_it_is_needed() -> None:
    """And then it says nothing, asks nobody for kernels, and other programs still find the package of that name."""
    code = (
        "import sys, logging\n"
        "import kinkajou.train.sft, kinkajou.models.load\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "from kinkajou.models import quantised\n"
        "quantised.library()\n"
        "assert 'bitsandbytes' in sys.modules and 'kernels' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_nested_scales_of_strangers(tmp_path: Path) -> None:
    """Folders that transformers wrote with double quantisation and another kind of levels."""
    from transformers import BitsAndBytesConfig

    model = source(tmp_path, "llama", intermediate_size=128)
    for kind in ("nf4", "fp4"):
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
        with quantised.quiet():
            plain = AutoModelForCausalLM.from_pretrained(str(model), quantization_config=how)
        plain.save_pretrained(str(tmp_path / kind))
        tokenizer = tiny_tokenizer(words=94)
        tokens = torch.arange(3, 43).view(2, 20)
        ours = load_language_model(str(tmp_path / kind), tokenizer)
        with torch.no_grad():
            want = plain.eval()(tokens).logits.log_softmax(-1)
        got = logits(ours, tokens).log_softmax(-1)
        assert (want.exp() * (want - got)).sum(-1).mean() < 0.005
