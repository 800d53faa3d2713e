"""Small files that a run writes again and again: whatever ends, the old text is there or the new one."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
