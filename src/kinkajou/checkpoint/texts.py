"""Small files that a run writes again and again: a process that ends leaves the old text or the new one."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
