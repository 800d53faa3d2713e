"""A training run: its folder, step counter, metrics, samples, checkpoints and progress bar.

The folder is the interface between all tools: `config.toml`, `metrics.jsonl` (what settings and seeds decide),
`timing.jsonl` (what the clock says), `samples.jsonl`, `findings.jsonl`, `checkpoints/step-000120/` (a plain Hugging
Face folder), `best.json`.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from kinkajou import config
from kinkajou.config.findings import ANY
from kinkajou.errors import UserError
from kinkajou.findings import Level
from kinkajou.memory import Budget
from kinkajou.parallel.strategy import Strategy
from kinkajou.parallel.whereabouts import NOW
from kinkajou.train.console import Console, environment
from kinkajou.train.diagnosis import Diagnosis, StepFinding, step_finding, stops
from kinkajou.train.nonfinite import NotFinite
from kinkajou.train.planned import PLANNED
from kinkajou.train.skips import Guard
from kinkajou.train.watch import WATCHER

Writer = Callable[[Path | None], None]
"""Writes a checkpoint into a folder; called with None where this process only lends what it holds of the model."""
LOGS = ("metrics.jsonl", "timing.jsonl", "samples.jsonl", "findings.jsonl")
WRITTEN = ("config.toml", *LOGS, "best.json", "report.html")
REFERENCE = "reference.safetensors"


def clear_run(folder: Path, *, keep: Sequence[str] = ()) -> None:
    """Deletes what a run wrote, and nothing else that may lie in the folder."""
    names = {*WRITTEN, REFERENCE} - {*keep}
    for path in [*(folder / name for name in names), *folder.glob("*scored-*.jsonl")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


class Run:
    """Called by a trainer, never inherited.  On ranks other than 0 it counts and times but writes nothing."""

    def __init__(
        self,
        stage: str,
        cfg: config.StageConfig,
        strategy: Strategy,
        *,
        total: int,
        shown: Sequence[str],
        budget: Budget | None = None,
    ) -> None:
        self.watcher = WATCHER.get()
        self.keep = cfg.keep
        self.settings, self.strategy, self.total = cfg.run, strategy, self.watcher.total(total)
        self.folder, self.step = Path(cfg.run.output), 0
        NOW.folder = self.folder
        self.writes = strategy.main
        self.writer: Writer | None = None
        """What writes a checkpoint if a finding stops the run (`--stop_on`)."""
        self.diagnosis = Diagnosis(bf16=cfg.base.dtype == "bf16")
        self.budget = budget or budget_of(cfg, strategy, self.say)
        limit = 0 if {"not_finite", ANY} & {*cfg.run.stop_on} else cfg.optim.max_skipped
        self.guard = Guard(limit, tell=self._tell_skip, keep=self._keep_replay)
        self.started = time.monotonic()
        self._phase_s: dict[str, float] = {}
        self._phase_tokens: dict[str, int] = {}
        self._kept: set[int] = set()
        self._best: float = -math.inf
        if self.writes:
            # Preference training has read or renewed its cache before; it fits or is not used.
            clear_run(self.folder, keep=(REFERENCE,) if stage == "prefer" else ())
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            tables = {stage: config.flat(cfg), "environment": environment(strategy.world)}
            (self.folder / "config.toml").write_text(config.to_toml(tables), encoding="utf-8")
        for note in strategy.notes if self.writes else ():
            print(f"note: {note}")
        self.console = Console(stage, self.total, shown, every=cfg.run.log_every, active=self.writes)

    def steps(self) -> Iterator[int]:
        """Step numbers from 1; the bar moves with them."""
        with self.console:
            for step in range(1, self.total + 1):
                self.step = step
                self.watcher.step(step)
                yield step
            self.watcher.step(self.total + 1)

    def due(self, every: int) -> bool:
        """Whether something that happens every N steps (0: never) happens now."""
        return every > 0 and self.step % every == 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a part of the step.  One that ends in a number that is not finite leaves the finding."""
        start = time.monotonic()
        try:
            with self.watcher.phase(name), record_function(f"kinkajou/{name}"):
                yield
        except NotFinite as fault:
            self._append("findings.jsonl", finding_of(fault, self.step, level="error").line)
            raise
        self._phase_s[name] = self._phase_s.get(name, 0.0) + time.monotonic() - start

    def _tell_skip(self, fault: NotFinite, number: int) -> None:
        again = f", {number} in a row" if number > 1 else ""
        self.say(f"step {self.step}: left out{again}: {fault.what} is not finite, first in {fault.place}")
        self._append("findings.jsonl", finding_of(fault, self.step, level="warning").line)

    def _keep_replay(self, fault: NotFinite) -> str:
        return ""

    def count_tokens(self, phase: str, tokens: Tensor) -> None:
        """Real tokens that this rank put through a phase; its tokens/s are those of all ranks."""
        total = int(self.strategy.all_sum(tokens.sum()))
        self._phase_tokens[phase] = self._phase_tokens.get(phase, 0) + total
        self.watcher.tokens(phase, total)

    def log(self, metrics: Mapping[str, float]) -> None:
        """One line of `metrics.jsonl`, and one of `timing.jsonl`: seconds since the start, tokens/s of each phase.

        Then the metrics are diagnosed; a finding that `--stop_on` names ends the run with exit code 3.
        """
        metrics = {**metrics, **self.guard.reported()}
        speeds = {
            f"{name}_tokens_per_s": tokens / max(self._phase_s[name], 1e-9)
            for name, tokens in self._phase_tokens.items()
        }
        self._phase_s, self._phase_tokens = {}, {}
        # Timing first: whoever sees a step in metrics.jsonl finds its time.
        self._append("timing.jsonl", {"step": self.step, "time_s": round(time.monotonic() - self.started, 3), **speeds})
        self._append("metrics.jsonl", {"step": self.step, **metrics})
        self.console.show(self.step, {**metrics, **speeds})
        found = self.diagnosis.observe(self.step, metrics)
        for finding in found:
            if finding.seen == 1:
                self.say(str(finding))
            if self.diagnosis.due(finding):
                self._append("findings.jsonl", finding.line)
        self._stop_on(found)

    def _stop_on(self, found: Sequence[StepFinding]) -> None:
        """Stops on all ranks or on none: each has the same metrics, but a checkpoint is no place to rely on it."""
        if not self.settings.stop_on:
            return
        fatal = next((finding for finding in found if stops(finding, self.settings.stop_on)), None)
        votes = self.strategy.all_sum(torch.tensor(float(fatal is not None), device=self.strategy.device))
        if not votes:
            return
        saved = "no checkpoint: this stage has not told the run how to write one"
        if self.writer:
            self.save(self.writer)
            saved = f"saved: {self._checkpoint(self.step)}"
        raise UserError(
            f"stopped at step {self.step} on {fatal.name}: {fatal.cause}" if fatal else "another process stopped",
            evidence=f"{fatal.evidence}; {saved}" if fatal else saved,
            fix=fatal.action if fatal else "see findings.jsonl",
            exit_code=3,
        )

    def say(self, text: str) -> None:
        """A notice for the user."""
        self.console.say(text)

    def write_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._append("samples.jsonl", {"step": self.step, **row})

    def save(self, write: Writer) -> None:
        """A checkpoint of this step, complete or not there at all: written aside, synced, renamed."""
        if self.step in self._kept:
            return
        self._kept.add(self.step)
        if self.writes:
            write_whole(self._checkpoint(self.step), write)
        elif self.strategy.sharded:
            write(None)
        self.strategy.barrier()

    def save_if_best(self, metric: str, value: float, write: Writer) -> None:
        """Keeps the best checkpoint so far and forgets the one it beats."""
        if value <= self._best:
            return
        before, self._best = self._best_step(), value
        self.save(write)
        if self.writes:
            best = {"step": self.step, "metric": metric, "value": value}
            (self.folder / "best.json").write_text(json.dumps(best), encoding="utf-8")
            if before is not None and before != self.step and not self._keeps(before):
                shutil.rmtree(self._checkpoint(before), ignore_errors=True)

    def finish(self, write: Writer) -> Path:
        """The last checkpoint, and the export if one is asked for; returns the checkpoint to use."""
        self.save(write)
        for finding in self.diagnosis.unwritten():
            self._append("findings.jsonl", finding.line)
        chosen = self._checkpoint(self._best_step() if self._best_step() is not None else self.step)
        if self.settings.export and self.writes:
            target = Path(self.settings.export)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copytree(chosen, target, dirs_exist_ok=True)
        if summary := self.diagnosis.summary():
            self.say(summary)
        if plan := PLANNED.get():
            self.say(plan.told())
        self.say(f"done: {chosen}")
        self.strategy.barrier()
        return chosen

    def _keeps(self, step: int) -> bool:
        return step > 0 and self.keep.save_every > 0 and step % self.keep.save_every == 0

    def _best_step(self) -> int | None:
        path = self.folder / "best.json"
        return int(json.loads(path.read_text())["step"]) if path.is_file() else None

    def _checkpoint(self, step: int | None) -> Path:
        return self.folder / "checkpoints" / f"step-{step or 0:06d}"

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, ensure_ascii=False) + "\n")


def budget_of(cfg: config.StageConfig, s: Strategy, say: Callable[[str], None]) -> Budget:
    """Of the settings; only a process that is alone may make a pass again."""
    return Budget(cfg.optim.tokens_per_microbatch, alone=s.world == 1 and not s.sharded, say=say)


def finding_of(fault: NotFinite, step: int, *, level: Level) -> StepFinding:
    cause = f"{fault.what} is not finite, first in {fault.place}"
    return step_finding("not_finite", cause, {"seen": fault.evidence}, fault.fix, step=step, level=level)


def write_whole(target: Path, write: Writer) -> None:
    """Fills `target` by `write(folder)` so that it appears complete or not at all."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for path in [*(p for p in aside.rglob("*") if p.is_file()), aside]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
