"""From the start of a process to the end of its first training step: SFT on a file of chats, one step of 8.

`who` ours: `kinkajou sft RECIPE`; trl: a script that does the same with TRL (speed/first_step_trl.py).
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.line import Line

LOOK_S = 0.005
RECIPE = """[sft]
model = "{folder}/tiny"
data = "{folder}/chats.jsonl"
output = "{output}"
template = "plain"
batch_size = 8
max_rows = 48
epochs = 1
lr = 1e-5
"""


def main() -> None:
    line = Line()
    folder, output = Path(line.folder), Path(line.folder) / f"start-{line.job['who']}"
    recipe = folder / f"start-{line.job['who']}.toml"
    recipe.write_text(RECIPE.format(folder=folder, output=output))
    commands = {
        "ours": [sys.executable, "-m", "kinkajou", "sft", str(recipe)],
        "trl": [sys.executable, "-m", "benchmarks.speed.first_step_trl", str(folder), str(output)],
    }

    def work(whole: bool) -> dict[str, Any]:
        """Both write a line to `metrics.jsonl` when a step has ended."""
        shutil.rmtree(output, ignore_errors=True)
        done, start = output / "metrics.jsonl", time.perf_counter()
        process = subprocess.Popen(commands[line.job["who"]], stdout=subprocess.DEVNULL)
        while not (done.exists() and done.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"the job ended with exit code {process.returncode} before a step")
            time.sleep(LOOK_S)
        seconds = time.perf_counter() - start
        process.terminate()
        process.wait()
        return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}

    line.serve(work)


if __name__ == "__main__":
    main()
