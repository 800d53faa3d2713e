"""What the GPU benchmark says: a line for each row as it ends, and docs/gpu.md."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_peers import CONTINUOUS, DYNAMIC, STATIC

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
UNMEASURED = "unmeasured: no GPU was lent"
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Aim:
    """A figure of a row that must reach `least`: a path of keys into the row."""

    work: str
    row: str
    path: tuple[str, ...]
    least: float
    percent: bool = False

    def shown(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.2f}x"


AIMS = (
    Aim("SFT, 1B shape, bf16: model FLOP utilisation", "sft-1b", ("mfu",), 0.45, True),
    Aim("SFT, 7B shape, bf16: model FLOP utilisation", "sft-7b", ("mfu",), 0.45, True),
    Aim("rollouts 64 x 256, against `generate` with a dynamic cache", "rollouts-fixed", ("ratios", DYNAMIC), 5.0),
    Aim("the same, against `generate` with a static cache, compiled", "rollouts-fixed", ("ratios", STATIC), 1.0),
    Aim("the same, against `generate_batch`", "rollouts-fixed", ("ratios", CONTINUOUS), 1.0),
    Aim("rollouts of varying lengths, against a dynamic cache", "rollouts-varying", ("ratios", DYNAMIC), 8.0),
    Aim("the same, against `generate_batch`", "rollouts-varying", ("ratios", CONTINUOUS), 1.0),
    Aim("decoding, 1B shape, batch 64: share of the bandwidth limit", "decode-1b", ("bandwidth_share",), 0.6, True),
    Aim("decoding, 7B shape, batch 64: share of the bandwidth limit", "decode-7b", ("bandwidth_share",), 0.6, True),
    Aim("SFT against TRL, packed", "trl-sft", ("ratios", "TRL, packed"), 1.0),
    Aim("GRPO iteration against TRL with `generate`", "trl-grpo", ("ratios", "TRL"), 3.0),
    Aim("PPO iteration against TRL 1.12.0", "trl-ppo", ("ratios", "TRL"), 3.0),
)


def value_at(row: Figures, path: tuple[str, ...]) -> float | None:
    found: Any = row
    for key in path:
        if key not in found:
            return None
        found = found[key]
    return float(found)


def wrong(check: Figures) -> list[str]:
    """Checks that failed or found a difference; what the device has not got is not among them."""
    return [name for name, seen in check.items() if "absent" not in seen and not seen.get("good", False)]


def told(name: str, row: Figures) -> str:
    """A row in words."""
    if "failed" in row:
        return f"{name}: could not be run: {row['failed']}"
    if name == "check":
        return "\n".join(f"{each}: {verdict(seen)}" for each, seen in row.items())
    if "sides" in row:
        return "\n".join(
            f"{name}, {side}: {figures_told(seen)}{ratio(row, side)}" for side, seen in row["sides"].items()
        )
    return f"{name}: {figures_told(row)}"


def verdict(seen: Figures) -> str:
    if "absent" in seen:
        return f"not looked at: {seen['absent']}"
    if "failed" in seen:
        return f"could not be run: {seen['failed']}"
    return (
        f"{'good' if seen['good'] else 'WRONG'}, {seen['figure']:.1e} (at most {seen['bound']:.0e}); {seen['detail']}"
    )


def ratio(row: Figures, side: str) -> str:
    return f", ours is {row['ratios'][side]:.2f} times as fast" if side in row["ratios"] else ""


def figures_told(row: Figures) -> str:
    if "failed" in row:
        return f"could not be run: {row['failed']}"
    forms = {
        "parameters": lambda x: f"{x / 1e9:.2f} B parameters",
        "tokens_per_s": lambda x: f"{x:,.0f} tokens/s",
        "ms_per_step": lambda x: f"{x:.2f} ms a step",
        "seconds_per_iteration": lambda x: f"{x:.2f} s an iteration",
        "mfu": lambda x: f"MFU {x:.0%}",
        "bandwidth_share": lambda x: f"{x:.0%} of the bandwidth limit",
        "mean_length": lambda x: f"{x:.0f} tokens an answer",
        "peak_gib": lambda x: f"peak {x:.1f} GiB",
    }
    parts = [form(row[key]) for key, form in forms.items() if key in row]
    if row.get("whole_shape") is False:
        parts.append(f"only {row['shape']['layers']} layers of the shape fit")
    return ", ".join(parts)


def reached(aim: Aim, rows: Figures) -> str:
    row = rows.get(aim.row)
    if row is None:
        return UNMEASURED
    if (value := value_at(row, aim.path)) is not None:
        return aim.shown(value)
    side = row.get("sides", {}).get(aim.path[-1], {})
    ours = row.get("sides", {}).get("ours", {})
    reason = row.get("failed") or side.get("failed") or ours.get("failed") or "the limit of this device is not known"
    return f"could not be run: {reason}"


def cells(text: str) -> str:
    return text.replace("|", "\\|")


def page(found: Figures) -> str:
    rows = found["rows"]
    lines = ["| work | at least | measured | command |", "| --- | ---: | --- | --- |"]
    for aim in AIMS:
        command = f"`python -m benchmarks.gpu --rows {aim.row}`"
        lines.append(f"| {aim.work} | {aim.shown(aim.least)} | {cells(reached(aim, rows))} | {command} |")
    parts = ["# One GPU", filled(ABOUT), filled(measured_on(found)), COMMANDS, "\n".join(lines), filled(METHOD)]
    details = [told(name, row) for name, row in rows.items()]
    if details:
        parts += ["## All figures", "```text\n" + "\n".join(details) + "\n```"]
    return "\n\n".join(parts) + "\n"


ABOUT = (
    "What `benchmarks/gpu.py` measures on one CUDA card with random models of LLaMA 3.2 1B's and LLaMA 2 7B's shape, "
    "in bfloat16 over float32 weights. Before the rows it checks what runs there: the engine's log-probabilities "
    "against the trainer's, fused attention against one sequence at a time, recorded decoding steps against eager "
    "ones, pages against slots, the card against the processor. Every row runs in a process of its own; one that "
    "cannot run says why and the next goes on."
)
METHOD = (
    "FLOPs are 6 for each token and weight of a layer, 6 for each target and weight of the head, and attention's "
    "products over what a token sees (no masked half), against the maker's dense bfloat16 figure. A decoding step's "
    "bytes are every weight once and every key and value of its samples, against the maker's memory bandwidth. "
    "Rates count real tokens; the first repetition, which warms up, is left out and the others' median is shown. "
    "Where the whole 7B shape does not fit beside AdamW's float32 state (18 bytes a parameter, 113 GiB), as many of "
    "its layers are taken as do."
)
COMMANDS = """    python -m benchmarks.peers install     # TRL, for its rows; needs a package index
    python -m benchmarks.gpu --out benchmarks/results/gpu.json
    python -m benchmarks.gpu --from benchmarks/results/gpu.json --write"""


def measured_on(found: Figures) -> str:
    if not found["rows"]:
        return f"{UNMEASURED.capitalize()} so far. The program's own parts are tested on a processor."
    device, shown = found["device"], ", ".join(f"{name} {x}" for name, x in found["versions"].items())
    where = f"{device['name']} ({device['memory_gib']:.0f} GiB)"
    return f"Measured {found['when'][:10]} at commit {found['commit']} on one {where}, {shown}."


def filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 118)


def write(found: Figures, path: Path = PAGE) -> None:
    path.write_text(page(found), encoding="utf-8")
