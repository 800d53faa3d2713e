"""Weights of the old system (`torch.save(model.state_dict())`) as Hugging Face folders; see README.md.

`python coati_weights.py FILE --pretrain MODEL --out FOLDER` converts one; the other scripts do so by themselves where
a flag names such a file, and keep the folder beside it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coati_flags as coati

from kinkajou.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

READER = Path(__file__).with_name("coati_pickle.py")
STAMP = "converted.json"
BASES = {
    "--rm_path": "--rm_pretrain MODEL",
    "--model_path": "--pretrain MODEL",
    "--pretrain": "python coati_weights.py FILE --pretrain MODEL --out FOLDER, and then --pretrain FOLDER",
    "--rm_pretrain": "the model that --rm_path was trained from goes there, a folder or hub id",
}
"""How a script is told what a file's weights are of."""
READ_S, WAIT_S, POLL_S = 3600.0, 3700.0, 0.2
WRAPPERS = ("", "model.", "module.model.", "module.")
"""What the old classes put before the names of transformers."""
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|\.position_ids$")
"""Constants that transformers kept among the weights at that time."""
LORA = re.compile(r"^(.*)\.lora_([AB])$")
HEAD = "value_head."


def is_old(path: Path) -> bool:
    """A file of weights, or a folder whose weights lie in pickles (as the old SFT script left them)."""
    return path.is_file() or bool(path.is_dir() and old_files(path) and not any(path.glob("*.safetensors")))


def old_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("pytorch_model*.bin"))


def converted(flag: str, source: str, pretrain: str | None) -> str:
    """The folder beside an old file, made by the first process of each machine; the others wait for it."""
    path = Path(source)
    base = source if path.is_dir() else pretrain
    if not base:
        raise UserError(
            f"{flag} {source} holds weights alone",
            evidence="a .pt file says nothing of the architecture and the tokenizer",
            fix=f"say what it was trained from: {BASES[flag]}",
        )
    target = path.with_name(f"{path.name}.converted")
    stamp = stamp_of(path, base)
    if known(target) == stamp:
        return str(target)
    if target.exists() and known(target) is None:
        raise UserError(f"{target} is in the way", evidence="it should hold what becomes of the weights", fix="move it")
    if int(os.environ.get("LOCAL_RANK", "0")):
        await_folder(target, stamp)
    else:
        coati.say(f"{flag}: {source} is converted into {target} (weights only)")
        convert(path, base, target, stamp)
    return str(target)


def stamp_of(path: Path, base: str) -> dict[str, Any]:
    """By what a folder is recognised as the one made from these files."""
    files = [(file, file.stat()) for file in old_files(path)]
    return {"base": base, "files": [[file.name, found.st_size, found.st_mtime_ns] for file, found in files]}


def known(target: Path) -> dict[str, Any] | None:
    file = target / STAMP
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def await_folder(target: Path, stamp: Mapping[str, Any]) -> None:
    end = time.monotonic() + WAIT_S
    while known(target) != stamp:
        if time.monotonic() > end:
            raise UserError(f"{target} did not appear", fix="see what the first process says")
        time.sleep(POLL_S)


def convert(path: Path, base: str, target: Path, stamp: Mapping[str, Any]) -> None:
    """Written aside and renamed: the folder is whole or not there."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as fault:
        raise UserError(
            f"no folder can be made in {target.parent}",
            evidence=str(fault),
            fix=f"python {Path(__file__).name} {path} --pretrain {base} --out FOLDER, then give FOLDER",
        ) from None
    try:
        weights: dict[str, Tensor] = {}
        for file in old_files(path):
            weights |= read_apart(file)
        write_folder(str(path), weights, base, aside)
        (aside / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        if known(target) != stamp:  # another machine on the same file system may have been first
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_apart(file: Path) -> "dict[str, Tensor]":
    """The tensors of a pickle, by a process that can do nothing else."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(dir=file.parent if os.access(file.parent, os.W_OK) else None) as folder:
        command = [sys.executable, "-I", str(READER), str(file.absolute()), folder]
        env = {"PATH": os.defpath, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=READ_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"{file} could not be read within {READ_S:g} s") from None
        if done.returncode == 2:
            raise UserError(
                f"{file} is refused",
                evidence=done.stderr.strip()[:400],
                fix="take a file that torch.save(model.state_dict()) wrote, from somebody you trust",
            )
        if done.returncode:
            raise UserError(f"the reader of {file} ended with {done.returncode}", evidence=done.stderr.strip()[-400:])
        return {name: x for part in sorted(Path(folder).iterdir()) for name, x in load_file(part).items()}


# --- from the old names to those of transformers ----------------------------------------------------------


def merged(weights: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """W + B A / r for each adapted W: the old LoRA had alpha 1 (Hu 2021, eq. 3)."""
    found = {name: x for name, x in weights.items() if not LORA.match(name)}
    for name, a in weights.items():
        adapted = LORA.match(name)
        if adapted is None or adapted[2] != "A":
            continue
        stem = adapted[1]
        w, b = found.get(f"{stem}.weight"), weights.get(f"{stem}.lora_B")
        if w is None or b is None or (b.shape[0], a.shape[1], b.shape[1]) != (*w.shape, a.shape[0]):
            raise UserError(f"the LoRA weights of {stem!r} do not fit together")
        found[f"{stem}.weight"] = w.float() + b.float() @ a.float() / a.shape[0]
    return found


def named(
    weights: "Mapping[str, Tensor]", wanted: Mapping[str, Any], *, prefix: str, source: str
) -> "dict[str, Tensor]":
    """By transformers' names: that wrapper is taken off under which most names are known."""
    own = {name: x for name, x in weights.items() if HEAD not in name}

    def under(wrapper: str) -> dict[str, str]:
        plain = {name: name.removeprefix(wrapper) for name in own if name.startswith(wrapper)}
        return {old: new for old, name in plain.items() for new in (name, f"{prefix}.{name}") if new in wanted}

    names = max((under(wrapper) for wrapper in WRAPPERS), key=len)
    strange = [name for name in own if name not in names and not BUFFERS.search(name)]
    if strange or not names:
        raise UserError(
            f"{source} has weights of another model than the one it is said to be trained from",
            evidence=", ".join(sorted(strange)[:4]),
            fix="give the model that it was trained from",
        )
    return {new: own[old] for old, new in names.items()}


def fit_vocabulary(settings: Any, weights: "Mapping[str, Tensor]") -> None:
    """The old scripts grew the embedding by a pad token, which the settings of the first model do not know."""
    for name, x in weights.items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")):
            settings.vocab_size = x.shape[0]


def settle_head(settings: Any, found: "dict[str, Tensor]") -> None:
    """An output embedding that LoRA has moved away from the input's is a weight of its own; else it is stored once."""
    import torch

    head = found.get("lm_head.weight")
    if head is None or not settings.tie_word_embeddings:
        return
    ends = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    embedding = next(x for name, x in found.items() if name.endswith(ends))
    if torch.equal(head, embedding):
        del found["lm_head.weight"]
    else:
        settings.tie_word_embeddings = False


def check_whole(source: str, base: str, shell: Any, found: "Mapping[str, Tensor]") -> None:
    wanted = shell.state_dict()
    if shell.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [
        f"{name} has the shape {tuple(x.shape)}, not {tuple(wanted[name].shape)}"
        for name, x in found.items()
        if x.shape != wanted[name].shape
    ]
    if faults:
        raise UserError(
            f"{source} does not fit the model it is said to be trained from",
            evidence=f"{base} is a {shell.config.model_type} model; {'; '.join(faults[:3])}",
            fix="give the model that it was trained from",
        )


def tell(source: str, weights: "Mapping[str, Tensor]", bias: "Tensor | None") -> None:
    """What is not the same as then."""
    if any(LORA.match(name) for name in weights):
        coati.say(f"note: the LoRA adapters in {source} are folded into its weights")
    if any(HEAD in name for name in weights):
        coati.say(f"note: the old score of {source} was a mean over the text's tokens, here it is the last token's")
    if bias is not None and bias.any():
        coati.say(f"note: its bias {bias.item():.4g} is left out: it is the same for every answer")


def write_folder(source: str, weights: "Mapping[str, Tensor]", base: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from kinkajou.data.tokenizer import load_tokenizer
    from kinkajou.models.folder import SHARD
    from kinkajou.models.load import find_model, read_settings

    whole = merged(weights)
    heads = {name.rpartition(HEAD)[2]: x for name, x in whole.items() if HEAD in name}
    tell(source, weights, heads.get("bias"))
    settings: Any = read_settings(find_model(base))
    kind: Any = AutoModelForSequenceClassification if heads else AutoModelForCausalLM
    if heads:
        settings.num_labels = 1
    fit_vocabulary(settings, whole)
    with torch.device("meta"):
        shell = kind.from_config(settings)
    found = named(whole, shell.state_dict(), prefix=shell.base_model_prefix, source=source)
    if heads:
        found["score.weight"] = heads["weight"].reshape(1, -1)
    settle_head(shell.config, found)
    check_whole(source, base, shell, found)
    if len({x.dtype for x in found.values()}) > 1 or len(whole) < len(weights):
        found = {name: x.float() for name, x in found.items()}  # half precision would swallow what LoRA has added
    tokenizer = load_tokenizer(find_model(base))[0]
    shell.config.pad_token_id = tokenizer.pad_token_id
    shell.to(next(iter(found.values())).dtype).save_pretrained(str(folder), state_dict=found, max_shard_size=SHARD)
    tokenizer.save_pretrained(str(folder))


def flags() -> coati.Flags:
    found = coati.Flags("coati_weights.py", "Old weights (.pt, or a folder of .bin) as a Hugging Face folder.")
    found.add_argument("file", help="what torch.save(model.state_dict()) wrote")
    found.add_argument("--pretrain", help="folder or hub id of the model that it was trained from")
    found.add_argument("--out", help="the folder to write")
    return found


def work(given: Namespace) -> None:
    path, target = Path(given.file), Path(coati.need(given, "out", "the folder to write"))
    base = given.file if path.is_dir() else coati.need(given, "pretrain", "the model that it was trained from")
    if not is_old(path):
        raise UserError(f"{path} holds no old weights", fix="give a .pt file, or a folder of pytorch_model*.bin")
    if target.exists():
        raise UserError(f"{target} exists", fix="choose another --out")
    convert(path, base, target, stamp_of(path, base))
    print(f"model: {target}")


def main(arguments: Sequence[str] | None = None) -> int:
    return coati.guarded(flags(), {}, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
