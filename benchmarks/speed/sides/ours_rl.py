"""Our GRPO and PPO as `kinkajou grpo` and `kinkajou ppo` run them, held before each step.

The job holds the stage and its flags; `model` and `reward` are names in the material's folder.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed.line import Line
from kinkajou.cli import main as kinkajou
from kinkajou.train import grpo, ppo
from kinkajou.train.run import Run

line = Line()


ROLLOUTS = 32
"""Of each step."""


class Held(Run):
    """A run that waits for a command before its steps, and answers it once the last of them is logged."""

    def steps(self) -> Iterator[int]:
        line.ready()
        self.left = 0
        for step in super().steps():
            if self.left == 0:
                self.asked = self.left = line.job["steps"] if line.wait() == "run" else 1
                self.start, self.phases, self.said = time.perf_counter(), Counter[str](), 0
            yield step

    def log(self, metrics: Mapping[str, float]) -> None:
        self.phases.update(self._phase_s)
        self.said += self._phase_tokens["rollout"]
        super().log(metrics)
        self.left -= 1
        if self.left == 0:
            seconds, samples = time.perf_counter() - self.start, self.asked * ROLLOUTS
            figures = {"tokens": self.said, "samples": samples, "mean_length": self.said / samples}
            line.answer(seconds=seconds, phases=dict(self.phases), **figures)


def main() -> None:
    folder, job = Path(line.folder), line.job
    grpo.Run = ppo.Run = Held  # type: ignore[misc]
    flags: dict[str, Any] = job["flags"] | {
        "model": folder / job["model"],
        "reward": folder / job["reward"] if job["reward"].startswith("tiny") else job["reward"],
        "prompts": folder / "prompts.jsonl",
        "output": folder / "-".join([job["stage"], *(str(x) for x in job["flags"].values())]),
        "template": "plain",
        "max_len": 256,
        "steps": 100_000,
        "lr": 0,
        "schedule": "constant",
        "warmup": 0,
        "log_every": 100_000,
        "sample_every": 100_000,
        "preflight": "off",
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    raise SystemExit(kinkajou([job["stage"], *words]))


if __name__ == "__main__":
    main()
