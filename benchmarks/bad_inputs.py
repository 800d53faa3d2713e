"""`python -m benchmarks.bad_inputs`: a thousand wrong inputs, and what the commands say to each.

Hypothesis draws them from a fixed seed: files with bad rows, bad files, random damage, settings, recipes, models.
Each goes through the command's own entry in a warm process.  `--batch NAME` makes one batch; `--write` keeps the
figures in benchmarks/results/bad_inputs.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
from hypothesis import HealthCheck, Phase, strategies

from benchmarks.wrong import files, folders, rows, settings
from benchmarks.wrong.cases import LIMIT_S, Answer, Case, Draw, Good, tried

RESULTS = Path(__file__).parent / "results" / "bad_inputs.json"
Maker = Callable[[Draw, Path, Good], Case]
BATCHES: dict[str, tuple[int, Maker]] = {
    "rows": (220, rows.broken_rows),
    "tables": (60, rows.broken_tables),
    "files": (150, files.whole_files),
    "places": (30, files.no_file),
    "damage": (200, files.damaged),
    "settings": (120, settings.wrong_setting),
    "combinations": (40, settings.wrong_combination),
    "models": (240, folders.broken_models),
}
"""Name -> how many, and what makes one."""


def campaign(maker: Maker, count: int, *, seed: int, good: Good, folder: Path) -> list[Answer]:
    """`count` different cases, the same ones each time."""
    from kinkajou.cli import main

    found: list[Answer] = []
    hypothesis.configuration.set_hypothesis_home_dir(folder / "hypothesis")

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategies.data())
    def each(data: strategies.DataObject) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            case = maker(data.draw, Path(name), good)
            found.append(tried(case, main, Path(name)))

    each()
    return found


def rows_of(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """One row a kind: how many, how many as they must be, the slowest."""
    kinds: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        kinds[answer.case.kind].append(answer)
    return [
        {
            "kind": kind,
            "cases": len(own),
            "right": sum(not answer.faults for answer in own),
            "worst_s": round(max(answer.seconds for answer in own), 2),
            "said": next((answer.said.splitlines()[-3:] for answer in own if "error: " in answer.said), [])[:1],
        }
        for kind, own in sorted(kinds.items())
    ]


def good_inputs(folder: Path) -> Good:
    """The sources of the tests' tiny runs."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch

    from small import make_small

    torch.set_num_threads(1)
    small = make_small(folder)
    return Good(small.policy, small.judge, small.chats, small.pairs, small.pairs, small.prompts)


def warmed(good: Good, folder: Path) -> None:
    """Each command once, so that imports are behind."""
    for maker in (rows.broken_rows, rows.broken_tables):
        campaign(maker, 25, seed=99, good=good, folder=folder)


def show(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if answer.faults:
            print(f"{answer.case.kind}: {'; '.join(answer.faults)}", file=sys.stderr)
            print(f"   {' '.join(answer.case.arguments)}\n   {answer.said[-400:]}", file=sys.stderr)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--batch", choices=[*BATCHES], action="append", help="this batch alone; several may be given")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--share", type=float, default=1.0, help="of the cases")
    flags.add_argument("--write", action="store_true", help="keep the figures")
    given = flags.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if given.write and RESULTS.is_file() else {}
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="kinkajou-bad-") as name:
        good = good_inputs(Path(name) / "good")
        warmed(good, Path(name))
        for batch in given.batch or BATCHES:
            count, maker = BATCHES[batch]
            start = time.perf_counter()
            answers = campaign(maker, max(1, round(count * given.share)), seed=given.seed, good=good, folder=Path(name))
            show(answers)
            found = rows_of(answers)
            bad = sum(bool(answer.faults) for answer in answers)
            wrong += bad
            kept[batch] = {"cases": len(answers), "right": len(answers) - bad, "kinds": found}
            worst = max(answer.seconds for answer in answers)
            spent = time.perf_counter() - start
            print(f"{batch}: {len(answers) - bad} of {len(answers)} right, worst {worst:.2f} s, {spent:.0f} s in all")
    if given.write:
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"{wrong} wrong; a case may take {LIMIT_S:g} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
