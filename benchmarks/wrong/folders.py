"""Model folders that are broken: settings, weights, shards, tokenizers, adapters; each refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.wrong.cases import Case, Draw, Good

Broken = tuple[str, ...]
"""What must be named besides the folder; one of them."""
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def changed_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def settings_text(draw: Draw, model: Path) -> Broken:
    """config.json that is no JSON object."""
    path = model / "config.json"
    whole = path.read_bytes()
    texts = [b"", b"[]", b"null", b"3", b"\xff\xfe\x00", whole[: draw(st.integers(1, len(whole) - 2))], whole + b"}"]
    texts += [whole.decode().encode("utf-16"), b"{'a': 1}", b"[" * 100_000, b'{"model_type": NaN}', b"{}"]
    path.write_bytes(draw(st.sampled_from(texts)))
    return ("config.json", "settings", "model")


def settings_value(draw: Draw, model: Path) -> Broken:
    """A size of another type or beyond what is sane."""
    name = draw(st.sampled_from(SIZES))
    value = draw(st.sampled_from(["32", None, [], {}, -1, 0, 10**9, 10**30, 1.5, True]))
    changed_json(model / "config.json", **{name: value})
    return (name, "config.json", "settings", "weights", "embedding")


def settings_shape(draw: Draw, model: Path) -> Broken:
    """A size that the weights do not have."""
    name, value = draw(
        st.sampled_from(
            [
                ("hidden_size", 64),
                ("intermediate_size", 40),
                ("vocab_size", 50),
                ("vocab_size", 200),
                ("num_hidden_layers", 3),
                ("num_attention_heads", 8),
                ("num_key_value_heads", 1),
                ("hidden_size", 36),
            ]
        )
    )
    changed_json(model / "config.json", **{name: value})
    return (name, "config.json", "settings", "weights", "embedding")


def family(draw: Draw, model: Path) -> Broken:
    """Another architecture, or none that is known."""
    name = draw(st.sampled_from(["gpt2", "opt", "bloom", "bert", "t5", "nonsense", "", 3, None, "../llama"]))
    changed_json(model / "config.json", model_type=name)
    return ("config.json", "settings", "weights", "model")


def weights_bytes(draw: Draw, model: Path) -> Broken:
    """model.safetensors that is none."""
    path = model / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    how = draw(
        st.sampled_from(["cut", "header", "grown", "empty", "length", "noise", "pickle", "gone", "folder", "bin"])
    )
    if how in ("gone", "folder", "bin"):
        path.rename(model / "pytorch_model.bin") if how == "bin" else path.unlink()
        if how == "folder":
            path.mkdir()
        return ("safetensors", "weights")
    path.write_bytes(
        {
            "cut": whole[: draw(st.integers(0, len(whole) - 1))],
            "header": whole[:8] + draw(st.binary(min_size=20, max_size=20)) + whole[28:],
            "grown": whole + draw(st.binary(min_size=1, max_size=64)),
            "empty": b"",
            "length": draw(st.sampled_from([2**64 - 1, 2**40, 0, header + 1])).to_bytes(8, "little") + whole[8:],
            "noise": draw(st.binary(min_size=200, max_size=4000)),
            "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
        }[how]
    )
    return ("safetensors",)


def weights_tensors(draw: Draw, model: Path) -> Broken:
    """A tensor that is missing, of another shape, or not a number."""
    import torch
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["missing", "renamed", "shape", "NaN", "infinite"]))
    x = tensors.pop(name)
    if how == "renamed":
        tensors[f"{name}.old"] = x
    elif how == "shape":
        tensors[name] = torch.zeros(*x.shape[:-1], x.shape[-1] + draw(st.integers(1, 5)))
    elif how in ("NaN", "infinite"):
        tensors[name] = torch.full_like(x, float("nan" if how == "NaN" else "inf"))
    save_file(tensors, path, metadata={"format": "pt"})
    return (name, "weights")


def shards(draw: Draw, model: Path) -> Broken:
    """An index with a shard or an entry that is not there."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    halves = (names[::2], names[1::2])
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, model / file, metadata={"format": "pt"})
    places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index: Any = {"metadata": {"total_size": 1}, "weight_map": places}
    how = draw(st.sampled_from(["shard", "entry", "text", "no map", "outside", "number", "cut"]))
    if how == "shard":
        (model / files[draw(st.integers(0, 1))]).unlink()
    elif how == "cut":
        path = model / files[0]
        path.write_bytes(path.read_bytes()[: -draw(st.integers(1, 500))])
    elif how == "entry":
        name = draw(st.sampled_from(names))
        places[name] = "model-00003-of-00002.safetensors"
    elif how == "outside":
        places[names[0]] = "../judge/model.safetensors"
    elif how == "number":
        places[names[0]] = 3
    elif how == "no map":
        index = draw(st.sampled_from([{}, [], {"weight_map": []}, {"weight_map": None}]))
    text = json.dumps(index)
    (model / "model.safetensors.index.json").write_text(text[:-5] if how == "text" else text)
    return ("safetensors", "weights", "index")


def vocabulary(draw: Draw, model: Path) -> Broken:
    """The tokenizer of another model: larger, without an end, of no known form."""
    from tiny import VOCAB, tiny_tokenizer

    how = draw(st.sampled_from(["larger", "endless", "gone", "cut", "no JSON", "end unknown", "id"]))
    path = model / "tokenizer.json"
    if how == "larger":
        tiny_tokenizer(words=VOCAB + draw(st.integers(1, 500))).save_pretrained(model)
        return ("does not fit",)
    if how == "endless":
        tiny_tokenizer(end=None).save_pretrained(model)
        return ("no end token",)
    if how == "end unknown":
        changed_json(model / "tokenizer_config.json", eos_token=draw(st.sampled_from([3, [], {"a": 1}, None])))
        return ("tokenizer", "no end token")
    if how == "id":
        words = json.loads(path.read_text())
        words["model"]["vocab"]["w3"] = draw(st.integers(200, 10**9))
        path.write_text(json.dumps(words))
        return ("tokenizer",)
    if how == "gone":
        path.unlink()
        (model / "tokenizer_config.json").unlink()
        return ("tokenizer",)
    text = path.read_text()
    path.write_text(
        text[: draw(st.integers(0, len(text) - 2))] if how == "cut" else draw(st.sampled_from(["[]", "null"]))
    )
    return ("tokenizer",)


def template(draw: Draw, model: Path) -> Broken:
    """A chat template that does not parse, raises, says nothing or never ends."""
    texts = ["{% for m in messages %}", "{{ messages[99].content }}", "{{ raise_exception('no') }}", "nothing"]
    texts += [
        "{{ 'x' * 10**9 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
    ]
    text = draw(st.sampled_from(texts))
    changed_json(model / "tokenizer_config.json", chat_template=text)
    (model / "chat_template.jinja").write_text(text)
    return ("template",)


def adapter(draw: Draw, model: Path) -> Broken:
    """An adapter's folder without its base, its weights or its sense."""
    for path in model.iterdir():
        if path.name in ("config.json", "model.safetensors"):
            path.unlink()
    texts = ["", "[]", "{}", '{"base_model_name_or_path": 3}', '{"base_model_name_or_path": "/no/such/base"}']
    texts += ['{"base_model_name_or_path": "/no/such/base", "peft_type": "LORA", "r": -1}', '{"peft_type": NaN}']
    (model / "adapter_config.json").write_text(draw(st.sampled_from(texts)))
    return ("adapter", "base")


KINDS: dict[str, Callable[[Draw, Path], Broken]] = {
    "config.json is no object": settings_text,
    "a size of another type": settings_value,
    "a size that the weights lack": settings_shape,
    "another family": family,
    "broken safetensors": weights_bytes,
    "a wrong tensor": weights_tensors,
    "broken shards": shards,
    "another vocabulary": vocabulary,
    "a broken template": template,
    "a broken adapter": adapter,
}


def broken_models(draw: Draw, folder: Path, good: Good) -> Case:
    kind = draw(st.sampled_from([*KINDS]))
    model = folder / "broken"
    shutil.copytree(good.policy, model)
    names = KINDS[kind](draw, model)
    own = ["--template", "auto"] if kind == "a broken template" else ["--template", "plain"]
    base = ["--model", str(model), *own, "--max_len", "48", "--output", "run"]
    stages = {
        "sft": ["sft", *base, "--data", good.chats, "--batch_size", "2", "--epochs", "0.05"],
        "reward": ["reward", *base, "--data", good.pairs, "--batch_size", "2", "--epochs", "0.05"],
        "prefer": ["prefer", *base, "--data", good.pairs, "--batch_size", "2", "--epochs", "0.05"],
        "ppo": [
            *["ppo", *base, "--prompts", good.prompts, "--reward", "rule:ended", "--steps", "1"],
            *["--prompts_per_step", "2", "--max_new_tokens", "4", "--minibatch_size", "2"],
        ],
        "chat": ["chat", str(model), "--message", "w3"],
    }
    stage = draw(st.sampled_from([name for name in stages if kind != "a broken template" or name != "reward"]))
    return Case(f"model: {kind}", stages[stage], ["broken", names])
