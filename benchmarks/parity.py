"""`python -m benchmarks.parity`: our losses, advantages and gradients against TRL's, OpenRLHF's and verl's.

TRL's own code runs in processes of its own (`python -m benchmarks.peers install` fetches it); the formulas of the
others are retyped in float64. Exit code 1 if any row lies beyond its bound.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import against_retyped, cases, ours, peers, rollouts
from benchmarks.models import write_models
from benchmarks.table import PASS, Row, as_json, difference, markdown, shown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"
INTRODUCTION = """
Value and gradient: largest difference from the reference over the reference's largest entry, both sides in float32
(retyped formulas in float64). A PPO policy loss, whose terms cancel, is measured against their mean size. The TRL rows
run TRL's own methods, the PPO rows its whole `train`, watched from outside: two rounds of settings, 16 prompts, 4
minibatches each. *Same tensors*: we start from TRL's log-probabilities, values and scores. *From tokens*: each side
runs its own models, packed here and padded there; the gradient is of every weight, and how far TRL's own float32
gradient lies from float64 stands beside it.
"""


def loss_rows(folder: Path) -> list[Row]:
    """Every loss that TRL 1.16 has and we have, on the same tensors."""
    listed = [dataclasses.asdict(case) | {"tensors": case.tensors, "leaf": case.leaf} for case in cases.LOSSES]
    (folder / "losses.json").write_text(json.dumps(listed))
    tensors = cases.tensors()
    flat = {f"{group}/{key}": x.contiguous() for group, part in tensors.items() for key, x in part.items()}
    save_file(flat, folder / "losses.safetensors")
    peers.run("trl-1.16", "trl_losses.py", folder)
    found, rows = load_file(folder / "losses-found.safetensors"), []
    for number, case in enumerate(cases.LOSSES):
        value, gradient = ours.differentiated(case, tensors[case.tensors])
        gaps = difference(value, found[f"{number}/value"]), difference(gradient, found[f"{number}/grad"])
        is_policy = case.tensors == "policy"
        told = shown({"dialect": "trl-1.12"} | case.ours if is_policy else case.ours)
        group = "policy loss" if is_policy else "preference"
        rows.append(Row(group, case.name, told, f"TRL 1.16.0, {case.trainer}", *gaps))
    return rows


def all_rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        return [
            *loss_rows(folder),
            *rollouts.group_rows(folder),
            *rollouts.ppo_rows(folder),
            *against_retyped.rows(),
        ]


def inserted(text: str, table: str) -> str:
    """The page with the table between its parity markers."""
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        raise ValueError(f"{PAGE} has no line {BEGIN}")
    return f"{before}{BEGIN}\n{INTRODUCTION}\n{table}{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    chosen = parser.parse_args()
    missing = [name for name in peers.VERSIONS if not peers.installed(name)]
    if missing:
        parser.error(f"{', '.join(missing)} not there; fetch it once: python -m benchmarks.peers install")
    torch.set_num_threads(1)
    rows = all_rows()
    if chosen.json:
        chosen.json.write_text(json.dumps(as_json(rows), indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))
    if chosen.write:
        PAGE.write_text(inserted(PAGE.read_text(encoding="utf-8"), markdown(rows)), encoding="utf-8")
    failed = [row for row in rows if row.verdict != PASS]
    print(f"{len(rows)} rows, {len(failed)} beyond their bound", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
