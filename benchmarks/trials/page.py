"""The tables of docs/reliability.md from the figures in benchmarks/results."""

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def figures(name: str) -> dict[str, Any]:
    path = RESULTS / f"faults-{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def of_kills() -> str:
    found = figures("kills")["summary"]
    rows = [
        ["trials (a run that dies once or twice and is started again)", found["trials"]],
        ["kills -9", found["kills"]],
        *([f"of {stage}", number] for stage, number in found["by_stage"].items()),
        [
            "inside the write of a checkpoint",
            f"{found['inside_a_write']} ({found['inside_a_write'] / found['kills']:.0%})",
        ],
        ["went on from a checkpoint (the others died before the first)", found["resumed"]],
        ["runs lost", found["lost"]],
        ["ends that differ in any byte", found["different"]],
    ]
    points = [[f"`{point}`", number] for point, number in found["points"].items()]
    return table(["kills", ""], rows) + "\n" + table(["point", "kills"], points)


def of_ranks() -> str:
    found = figures("ranks")["summary"]
    rows = [
        ["trials on 2 ranks, ddp, torchrun", found["trials"]],
        ["inside the write of a checkpoint", sum(n for p, n in found["points"].items() if p.startswith("save."))],
        ["jobs lost", found["lost"]],
        ["ends that differ in any byte", found["different"]],
        ["longest life of a job, from its start to the end of its last process", f"{found['slowest_s']:.1f} s"],
    ]
    return table(["kill -9 of a rank", ""], rows)


def of_mutants() -> str:
    both = figures("mutants")["trials"]
    rows = [[row["name"], row["variant"], row["caught"]] for row in both if not row["control"]]
    equal = sum(row["control"] and not row["caught"] for row in both)
    rows.append([f"nothing ({equal} controls)", "each of these", "equal"])
    return table(["dropped when the run goes on", "run", "caught by"], rows)


NAMES = {
    "term": "SIGTERM",
    "int": "SIGINT",
    "term twice": "SIGTERM, and SIGINT 2 ms later",
    "kill": "SIGKILL at any moment",
}


def of_stops() -> str:
    rows = []
    for name, found in ((name, x) for name, x in figures("stops")["summary"].items() if x["trials"]):
        codes = ", ".join(f"{code}: {number}" for code, number in found["codes"].items())
        rows.append([NAMES[name], found["trials"], found["right"], codes, f"{found['slowest_s']:.2f} s"])
    return table(["signal", "trials", "right", "exit codes", "slowest end"], rows)


def of_storage() -> str:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in figures("storage")["trials"]:
        if "skipped" not in row:
            kinds.setdefault(row["fault"], []).append(row)
    rows = [
        [
            kind,
            len(found),
            sum(row["code"] == 4 for row in found),
            sum(row["kept"] > 0 for row in found),
            sum(row["damaged"] for row in found),
            f"{sum(not row['then'] and not row['different'] for row in found if 'then' in row)} of "
            f"{sum('then' in row for row in found)}",
            f"{max(row['seconds'] for row in found):.2f} s",
        ]
        for kind, found in kinds.items()
    ]
    return table(
        ["fault", "trials", "exit 4", "with a checkpoint before", "damaged ones", "gone on, equal", "slowest"], rows
    )


def of_seeds() -> str:
    found = figures("seeds")["summary"]
    return table(["the same seed twice", ""], [["pairs", found["pairs"]], ["equal in every byte", found["equal"]]])


def spread(runs: list[dict[str, Any]], kind: str) -> str:
    blocks = [x for row in runs for x in row[kind]]
    return f"{statistics.median(blocks):.2f}, {min(blocks):.2f}, {max(blocks):.2f} s"


def of_stall() -> str:
    both = figures("stall")
    found, runs = both["summary"], [row for row in both["trials"] if row["kind"] == "run"]
    rows = (
        [
            ["weights", f"{runs[0]['weights'] / 1e6:.1f} M"],
            ["a step", f"{found['step_s']:.2f} s"],
            ["three steps without a save: median, least, most", spread(runs, "quiet")],
            ["three steps after one, its copying included", spread(runs, "saving")],
            ["time lost by a save, by the medians", f"{found['lost_s']:.2f} s"],
            ["share of ten steps (aim: at most 3 %)", f"{found['lost_share']:.1%}"],
        ]
        if runs
        else []
    )
    writes = [
        [f"{row['megabytes']} MB", f"{row['plain_ms']:.1f} ms", f"{row['safe_ms']:.1f} ms"]
        for row in both["trials"]
        if row["kind"] == "write"
    ]
    stall = table(["saving every 10 steps", ""], rows) + "\n" if rows else ""
    return stall + table(["tensors", "plain save", "safe checkpoint"], writes)


PARTS = {
    "kills": of_kills,
    "ranks": of_ranks,
    "mutants": of_mutants,
    "stops": of_stops,
    "storage": of_storage,
    "seeds": of_seeds,
    "stall": of_stall,
}


def page() -> str:
    """Every table whose figures are there, each under the command that makes it."""
    parts = [
        f"`python -m benchmarks.faults {name} --write`:\n\n{make()}" for name, make in PARTS.items() if figures(name)
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
