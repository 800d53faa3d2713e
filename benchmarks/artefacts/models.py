"""Hostile models, tokenizers and adapters."""

import io
import json
import os
import struct
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.artefacts.making import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Make,
    Target,
    both,
    edit,
    edit_by,
    fifo,
    header,
    header_length,
    instead,
    linked,
    pickled,
    template,
    tensors,
    text_edit,
    write,
    zipped,
)

INDEX = "model.safetensors.index.json"


def numpy_pickle(target: Target) -> bytes:
    """An array of objects: its data are a pickle."""
    words = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    text = words.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + pickled(target)


def tar(target: Target) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo(f"../{target.canary.name}")
        archive.addfile(entry, io.BytesIO())
        entry = tarfile.TarInfo("data.pkl")
        entry.size = len(pickled(target))
        archive.addfile(entry, io.BytesIO(pickled(target)))
    return made.getvalue()


def overlap(table: dict[str, Any]) -> None:
    """The second tensor over the first of the same length."""
    names = tensors(table)
    for one in names:
        for other in names:
            if one != other and table[one]["shape"] == table[other]["shape"]:
                table[other]["data_offsets"] = table[one]["data_offsets"]
                return


def gap(table: dict[str, Any]) -> None:
    del table[tensors(table)[1]]


def beyond(table: dict[str, Any]) -> None:
    entry = table[tensors(table)[-1]]
    entry["data_offsets"][1] += 1 << 40
    entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4]


def overflow(table: dict[str, Any]) -> None:
    table[tensors(table)[0]]["shape"] = [1 << 33, 1 << 33]


def negative(table: dict[str, Any]) -> None:
    table[tensors(table)[0]]["shape"] = [-1, -1]


def twice(table: dict[str, Any]) -> bytes:
    name = tensors(table)[0]
    return (json.dumps(table)[:-1] + f", {json.dumps(name)}: {json.dumps(table[name])}}}").encode()


def bomb(table: dict[str, Any]) -> None:
    table.update({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)})


def deep(table: dict[str, Any]) -> bytes:
    return b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def indexed(place: str) -> Make:
    """An index whose weights lie at that place."""

    def make(target: Target) -> None:
        with (target.folder / WEIGHTS).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            names = tensors(json.loads(file.read(length)))
        name = place.format(outside=target.good / WEIGHTS)
        (target.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
        (target.folder / WEIGHTS).rename(target.folder / "other.safetensors")
        (target.folder / "pytorch_model.bin").write_bytes(pickled(target))

    return make


def code(name: str) -> Make:
    return write(name, lambda target: target.code.encode())


def remote(kind: str) -> Make:
    """A model of a type that only the folder's own code knows."""
    places = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    return both(code("evil.py"), edit(CONFIG, model_type=kind, auto_map=places))


def vocabulary(change: Any) -> Make:
    return edit_by(TOKENIZER, lambda value, target: change(value))


def adapter_named(**changes: Any) -> Make:
    return edit(ADAPTER, **changes)


def base(of: str) -> Make:
    """An adapter whose base is another place."""

    def make(target: Target) -> None:
        elsewhere = target.folder.parent / f"base-of-{target.folder.name}"
        if of == "pickle":
            elsewhere.mkdir()
            policy = json.loads((target.folder / ADAPTER).read_text())["base_model_name_or_path"]
            for path in Path(policy).iterdir():
                if path.name != WEIGHTS:
                    (elsewhere / path.name).write_bytes(path.read_bytes())
            (elsewhere / "pytorch_model.bin").write_bytes(pickled(target))
        place = {"pickle": str(elsewhere), "itself": str(target.folder)}.get(of, of)
        edit(ADAPTER, base_model_name_or_path=place)(target)

    return make


def sparse(name: str, length: int) -> Make:
    """A header of so many blanks, which cost the attacker nothing."""

    def make(target: Target) -> None:
        path: Path = target.folder / name
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length))
        os.truncate(path, length + 8)

    return make


MODELS: dict[str, Make] = {
    "pickle as pytorch_model.bin": instead("pytorch_model.bin", pickled),
    "pickle as model.pt": instead("model.pt", pickled),
    "pickle as model.safetensors": instead(WEIGHTS, pickled),
    "pickle of protocol 0 as model.safetensors": instead(WEIGHTS, lambda target: pickled(target, 0)),
    "torch.save as model.safetensors": instead(WEIGHTS, zipped),
    "zip with names above as model.safetensors": instead(WEIGHTS, lambda t: zipped(t, **{t.canary.name: b""})),
    "tar with names above as model.safetensors": instead(WEIGHTS, tar),
    "NumPy objects as model.safetensors": instead(WEIGHTS, numpy_pickle),
    "GGUF as model.safetensors": instead(WEIGHTS, lambda target: b"GGUF\x03\0\0\0" + b"\xff" * 64),
    "auto_map of an unknown type": remote("evil"),
    "kernel in _attn_implementation_internal": edit(CONFIG, _attn_implementation_internal="evil/kernel"),
    "kernel in a group of settings": edit(CONFIG, text_config={"attn_implementation": "evil/kernel@main:run"}),
    "kernel in _experts_implementation": edit(CONFIG, _experts_implementation="../evil.py"),
    "header of 2^64-1 bytes": header_length(2**64 - 1),
    "header longer than the file": header_length(1 << 20),
    "header of 0 bytes": header_length(0),
    "header of 64 MB of nothing": sparse(WEIGHTS, 64 << 20),
    "header of 100,000 tensors": header(bomb),
    "header of 100,000 levels": header(deep),
    "header with a tensor twice": header(twice),
    "overlapping tensors": header(overlap),
    "gap between tensors": header(gap),
    "tensor beyond the file": header(beyond),
    "shape of 2^66": header(overflow),
    "negative shape": header(negative),
    "config with a key twice": text_edit(CONFIG, lambda text: text.rstrip()[:-1] + ', "model_type": "gpt2"}'),
    "config of 100,000 levels": write(CONFIG, lambda target: b'{"a":' * 100_000),
    "config of 5 MB": edit(CONFIG, note="a" * (5 << 20)),
    "a billion layers": edit(CONFIG, num_hidden_layers=10**9),
    "a billion labels": edit(CONFIG, num_labels=10**9),
    "a trillion words": edit(CONFIG, vocab_size=10**12),
    "config as a link to a system file": linked(CONFIG, "/etc/passwd"),
    "weights as a link": linked(WEIGHTS),
    "config as a pipe": fifo(CONFIG),
    "weights as a pipe": fifo(WEIGHTS),
    "index to a file above": indexed("../policy/model.safetensors"),
    "index to an absolute path": indexed("{outside}"),
    "index to a pickle": indexed("pytorch_model.bin"),
}
IGNORED: dict[str, Make] = {
    "auto_map of a known type": both(
        code("evil.py"), edit(CONFIG, auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"})
    ),
    "pickle beside the weights": write("pytorch_model.bin", pickled),
    "code beside the weights": code("modeling_llama.py"),
}
"""Good models with something evil that nobody is to look at: they load, and the payload stays where it is."""
GLOBALS = "__init__.__globals__['os'].system"
TOKENIZERS: dict[str, Make] = {
    "template: classes": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: globals": template(lambda target: "{{ cycler." + GLOBALS + f"('{target.command}') }}}}"),
    "template: filter attr": template(
        lambda target: "{{ (cycler|attr('__init__')|attr('__globals__'))['os'].system('" + target.command + "') }}"
    ),
    "template: format string": template("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"),
    "template: a loop of years": template(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "template: 100 MB": template("{% for m in messages %}{{ m.content * 100000000 }}{% endfor %}"),
    "template: a power": template("{{ 10 ** (messages | length * 10 ** 9) }}"),
    "template: endless macro": template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "template: a width": template("{{ '%9999999999d' % 1 }}"),
    "template of 2 MB": template("{# " + "a" * (2 << 20) + " #}"),
    "tokenizer_file elsewhere": edit(TOKENIZER_CONFIG, tokenizer_file="/etc/passwd"),
    "tokenizer code": both(
        code("evil.py"),
        edit(
            TOKENIZER_CONFIG, tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]}
        ),
    ),
    "token 2^40": vocabulary(lambda value: value["model"]["vocab"].update({"w2": 2**40})),
    "token -1": vocabulary(lambda value: value["model"]["vocab"].update({"w2": -1})),
    "added token 2^31": vocabulary(lambda value: value["added_tokens"][0].update({"id": 2**31})),
    "token 1e400": text_edit(TOKENIZER, lambda text: text.replace('"w2": 2', '"w2": 1e400')),
    "padding to 2^40": vocabulary(
        lambda value: value.update(
            padding={
                "strategy": {"Fixed": 2**40},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        )
    ),
    "tokenizer with a key twice": text_edit(TOKENIZER, lambda text: text.rstrip()[:-1] + ', "model": {}}'),
    "tokenizer of another form": write(TOKENIZER, lambda target: b'{"model": {"type": "Evil"}}'),
    "tokenizer as a link": linked(TOKENIZER),
}
ADAPTERS: dict[str, Make] = {
    "adapter as a pickle": both(
        lambda target: (target.folder / ADAPTER_WEIGHTS).unlink(), write("adapter_model.bin", pickled)
    ),
    "adapter with a pattern for ever": adapter_named(target_modules="(([a-z._0-9]+)+)+!"),
    "adapter that imports": both(code("evil.py"), adapter_named(megatron_config={"a": 1}, megatron_core="evil")),
    "adapter of rank 10^9": adapter_named(r=10**9),
    "adapter of another kind": adapter_named(peft_type="PROMPT_TUNING"),
    "adapter on a pickle": base("pickle"),
    "adapter on itself": base("itself"),
    "adapter on a system folder": base("/etc"),
    "adapter on an address": base("https://127.0.0.1:9/evil"),
    "adapter with overlapping tensors": header(overlap, name=ADAPTER_WEIGHTS),
}
