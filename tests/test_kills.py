"""25 runs that die by signal 9, five a stage, each started again: the end must be that of a run left alone.

They are forked from one warm process, which is not this one: pytest's has threads.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "reward", "prefer", "ppo", "grpo")


def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "kills", "--quick", "--folder", str(tmp_path / "trials")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"] == 25
    assert found["by_stage"].keys() == {*STAGES}
    assert min(found["by_stage"].values()) >= 5
    assert found["inside_a_write"] >= 0.4 * found["kills"]
    assert (found["lost"], found["different"], found["not_killed"]) == (0, 0, 0)
    assert found["resumed"] >= 10  # the others died before their first checkpoint
