"""`kinkajou profile`: some steps of a stage that leave nothing behind, and where their time and memory went.

Steps are timed without the profiler, phase by phase; one more is traced, and says how a phase divides.
"""

import dataclasses
import gzip
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as Profiler

from kinkajou import config
from kinkajou.errors import UserError
from kinkajou.models.presets import PRESETS
from kinkajou.parallel.make import make_strategy
from kinkajou.train import profile_page
from kinkajou.train.grpo import train_grpo
from kinkajou.train.inputs import Inputs, RLInputs
from kinkajou.train.ppo import train_ppo
from kinkajou.train.preference import train_preference
from kinkajou.train.profile_memory import Peaks, Standing, holders, standing
from kinkajou.train.profile_rows import Measured
from kinkajou.train.profile_trace import NAMES, read
from kinkajou.train.reward import train_reward
from kinkajou.train.sft import train_sft
from kinkajou.train.watch import WATCHER, Watcher


class Enough(Exception):  # no error: how a run ends that nobody wants the rest of
    """All steps are seen."""


def profile(cfg: config.StageConfig, show: config.ProfileConfig, inputs: Any, target: Path | None) -> None:
    """Prints the page and writes the trace."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a profile is of one process", fix="kinkajou profile without torchrun")
    console = Console(highlight=False)
    if cfg.parallel.strategy != "naive":
        console.print(f"note: profiled as one process, not as {cfg.parallel.strategy}")
    with tempfile.TemporaryDirectory(prefix="kinkajou-profile-") as folder:
        made = Path(folder) / "trace.json"
        looker = Looker(cfg, show, made)
        quiet = unobtrusive(cfg, Path(folder) / "run", looker.steps)
        with looker.looking():
            train(quiet, few(quiet, inputs, looker.steps, console))
        traced = read(json.loads(made.read_text(encoding="utf-8"))["traceEvents"])
        for block in profile_page.page(cfg, looker.measured(), traced):
            console.print(block)
        if target:
            keep(made, target)
            console.print(f"trace: {target} (ui.perfetto.dev opens it)", soft_wrap=True, markup=False)


def unobtrusive(cfg: Any, folder: Path, steps: int) -> Any:
    """The same stage in a folder that nobody keeps, long enough, without evaluations and checkpoints."""
    run = dataclasses.replace(cfg.run, output=str(folder), export=None, stop_on=(), preflight="off")
    alone = config.ParallelConfig()
    cfg = dataclasses.replace(cfg, parallel=alone, keep=config.KeepConfig(save_state=False))
    if isinstance(cfg, config.PreferConfig):  # what its reference is asked for depends on how long the run is
        return dataclasses.replace(cfg, run=run, epochs=max(cfg.epochs, steps))
    return dataclasses.replace(cfg, run=run)


def few(cfg: config.StageConfig, inputs: Any, steps: int, console: Console) -> Any:
    """The records without those held out; of those that a reference must answer first, no more than the steps need."""
    if isinstance(inputs, RLInputs):
        return dataclasses.replace(inputs, held_out=())
    assert isinstance(inputs, Inputs)
    rows: Sequence[Any] = inputs.train
    makes_tokenizer = cfg.base.model in PRESETS and cfg.base.tokenizer in (None, "characters")
    if isinstance(cfg, config.PreferConfig) and cfg.method.needs_reference and not makes_tokenizer:
        wanted = cfg.batch_size * (steps + 1)
        if wanted < len(rows):
            console.print(f"note: {wanted:,} of {len(rows):,} records, as many as the profiled steps need")
            rows = [rows[i * len(rows) // wanted] for i in range(wanted)]
    return Inputs(tuple(rows), ())


def train(cfg: Any, inputs: Any) -> None:
    """The stage's own trainer; ends when the watcher has seen enough."""
    kinds = {
        config.SFTConfig: train_sft,
        config.RewardConfig: train_reward,
        config.PreferConfig: train_preference,
        config.PPOConfig: train_ppo,
        config.GRPOConfig: train_grpo,
    }
    try:
        kinds[type(cfg)](cfg, inputs)  # type: ignore[operator]
    except Enough:  # as intended: the rest of the run is not wanted
        return


def keep(made: Path, target: Path) -> None:
    """The trace to where the user wants it, complete or not at all."""
    aside = target.with_name(f".{target.name}.tmp")
    try:
        with made.open("rb") as source, (gzip.open if target.suffix == ".gz" else open)(aside, "wb") as file:
            shutil.copyfileobj(source, file)
        os.replace(aside, target)
    except OSError as fault:  # a full disk: the page is printed already
        aside.unlink(missing_ok=True)
        raise UserError("the trace could not be written", evidence=str(fault), fix="another --trace") from None


class Looker(Watcher):
    """Times steps and phases, traces the last step, and looks at memory meanwhile."""

    def __init__(self, cfg: config.StageConfig, show: config.ProfileConfig, made: Path) -> None:
        self.show, self.made = show, made
        self.steps = show.warmup + show.steps + 1
        self.device = make_strategy("naive").device
        self.peaks = Peaks(self.device)
        self.scalar = "critic" if isinstance(cfg, config.PPOConfig) else "reward model"
        self.number = 0
        self.began: list[float] = []
        self.phase_s: list[dict[str, float]] = []
        self.phase_tokens: list[dict[str, int]] = []
        self.lies = Standing()
        self._before: list[Any] = []
        self._profiler: Profiler | None = None
        self._scope: Any = None

    @contextmanager
    def looking(self) -> Iterator[None]:
        self._before = holders()  # another run's, in this process
        token = WATCHER.set(self)
        try:
            with self.peaks.watching():
                yield
        finally:
            WATCHER.reset(token)
            if self._profiler is not None:
                self._scope.__exit__(None, None, None)
                self._profiler.stop()
                self._profiler = None

    def total(self, own: int) -> int:
        return self.steps

    def step(self, number: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.number = number
        if number > self.steps:
            self._stop()
            raise Enough
        if number == 1:
            self.peaks.by_phase.clear()  # what loading took
        self.began.append(time.perf_counter())
        self.phase_s.append({})
        self.phase_tokens.append({})
        if number == self.steps:
            self.peaks.stop()
            known = {id(x) for x in self._before}
            self.lies = standing((x for x in holders() if id(x) not in known), scalar=self.scalar)
            self._start()

    def _start(self) -> None:
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self._profiler, self._scope = Profiler(activities=kinds, profile_memory=True), record_function("kinkajou/step")
        self._profiler.start()
        self._scope.__enter__()

    def _stop(self) -> None:
        assert self._profiler is not None
        self._scope.__exit__(None, None, None)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.made))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        name = NAMES.get(name, name)
        if self.number == self.steps:  # the profiler's own memory is none of the run's
            yield
            return
        start = time.perf_counter()
        with self.peaks.inside(name):
            yield
        if self.number:
            seconds = self.phase_s[-1]
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def tokens(self, phase: str, count: int) -> None:
        if self.number:
            name, tokens = NAMES.get(phase, phase), self.phase_tokens[-1]
            tokens[name] = tokens.get(name, 0) + count

    def measured(self) -> Measured:
        """The step of middle length: others on the machine disturb single ones."""
        took = [b - a for a, b in pairwise(self.began)]
        steps = sorted(range(self.show.warmup, self.steps - 1), key=lambda i: took[i])
        middle = steps[(len(steps) - 1) // 2]
        return Measured(
            step_s=took[middle],
            all_s=sorted(took[i] for i in steps),
            phase_s=self.phase_s[middle],
            phase_tokens=self.phase_tokens[middle],
            peaks=dict(self.peaks.by_phase),
            standing=self.lies,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            threads=torch.get_num_threads(),
        )
