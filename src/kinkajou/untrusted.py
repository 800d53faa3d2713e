"""Model folders from strangers: what is refused before a library opens it.

Lengths, numbers and paths are bounded here, so that no file can name another, ask for more memory than it has bytes,
or begin something else than weights.  Nothing in this module reads a pickle, imports what a file names or follows a
link out of the folder.
"""

import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from kinkajou.data.strict_json import JSONFault, parse
from kinkajou.errors import UserError

MB = 1 << 20
CONFIG_BYTES, INDEX_BYTES, TOKENIZER_BYTES, TEMPLATE_BYTES = 4 * MB, 32 * MB, 256 * MB, MB
HEADER_BYTES, MAX_TENSORS, MAX_AXES = 8 * MB, 50_000, 16
MAX_TOKEN, MAX_PADDING = 10_000_000, 1_000_000
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz")
OTHER_FORMS = {b"PK": "a zip archive", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle"}
OTHER_FORMS |= {
    b"\x1f\x8b": "a gzip archive",
    b"\x93N": "a NumPy file",
    b"GG": "a GGUF file",
    b"ve": "a git LFS pointer",
}
LARGEST = {
    r"(num_(hidden_|decoder_|encoder_)?|n_|^)layers?$": 2_000,
    r"hidden_size|n_embd|intermediate_size|ffn_dim|head_dim|n_inner|heads|n_head|embed_proj_dim|experts$": 1_000_000,
    r"vocab_size|num_labels": MAX_TOKEN,
    r"position_embeddings|n_positions|n_ctx": 100_000_000,
}
"""Settings of a model by the end of their names, and what no model of these years comes near to."""
ADVICE = "take the folder from whom you trust; a folder that `save_pretrained` wrote passes"


def refused(path: Path, what: str, fix: str = ADVICE) -> UserError:
    return UserError(f"{path} is not read: {what}", fix=fix)


def check_settings(source: str) -> None:
    """Of a model's folder all that is read before its weights; a hub id has nothing to check here."""
    folder = Path(source)
    if not folder.is_dir():
        return
    check_links(folder)
    for name in ("config.json", "generation_config.json"):
        if (path := folder / name).is_file():
            check_config(read_object(path, CONFIG_BYTES), path)


def check_weights(source: str) -> None:
    """Of a model's folder the index and every header."""
    folder = Path(source)
    if not folder.is_dir():
        return
    check_links(folder)
    files = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for form in PICKLES for path in folder.glob(form))
    if (index := folder / "model.safetensors.index.json").is_file():
        check_index(read_object(index, INDEX_BYTES), index)
    if not files and pickled:
        raise refused(
            folder / pickled[0],
            "it may be a pickle, which runs code when it is read, and the folder has no safetensors",
            "convert it to safetensors with the program that wrote it",
        )
    for path in files:
        check_header(path)


def check_links(folder: Path) -> None:
    """Files and links to files below the folder alone; the hub's cache links to `blobs` two folders above."""
    inside = [os.path.realpath(folder)]
    if folder.resolve().parent.name == "snapshots":
        inside.append(str(folder.resolve().parents[1] / "blobs"))
    for path in folder.iterdir():
        real = os.path.realpath(path)
        if path.is_symlink() and not any(real.startswith(f"{place}{os.sep}") for place in inside):
            raise refused(path, "it is a link out of its folder", "put the file itself there")
        if not (path.is_dir() or path.is_file()):
            raise refused(path, "it is no file")


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object of a file; UserError for anything else, duplicate keys and NaN included."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise refused(path, "it is no file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise refused(path, f"it is longer than {limit:,} bytes")
    try:
        value = parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise refused(path, "it is not UTF-8") from None
    except JSONFault as fault:
        raise refused(path, fault.problem) from None
    if not isinstance(value, dict):
        raise refused(path, "it holds no JSON object")
    return value


def settings_in(value: object) -> Iterator[tuple[str, object]]:
    """Names and values on all levels."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def check_config(config: Mapping[str, Any], path: Path) -> None:
    for name, value in settings_in(config):
        if "_implementation" in name and isinstance(value, str) and not re.fullmatch(r"\w+", value):
            raise refused(path, f"{name} is {value[:60]!r}, which names code to fetch")
        if isinstance(value, bool):
            if re.fullmatch(r"(num|n)_\w+|(?!use_|is_)\w+_(size|dim|positions|heads|layers)|max_\w+", name):
                raise refused(path, f"{name} is {str(value).lower()}; it must be a number")
        elif isinstance(value, int):
            for ending, largest in LARGEST.items():
                if value > largest and re.search(f"(?:{ending})$", name):
                    raise refused(path, f"{name} is {value:,}; the largest that is read is {largest:,}")


def check_index(index: Mapping[str, Any], path: Path) -> None:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise refused(path, "its weight_map does not give a file for each weight")
    for name in sorted(set(places.values())):
        if not re.fullmatch(r"[\w.+-]+\.safetensors", name) or ".." in name:
            raise refused(path, f"it names {name[:60]!r}, which is no safetensors file of its folder")
        if not (path.parent / name).is_file():
            raise refused(path, f"{name} is missing", "fetch the folder again")


def check_header(path: Path) -> None:
    """A safetensors file whose header is bounded and describes exactly the bytes that follow."""
    if not path.is_file():
        raise refused(path, "it is not a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if (form := OTHER_FORMS.get(begin[:2])) and not 8 + length <= min(size, HEADER_BYTES):
            raise refused(path, f"it is {form}, not safetensors")
        if not 2 <= length <= size - 8:
            raise refused(path, f"its header would have {length:,} bytes, the file has {size:,}")
        if length > HEADER_BYTES:
            raise refused(path, f"its header has {length:,} bytes; {HEADER_BYTES:,} are read at most")
        text = file.read(length)
    if text.count(b'"dtype"') > MAX_TENSORS:
        raise refused(path, f"its header has more than {MAX_TENSORS:,} tensors")
    try:
        header = parse(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise refused(path, "its header is not UTF-8") from None
    except JSONFault as fault:
        raise refused(path, f"its header: {fault.problem}") from None
    if told := wrong_tensors(header, size - 8 - length):
        raise refused(path, told)


def wrong_tensors(header: Any, room: int) -> str:
    """What is wrong with a header over so many bytes of data; empty where nothing is."""
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        return f"its header is no table of at most {MAX_TENSORS:,} tensors"
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(word, str) for word in notes.values()):
        return "its metadata are not words"
    parts: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            return f"{name[:60]!r} is not described by dtype, shape and data_offsets"
        shape, offsets, bits = entry["shape"], entry["data_offsets"], BITS.get(str(entry["dtype"]))
        if bits is None:
            return f"{name[:60]!r} has an unknown dtype"
        if not is_sizes(shape) or len(shape) > MAX_AXES or not is_sizes(offsets) or len(offsets) != 2:
            return f"shape or offsets of {name[:60]!r} are no sizes"
        for length in shape:
            bits *= length
        if bits % 8 or offsets[1] - offsets[0] != bits // 8:
            return f"{name[:60]!r} has other bytes than its shape"
        parts.append((offsets[0], offsets[1], name))
    done = 0
    for begin, end, name in sorted(parts):
        if begin != done:
            return f"{name[:60]!r} {'overlaps another tensor' if begin < done else 'leaves a gap before it'}"
        done = end
    return "" if done == room else f"its tensors have {done:,} bytes, {room:,} follow the header"


def is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 48 for x in value)


def check_adapter(folder: Path) -> dict[str, Any]:
    """The settings of an adapter's folder; its weights too are checked, where it has any."""
    check_links(folder)
    path = folder / "adapter_config.json"
    config = read_object(path, CONFIG_BYTES)
    if config.get("peft_type") not in ("LORA", None):
        raise refused(path, f"its peft_type is {str(config['peft_type'])[:60]!r}, not LORA")
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        raise refused(path, "megatron_core names a module to import")
    for name in (
        "target_modules",
        "modules_to_save",
        "exclude_modules",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    ):
        # PEFT reads a text, and the keys of patterns, as regular expressions; one can be made to run for ever.
        value = config.get(name)
        words = [value] if isinstance(value, str) else list(value) if isinstance(value, list | dict) else []
        if not all(isinstance(word, str) and re.fullmatch(r"[\w.-]{1,200}", word) for word in words):
            raise refused(path, f"{name} are not plain names of modules", "write the names out as a list")
    rank = config.get("r", 8)
    if type(rank) is not int or not 0 < rank <= 65_536:
        raise refused(path, f"its rank r is {str(rank)[:60]}")
    if (weights := folder / "adapter_model.safetensors").is_file():
        check_header(weights)
    elif (pickled := folder / "adapter_model.bin").exists():
        raise refused(pickled, "it may be a pickle, which runs code when it is read", "convert it to safetensors")
    return config


def check_tokenizer(source: str) -> None:
    """Of a tokenizer's folder the lengths, numbers and paths; its reader also makes the settings of the model."""
    folder = Path(source)
    if not folder.is_dir():
        return
    check_settings(source)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path := folder / name).is_file():
            check_tokenizer_config(read_object(path, 4 * CONFIG_BYTES), path)
    for path in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*")):
        if path.stat().st_size > TEMPLATE_BYTES:
            raise refused(path, f"it is longer than {TEMPLATE_BYTES:,} bytes")
    if (path := folder / "tokenizer.json").is_file():
        found = path.stat()
        if told := wrong_vocabulary(path, found.st_mtime_ns, found.st_size):
            raise refused(path, told)


def check_tokenizer_config(config: Mapping[str, Any], path: Path) -> None:
    home = os.path.realpath(path.parent)
    for name, value in config.items():
        if name.endswith("_file") and isinstance(value, str):
            target = os.path.realpath(path.parent / value)
            if not target.startswith(f"{home}{os.sep}"):
                raise refused(path, f"{name} is {value[:60]!r}, outside of its folder", f"take {name} out of it")
        if name == "added_tokens_decoder" and isinstance(value, dict):
            for number in value:
                if not re.fullmatch(r"[0-9]{1,8}", str(number)):
                    raise refused(path, f"the token {str(number)[:60]!r} in added_tokens_decoder has no number")


@lru_cache(maxsize=16)
def wrong_vocabulary(path: Path, changed_ns: int, size: int) -> str:
    """What is wrong with a tokenizer.json; it is read once for each state of the file, for some have 30 MB."""
    value = read_object(path, TOKENIZER_BYTES)
    model = value.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    numbers = list(words.values()) if isinstance(words, dict) else []
    added = value.get("added_tokens")
    if isinstance(added, list):
        numbers += [entry.get("id") if isinstance(entry, dict) else None for entry in added]
    worst = next((x for x in numbers if type(x) is not int or not 0 <= x < MAX_TOKEN), 0)
    if worst != 0:
        return f"a token has the number {str(worst)[:60]}; it must be a whole number below {MAX_TOKEN:,}"
    padding = value.get("padding")
    fixed = padding.get("strategy") if isinstance(padding, dict) else None
    length = fixed.get("Fixed") if isinstance(fixed, dict) else 0
    if type(length) is not int or length > MAX_PADDING:
        return f"it pads every text to {str(length)[:60]} tokens"
    return ""
