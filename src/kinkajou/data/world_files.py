"""The toy world as data files, in the formats that any data set may come in."""

import json
from pathlib import Path

from kinkajou.data.world import Row, demonstrations, preference_pairs, prompts


def as_messages(row: Row) -> Row:
    """Answers as messages, which can say that they were cut off; a prompt row stays as it is."""
    if "output" in row:
        asked = {"role": "user", "content": row["instruction"]}
        said = {"role": "assistant", "content": row["output"], "ended": row["ended"]}
        return {"messages": [asked, said], **without(row, "instruction", "output", "ended")}
    if "chosen" not in row:
        return row
    sides = {
        side: [{"role": "assistant", "content": row[side], "ended": row[f"{side}_ended"]}]
        for side in ("chosen", "rejected")
    }
    return without(row, "chosen_ended", "rejected_ended") | sides


def without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def write_world(
    folder: Path,
    *,
    seed: int = 0,
    num_demonstrations: int = 12_000,
    num_pairs: int = 6_000,
    num_test_pairs: int = 600,
    num_prompts: int = 2_000,
    num_validation_prompts: int = 200,
    num_test_prompts: int = 300,
    flawed: float = 0.5,
) -> dict[str, Path]:
    """Write the six data sets as `<name>.jsonl` into the folder; the paths by name."""
    data_sets = {
        "demonstrations": demonstrations(num_demonstrations, seed=seed, flawed=flawed),
        "pairs_train": preference_pairs(num_pairs, seed=seed),
        "pairs_test": preference_pairs(num_test_pairs, seed=seed, split="test"),
        "prompts_train": prompts(num_prompts, seed=seed, split="train"),
        "prompts_validation": prompts(num_validation_prompts, seed=seed, split="validation"),
        "prompts_test": prompts(num_test_prompts, seed=seed, split="test"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in data_sets.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text(
            "".join(json.dumps(as_messages(row)) + "\n" for row in rows), encoding="ascii", newline="\n"
        )
    return paths
