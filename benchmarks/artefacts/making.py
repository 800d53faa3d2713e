"""What artefacts are made of: payloads that would leave a canary file, and edits of the files of a good folder."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG, TOKENIZER, TOKENIZER_CONFIG = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
TEMPLATE, ADAPTER, ADAPTER_WEIGHTS = "chat_template.jinja", "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Target:
    """A copy of a good folder, to be made hostile, and the file that a payload would write."""

    folder: Path
    canary: Path
    good: Path
    """The folder that was copied."""

    @property
    def command(self) -> str:
        return f"touch {self.canary}"

    @property
    def code(self) -> str:
        """Python that leaves the canary as it is imported."""
        return f"open({str(self.canary)!r}, 'w').close()\n"


Make = Callable[[Target], Any]


class Payload:
    """Its pickle runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def pickled(target: Target, protocol: int = 4) -> bytes:
    return pickle.dumps({"weight": Payload(target.command)}, protocol=protocol)


def zipped(target: Target, **names: bytes) -> bytes:
    """As torch.save writes: a zip archive with a pickle in it; a name may lead out of the folder."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(target))
        archive.writestr("archive/version", "3")
        for name, content in names.items():
            archive.writestr(f"../../{name}", content)
    return made.getvalue()


def write(name: str, content: Callable[[Target], bytes]) -> Make:
    """The file with that content; what stood there is gone, were it a link."""

    def make(target: Target) -> None:
        path = target.folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content(target))

    return make


def instead(name: str, content: Callable[[Target], bytes]) -> Make:
    """The file instead of all weights."""

    def make(target: Target) -> None:
        for path in target.folder.glob("*.safetensors"):
            path.unlink()
        write(name, content)(target)

    return make


def edit(name: str, **changes: Any) -> Make:
    """A JSON file with other values."""

    def make(target: Target) -> None:
        path = target.folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return make


def edit_by(name: str, change: Callable[[Any, Target], Any]) -> Make:
    def make(target: Target) -> None:
        path = target.folder / name
        value = json.loads(path.read_text())
        change(value, target)
        path.write_text(json.dumps(value))

    return make


def text_edit(name: str, change: Callable[[str], str]) -> Make:
    def make(target: Target) -> None:
        path = target.folder / name
        path.write_text(change(path.read_text()))

    return make


def both(*makes: Make) -> Make:
    def make(target: Target) -> None:
        for one in makes:
            one(target)

    return make


def linked(name: str, to: str | None = None) -> Make:
    """A link to a file outside instead of the file: to a copy of it, or to what `to` names."""

    def make(target: Target) -> None:
        path = target.folder / name
        outside = target.folder.parent / f"outside-{target.folder.name}-{path.name}"
        path.rename(outside)
        path.symlink_to(to or outside)

    return make


def fifo(name: str) -> Make:
    """A pipe instead of the file: who opens it waits for ever."""

    def make(target: Target) -> None:
        (target.folder / name).unlink()
        os.mkfifo(target.folder / name)

    return make


def header(change: Callable[[dict[str, Any]], Any], *, name: str = WEIGHTS) -> Make:
    """A safetensors file with another header over the same bytes."""

    def make(target: Target) -> None:
        path = target.folder / name
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + length])
        made = change(table)
        text = made if isinstance(made, bytes) else json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return make


def header_length(number: int, *, name: str = WEIGHTS) -> Make:
    def make(target: Target) -> None:
        path = target.folder / name
        path.write_bytes(struct.pack("<Q", number) + path.read_bytes()[8:])

    return make


def tensors(table: dict[str, Any]) -> list[str]:
    return sorted((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"])


def template(text: str | Callable[[Target], str]) -> Make:
    return write(TEMPLATE, lambda target: (text if isinstance(text, str) else text(target)).encode())
