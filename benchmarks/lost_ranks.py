"""`python -m benchmarks.lost_ranks`: a rank is killed or stopped under torchrun; what is left, when, and what is said.

40 trials, half of them kill -9 and half SIGSTOP, sft and ppo (whose reward is a function in a process of its own), rank
0 or 1, at a random moment of the training.  A trial is right when all processes are gone within 10 s of a kill, or the
bound of a collective plus 5 s of a stop, and the words name the rank.  `--write` keeps the figures in
benchmarks/results/lost_ranks.json; the same command goes on from there until `--seconds` are over.
"""

import argparse
import json
import os
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.trials.world import RUN, make_world, write_recipe

RESULT = Path(__file__).parent / "results" / "lost_ranks.json"
TRIALS, BOUND_S, KILLED_S, STOPPED_S, GIVE_UP_S = 40, 5.0, 10.0, 5.0, 60.0
MARK = "KINKAJOU_TRIAL"
REWARD = "def score(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
LONG: dict[str, dict[str, Any]] = {"sft": {"epochs": 1000.0}, "ppo": {"steps": 1000, "reward": "lost_reward:score"}}
Row = dict[str, Any]


def marked(mark: str) -> dict[int, str]:
    """Processes of a trial, whoever their parent is: number and command."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and f"{MARK}={mark}".encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


def rank_of(pid: int) -> int | None:
    try:
        found = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return None
    return int(found[1]) if found else None


def rank_processes(mark: str) -> dict[int, int]:
    """The process of each rank; those that they have started bear the same environment."""
    return {
        rank: pid
        for pid, command in marked(mark).items()
        if (rank := rank_of(pid)) is not None and "-m kinkajou " in command
    }


def steps(home: Path) -> int:
    path = home / RUN / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(home: Path, number: int, job: "subprocess.Popen[bytes]") -> bool:
    until = time.monotonic() + GIVE_UP_S
    while time.monotonic() < until and job.poll() is None:
        if steps(home) >= number:
            return True
        time.sleep(0.05)
    return False


def wait_until_gone(mark: str, job: "subprocess.Popen[bytes]") -> tuple[float, dict[int, str]]:
    """Seconds, and what is still there when nobody waits any longer."""
    began = time.monotonic()
    while time.monotonic() < began + GIVE_UP_S:
        job.poll()
        if not (there := marked(mark)):
            return time.monotonic() - began, {}
        time.sleep(0.05)
    return GIVE_UP_S, there


def tried(world: Path, number: int, seed: int) -> Row:
    dice = random.Random(f"{seed}/{number}")
    stage, how, rank = ("sft", "ppo")[number % 2], ("kill", "stop")[number // 2 % 2], dice.randrange(2)
    home = world / f"trial-{number}"
    home.mkdir()
    (home / "lost_reward.py").write_text(REWARD)
    write_recipe(home / "recipe.toml", world, stage, **LONG[stage])
    mark, said = secrets.token_hex(8), home / "said"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "kinkajou"]
    command += [stage, "recipe.toml", "--strategy", "ddp", "--collective_timeout_s", str(BOUND_S)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
    with said.open("wb") as out:
        job = subprocess.Popen(command, cwd=home, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        begun = wait_for_steps(home, dice.randint(1, 6), job)
        time.sleep(dice.random())
        ranks = rank_processes(mark)
        if not begun or rank not in ranks:
            print(said.read_text(errors="replace")[-1500:], file=sys.stderr)  # no figure, and full of paths
            return {"stage": stage, "how": how, "rank": rank, "begun": False}
        step = steps(home)
        os.kill(ranks[rank], {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        seconds, orphans = wait_until_gone(mark, job)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        job.wait()
    text = said.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith(("error: ", "  seen: "))]
    told = f"(lost|no sign of) rank {rank} on "
    row = {"stage": stage, "how": how, "rank": rank, "after_step": step, "begun": True, "seconds": round(seconds, 2)}
    row |= {"orphans": orphans, "named": bool(re.search(f"error: {told}", text)), "code_of_torchrun": job.returncode}
    row |= {"survivors_code": codes(text), "words": lines[:2]}
    return row


def codes(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"exitcode\s*: (-?\d+)", text)]


def right(row: Row) -> bool:
    limit = KILLED_S if row["how"] == "kill" else BOUND_S + STOPPED_S
    return bool(row["begun"] and row["named"] and not row["orphans"] and row["seconds"] <= limit)


def summary(rows: list[Row]) -> Row:
    begun = [row for row in rows if row["begun"]]
    return {
        "trials": len(rows),
        "not_right": sum(not right(row) for row in rows),
        "orphans": sum(len(row["orphans"]) for row in begun),
        "not_named": sum(not row["named"] for row in begun),
        "bound_of_a_collective_s": BOUND_S,
        **{
            f"{stage}_{how}_s": [row["seconds"] for row in begun if (row["stage"], row["how"]) == (stage, how)]
            for stage in LONG
            for how in ("kill", "stop")
        },
    }


def table(rows: list[Row]) -> str:
    lines = ["| stage | what | trials | right | gone after, median and longest |", "|---|---|---|---|---|"]
    for stage in LONG:
        for how in ("kill", "stop"):
            own = [row for row in rows if (row["stage"], row["how"]) == (stage, how) and row["begun"]]
            times = sorted(row["seconds"] for row in own)
            if times:
                spread = f"{statistics.median(times):.1f} and {times[-1]:.1f} s"
                lines.append(f"| {stage} | {how} | {len(own)} | {sum(map(right, own))} | {spread} |")
    return "\n".join(lines)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--trials", type=int, default=TRIALS)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")
    flags.add_argument("--write", action="store_true", help="keep the figures, and go on from those that are there")
    given = flags.parse_args()
    until = time.monotonic() + given.seconds
    rows: list[Row] = json.loads(RESULT.read_text())["trials"] if given.write and RESULT.is_file() else []
    with tempfile.TemporaryDirectory(prefix="kinkajou-lost-") as name:
        make_world(Path(name))
        while len(rows) < given.trials and time.monotonic() < until:
            rows.append(tried(Path(name), len(rows), given.seed))
            print(json.dumps(rows[-1], indent=None if right(rows[-1]) else 1), flush=True)
            if given.write:
                RESULT.write_text(json.dumps({"summary": summary(rows), "trials": rows}, indent=1) + "\n")
    print(table(rows))
    return 0 if all(map(right, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
