"""GGUF files, read back by the reader of the `gguf` package and by transformers: every weight, every token."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from gguf.constants import MODEL_TENSORS
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kinkajou.config import ExportConfig
from kinkajou.data.templates import TEMPLATES
from kinkajou.data.tokenizer import prepare, train_tokenizer
from kinkajou.errors import UserError
from kinkajou.quant.export import export
from kinkajou.quant.gguf_tensors import llama3_factors
from kinkajou.quant.gguf_tokens import merge_scores, plain_template
from tiny import save_source, tiny_config, tiny_tokenizer

TEXTS = [
    "the cat sat on the mat and the dog sat on the log",
    "it's 12 o'clock, isn't it? naïve café",
    "x = y + 1\n\n  z",
]
FAMILIES = ["llama", "gpt2", "bloom"]
Numbers = NDArray[np.float32]


def source(folder: Path, family: str, *, spare: int = 0, **changes: object) -> nn.Module:
    """A model with a byte-level tokenizer, its weights far from their initial ones."""
    tokenizer: Any = train_tokenizer(TEXTS * 20, 300)
    return save_source(folder, AutoModelForCausalLM, family, tokenizer, vocab_size=len(tokenizer) + spare, **changes)


def written(tmp_path: Path, family: str, dtype: str = "f32", **changes: object) -> tuple[nn.Module, gguf.GGUFReader]:
    module = source(tmp_path / "model", family, **changes)
    export(str(tmp_path / "model"), ExportConfig(to="gguf", output=str(tmp_path / "model.gguf"), dtype=dtype))  # type: ignore[arg-type]
    return module, gguf.GGUFReader(str(tmp_path / "model.gguf"))


def tensors(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in reader.tensors}


def stored(tensor: Any) -> Numbers:
    """The numbers of a stored tensor, by the definition of its type."""
    kind = tensor.tensor_type.name
    shape = tuple(int(n) for n in reversed(tensor.shape))
    raw = np.ascontiguousarray(tensor.data)
    if kind == "F32":
        return raw.view(np.float32).reshape(shape)
    if kind == "F16":
        return raw.view(np.float16).astype(np.float32).reshape(shape)
    if kind == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    assert kind == "Q8_0"  # blocks of a float16 scale and 32 int8
    found = []
    for block in raw.reshape(-1, 34):
        found += [np.float32(block[:2].view(np.float16)[0]) * np.float32(q) for q in block[2:].view(np.int8)]
    return np.array(found, np.float32).reshape(shape)


def hugging_face(family: str, config: Any, found: dict[str, Numbers]) -> dict[str, Numbers]:
    """Rebuilt row by row in transformers' names and layouts."""
    names = {
        "llama": {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "blk": "model.layers",
        },
        "gpt2": {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
            "attn_norm": "ln_1",
            "ffn_norm": "ln_2",
            "blk": "transformer.h",
        },
        "bloom": {
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "blk": "transformer.h",
        },
    }[family] | {"output": "lm_head"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", 0)}
    rebuilt = {}
    for name, x in found.items():
        parts = name.split(".")
        place = parts[-2]
        if family == "llama" and place in heads:
            x = unpaired(x, heads[place])
        if family == "bloom" and place == "attn_qkv":
            x = together(x, config.n_head)
        if family == "gpt2" and x.ndim == 2 and place not in ("token_embd", "position_embd", "output"):
            x = x.T
        layer = f"{names['blk']}.{parts[1]}." if parts[0] == "blk" else ""
        rebuilt[f"{layer}{names[place]}.{parts[-1]}"] = x
    return rebuilt


def unpaired(x: Numbers, heads: int) -> Numbers:
    """llama.cpp's row 2 j + s of a head is transformers' row s d/2 + j."""
    width = len(x) // heads
    found = np.empty_like(x)
    for head in range(heads):
        for j in range(width // 2):
            for s in range(2):
                found[head * width + s * width // 2 + j] = x[head * width + 2 * j + s]
    return found


def together(x: Numbers, heads: int) -> Numbers:
    """llama.cpp has part, head, row; BLOOM head, part, row."""
    width = len(x) // (3 * heads)
    found = np.empty_like(x)
    for part in range(3):
        for head in range(heads):
            for row in range(width):
                found[(head * 3 + part) * width + row] = x[(part * heads + head) * width + row]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_float32_is_the_original_bit_by_bit(family: str, tied: bool, tmp_path: Path) -> None:
    module, reader = written(tmp_path, family, tie_word_embeddings=tied)
    rebuilt = hugging_face(family, module.config, {name: stored(t) for name, t in tensors(reader).items()})
    original = {name: x.numpy() for name, x in module.state_dict().items()}
    if tied:
        del original["lm_head.weight"]
    assert rebuilt.keys() == original.keys()
    for name, x in original.items():
        assert np.array_equal(rebuilt[name].view(np.uint32), x.view(np.uint32)), name


def halves(x: Numbers, name: str) -> Numbers:
    return x.astype(np.float16).astype(np.float32)


def bfloat16(x: Numbers, name: str) -> Numbers:
    return torch.tensor(x).to(torch.bfloat16).float().numpy()


def blocks_of_eight_bits(x: Numbers, name: str) -> Numbers:
    """Each block's largest magnitude, over 127 and in half, is what one stands for."""
    found = []
    for block in x.reshape(-1, 32):
        scale = np.float32(abs(block).max() / np.float32(127))
        inverse = np.float32(1) / scale
        numbers = [float(np.float32(v) * inverse) for v in block]
        rounded = [np.sign(v) * np.floor(abs(v) + 0.5) for v in numbers]
        found += [np.float32(np.float16(scale)) * np.float32(q) for q in rounded]
    return np.array(found, np.float32).reshape(x.shape)


@pytest.mark.parametrize(
    ("dtype", "by_definition"), [("f16", halves), ("bf16", bfloat16), ("q8_0", blocks_of_eight_bits)]
)
def test_the_other_types_are_what_their_definition_says(
    dtype: str, by_definition: Callable[[Numbers, str], Numbers], tmp_path: Path
) -> None:
    """Vectors stay float32; blocks run along the rows that llama.cpp multiplies, so GPT-2 is turned before them."""
    module, reader = written(tmp_path, "gpt2", dtype)
    found = tensors(reader)
    assert {t.tensor_type.name for t in found.values()} == {"F32", dtype.upper()}
    rebuilt = hugging_face("gpt2", module.config, {name: stored(t) for name, t in found.items()})
    for name, x in module.state_dict().items():
        if name == "lm_head.weight":
            continue
        turned = x.ndim == 2 and "wte" not in name and "wpe" not in name
        plain = np.ascontiguousarray(x.T.numpy() if turned else x.numpy())
        wanted = plain if plain.ndim == 1 else by_definition(plain, name)
        assert np.array_equal(rebuilt[name], wanted.T if turned else wanted), name


def test_rows_that_eight_bits_cannot_cut_are_half_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The feed-forward block of this LLaMA has 48 units: its way back has rows of 48."""
    _, reader = written(tmp_path, "llama", "q8_0")
    kinds = {name: t.tensor_type.name for name, t in tensors(reader).items()}
    assert {name for name, kind in kinds.items() if kind == "F16"} == {f"blk.{i}.ffn_down.weight" for i in range(2)}
    assert "2 matrices are in f16" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_file_as_the_model(family: str, tmp_path: Path) -> None:
    """A peer's reader, with names and layouts of its own, and settings, but for GPT-2's positions and units."""
    module, _ = written(tmp_path, family)
    ids = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(0))
    given = {"config": module.config} if family == "gpt2" else {}
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="model.gguf", dtype=torch.float32, **given)
    with torch.no_grad():
        found, wanted = read.eval()(input_ids=ids).logits, module(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-4), float((found - wanted).abs().max())


def field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    module, reader = written(tmp_path, family)
    config: Any = module.config
    assert field(reader, "general.architecture") == family
    wanted = {
        "block_count": 2,
        "embedding_length": 32,
        "attention.head_count": 4,
        "vocab_size": config.vocab_size,
        "feed_forward_length": 48 if family == "llama" else 128,
        "context_length": 64 if family != "bloom" else 2048,
        "attention.head_count_kv": 2 if family == "llama" else 4,
    }
    assert {name: field(reader, f"{family}.{name}") for name in wanted} == wanted
    epsilon = config.rms_norm_eps if family == "llama" else config.layer_norm_epsilon
    key = "layer_norm_rms_epsilon" if family == "llama" else "layer_norm_epsilon"
    assert field(reader, f"{family}.attention.{key}") == pytest.approx(epsilon, rel=1e-6)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    known = {gguf.TENSOR_NAMES[kind].replace(".{bid}", "") for kind in MODEL_TENSORS[arch]}
    places = {".".join(p for p in name.split(".")[:-1] if not p.isdigit()) for name in tensors(reader)}
    assert places <= known


def test_every_token_is_there_under_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, reader = written(tmp_path, "gpt2", spare=3)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    size = len(tokenizer)
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert tokens[:size] == tokenizer.convert_ids_to_tokens(list(range(size)))
    assert tokens[size:] == [f"[PAD{size + i}]" for i in range(3)]
    assert "3 rows of the embedding have no token" in capsys.readouterr().out
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert kinds[:2] == [3, 3]  # <pad>, <end>: control
    assert set(kinds[2:size]) == {1}
    assert kinds[size:] == [5, 5, 5]
    merges = field(reader, "tokenizer.ggml.merges")
    assert all("".join(merge.split(" ")) in tokens for merge in merges)
    assert len(merges) == size - 258  # an alphabet of 256 bytes, two control tokens, the rest is merged
    assert (field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
    ends = [field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "padding")]
    assert ends == [tokenizer.convert_tokens_to_ids("<end>"), tokenizer.convert_tokens_to_ids("<pad>")]
    assert not field(reader, "tokenizer.ggml.add_bos_token")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_renders_the_same_without_the_tag_that_only_transformers_knows(name: str) -> None:
    tokenizer: Any = train_tokenizer(TEXTS, 300)
    prepare(tokenizer, template=name, source="test")  # type: ignore[arg-type]
    plain = plain_template(tokenizer.chat_template)
    assert "generation %}" not in plain
    chat = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user")]
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    bare = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(plain)
    assert bare.render(messages=chat, add_generation_prompt=True, eos_token="<end>") == wanted
    with pytest.raises(jinja2.TemplateSyntaxError):
        jinja2.Environment().from_string(tokenizer.chat_template)


def test_dashes_of_the_tag_are_kept() -> None:
    tokenizer: Any = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = "a {%- generation -%} b {%- endgeneration %} c"
    assert jinja2.Template(plain_template(tokenizer.chat_template)).render() == "ab c"


BYTES = [f"<0x{i:02X}>" for i in range(256)]


def scores(words: list[str], pairs: list[tuple[str, str]]) -> list[float]:
    return merge_scores([*BYTES, *words], [6] * 256 + [1] * len(words), pairs)[256:]


def test_merges_become_scores_in_their_order() -> None:
    found = dict(
        zip(["a", "b", "c", "ab", "bc", "abc"], scores(["a", "b", "c", "ab", "bc", "abc"], MERGES), strict=True)
    )
    assert found["ab"] > found["bc"] > found["abc"]


MERGES = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]


@pytest.mark.parametrize(
    ("words", "pairs", "said"),
    [
        ("a b c ab bc abc", MERGES[:3], "not merged from"),  # a bc makes abc too, but is no merge
        ("a b c ab bc abc", [MERGES[0], MERGES[2], MERGES[1], MERGES[3]], "other merges stand between"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(words: str, pairs: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scores(words.split(), pairs)


def test_bytes_without_a_token_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 256 bytes have no token"):
        merge_scores(BYTES[1:], [6] * 255, [])


def test_llama3_rotary_factors() -> None:
    """Dubey 2024's rule, as transformers computes it: its frequencies over the plain ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_config("llama", head_dim=32, hidden_size=128, rope_parameters=LLAMA3, max_position_embeddings=256)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = torch.tensor([1 / 10_000 ** (i / 32) for i in range(0, 32, 2)])
    factors: Tensor = plain / scaled
    assert torch.allclose(llama3_factors(config), factors, rtol=1e-5)
    assert factors[0] == pytest.approx(1)
    assert 1.1 < factors[2] < 7.9
    assert factors[-1] == pytest.approx(8)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
REFUSED = {
    "opt": ("opt", {}, "llama.cpp does not run OPT"),
    "mistral": ("mistral", {}, "not of mistral"),
    "gpt2-inverse-layer": ("gpt2-inverse-layer", {}, "scale_attn_by_inverse_layer_idx is True"),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
    "bloom-residual": ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type is 'yarn'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    family, changes, said = REFUSED[name]
    source(tmp_path / "model", family, **changes)
    with pytest.raises(UserError, match=said):
        export(str(tmp_path / "model"), ExportConfig(to="gguf", output=str(tmp_path / "x.gguf")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    save_source(tmp_path / "model", AutoModelForCausalLM, "llama", tiny_tokenizer())
    with pytest.raises(UserError, match="no GGUF form"):
        export(str(tmp_path / "model"), ExportConfig(to="gguf", output=str(tmp_path / "x.gguf")))
    assert not (tmp_path / "x.gguf").exists()


def test_a_reward_model_is_refused(tmp_path: Path) -> None:
    save_source(tmp_path / "model", AutoModelForSequenceClassification, "llama", tiny_tokenizer())
    with pytest.raises(UserError, match="scores no answers"):
        export(str(tmp_path / "model"), ExportConfig(to="gguf", output=str(tmp_path / "x.gguf")))


def test_without_the_package_its_install_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path / "model", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'kinkajou\[gguf\]'"):
        export(str(tmp_path / "model"), ExportConfig(to="gguf", output=str(tmp_path / "x.gguf")))


def test_a_number_beyond_half_is_refused(tmp_path: Path) -> None:
    module = source(tmp_path / "model", "llama")
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6  # type: ignore[union-attr,index]
    module.save_pretrained(str(tmp_path / "model"))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight does not fit f16"):
        export(str(tmp_path / "model"), ExportConfig(to="gguf", output=str(tmp_path / "x.gguf"), dtype="f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
