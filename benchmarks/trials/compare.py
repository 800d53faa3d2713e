"""Whether two run folders hold the same bytes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

LOGS = ("metrics.jsonl", "samples.jsonl", "findings.jsonl", "best.json")
CLOCK = "clock.json"
"""What a checkpoint knows of time and machine, and nothing that decides the future."""


def digests(run: Path, *, last_only: bool = False) -> dict[str, str]:
    """sha256 of every log and of every file of the checkpoints that stayed, or of the last of them alone."""
    kept = run / "checkpoints"
    folders = sorted(path for path in kept.iterdir() if path.is_dir()) if kept.is_dir() else []
    files = [path for folder in (folders[-1:] if last_only else folders) for path in folder.rglob("*")]
    files += [run / name for name in LOGS]
    compared = (path for path in sorted(files) if path.is_file() and path.name != CLOCK)
    return {str(path.relative_to(run)): sha256(path) for path in compared}


def sha256(path: Path) -> str:
    """Of a file; of a manifest without what it says of the one file that tells the time."""
    if path.name == "manifest.json":
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        files.pop(f"state/{CLOCK}", None)
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Files that differ or that one side lacks."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
