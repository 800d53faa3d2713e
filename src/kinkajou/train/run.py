"""A training run: its folder, step counter, metrics, samples, progress bar, and its place in all of that.

The folder is the interface between all tools: `config.toml`, `metrics.jsonl`, `timing.jsonl`, `samples.jsonl`,
`findings.jsonl`, `checkpoints/step-000120/` (a plain Hugging Face folder with `state/` in it), `best.json`,
`done.json`.  The same command in the same folder goes on where the newest whole checkpoint was.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import TracebackType
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.profiler import record_function

from kinkajou import config, faults
from kinkajou.batch import TokenBatch
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.texts import write_text
from kinkajou.config.findings import ANY
from kinkajou.config.recipes import jsonable
from kinkajou.errors import UserError
from kinkajou.findings import Level
from kinkajou.memory import Budget
from kinkajou.parallel.strategy import Strategy
from kinkajou.parallel.whereabouts import NOW
from kinkajou.train.checkpoints import Best, Checkpoints, Moment, facts_of, is_due, way_back, write_best
from kinkajou.train.console import Console, environment
from kinkajou.train.diagnosis import Diagnosis, StepFinding, step_finding, stops
from kinkajou.train.identity import FREE, check_made_from, check_settings, other_machine
from kinkajou.train.kept import Kept, reading, seed_generators
from kinkajou.train.logs import FINDINGS, LOGS, METRICS, SAMPLES, TIMING, Logs
from kinkajou.train.nonfinite import NotFinite
from kinkajou.train.planned import PLANNED
from kinkajou.train.replay_folder import keep_replay
from kinkajou.train.restart import written_by_last_try
from kinkajou.train.round import Round, read_round
from kinkajou.train.signals import Signals, Stopped
from kinkajou.train.skips import Guard
from kinkajou.train.watch import WATCHER

B = TypeVar("B", bound=TokenBatch)
WRITTEN = ("config.toml", *LOGS, "best.json", "done.json", "report.html")
REFERENCE = "reference.safetensors"
NOT_EXPORTED = ("state", "manifest.json")


def clear_run(folder: Path, *, keep: Sequence[str] = ()) -> None:
    """Deletes what a run wrote, and nothing else that may lie in the folder."""
    names = {*WRITTEN, REFERENCE} - {*keep}
    for path in [*(folder / name for name in names), *folder.glob("*scored-*.jsonl")]:
        path.unlink(missing_ok=True)
    for name in ("checkpoints", "replay"):
        shutil.rmtree(folder / name, ignore_errors=True)


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
        kept: Kept | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.watcher = WATCHER.get()
        self.stage, self.settings, self.keep, self.strategy = stage, cfg.run, cfg.keep, strategy
        self.total, self.folder = self.watcher.total(total), Path(cfg.run.output)
        NOW.folder = self.folder
        self.writes = strategy.main
        self.behind = 0
        """Whole steps behind the weights."""
        self.step = 0
        """The step that is being made."""
        self.best: Best | None = None
        self.diagnosis = Diagnosis(bf16=cfg.base.dtype == "bf16")
        self.logs, self.signals = Logs(self.folder, writes=self.writes), Signals()
        self.budget = budget or budget_of(cfg, strategy, self.say)
        limit = 0 if {"not_finite", ANY} & {*cfg.run.stop_on} else cfg.optim.max_skipped
        self.guard = Guard(limit, tell=self._tell_skip, keep=self._keep_replay)
        self._open = ExitStack()
        self._round: Round[Any] | None = None
        self._taken_up: tuple[Path, Mapping[str, Any]] | None = None
        self._phase_s: dict[str, float] = {}
        self._phase_tokens: dict[str, int] = {}
        settings = {name: jsonable(x) for name, x in config.flat(cfg).items() if name not in FREE}
        facts = {"stage": stage, "total": self.total, "settings": settings}
        self.environment = environment(strategy.world)
        self.kept = kept or Kept()
        self.kept.numbers |= {"budget": self.budget, "skips": self.guard.skips}
        self.checkpoints = Checkpoints(self.folder / "checkpoints", cfg.keep, self.kept, strategy, facts)
        self.console = Console(stage, self.total, shown, every=cfg.run.log_every, active=self.writes)
        self.started = time.monotonic()
        seed_generators(cfg.run.seed)
        self.resumed = self._begin(settings)
        if self.writes:
            tables = {stage: config.flat(cfg), "environment": self.environment}
            write_text(self.folder / "config.toml", config.to_toml(tables))
        for note in strategy.notes if self.writes else ():
            print(f"note: {note}")
        self._saved_at = time.monotonic()

    def __enter__(self) -> "Run":
        """From here the bar is shown, signals are held, and a checkpoint that is being written is waited for."""
        if self.keep.save_state:
            self._open.enter_context(self.signals)
        self._open.enter_context(self.checkpoints)
        self._open.enter_context(self.console)
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, fault, at)

    @property
    def place(self) -> Place:
        """What is behind the weights now."""
        return Place(self.behind, self._round.done if self._round else 0)

    def steps(self) -> Iterator[int]:
        """The steps that are still to be made, from 1; the bar moves with them."""
        self.console.first = self.behind
        faults.reached("run.start")
        for step in range(self.behind + 1, self.total + 1):
            self.step = NOW.step = step
            self.watcher.step(step)
            faults.reached("step.start")
            yield step
        self.watcher.step(self.total + 1)

    def due(self, every: int) -> bool:
        """Whether something that happens every N steps (0: never) happens now."""
        return every > 0 and self.step % every == 0

    def taken_up(self, kind: type[B]) -> Round[B] | None:
        """The round in the middle of which the run goes on, the first time that it is asked for."""
        found, self._taken_up = self._taken_up, None
        if not found:
            return None
        with reading(found[0]):
            self._round = read_round(kind, *found, self.strategy)
        return cast(Round[B], self._round)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a part of the step.  One that ends in a number that is not finite leaves the finding."""
        start = time.monotonic()
        NOW.phase = name
        try:
            with self.watcher.phase(name), record_function(f"kinkajou/{name}"):
                yield
        except NotFinite as fault:
            self.logs.append(FINDINGS, finding_of(fault, self.step, level="error").line)
            if not self.guard.moved:
                self.save_before_stop()
            raise
        self._phase_s[name] = self._phase_s.get(name, 0.0) + time.monotonic() - start

    def _tell_skip(self, fault: NotFinite, number: int) -> None:
        again = f", {number} in a row" if number > 1 else ""
        self.say(f"step {self.step}: left out{again}: {fault.what} is not finite, first in {fault.place}")
        self.logs.append(FINDINGS, finding_of(fault, self.step, level="warning").line)

    def _keep_replay(self, fault: NotFinite) -> str:
        def write(folder: Path | None) -> None:
            copied = self.kept.copied(self.strategy, state=False)
            if folder:
                for part in copied:
                    part.write(folder)

        folder, settings = self.folder / "replay" / f"step-{self.step:06d}", self.folder / "config.toml"
        about = {"stage": self.stage, "step": self.step, "world": self.strategy.world, "numbers": self.kept.plain()}
        return keep_replay(folder, fault, self.strategy, write, settings=settings, more=about)

    def count_tokens(self, phase: str, tokens: Tensor) -> None:
        """Real tokens that this rank put through a phase; its tokens/s are those of all ranks."""
        total = int(self.strategy.all_sum(tokens.sum()))
        self._phase_tokens[phase] = self._phase_tokens.get(phase, 0) + total
        self.watcher.tokens(phase, total)

    def end_step(self, metrics: Mapping[str, float], *, best: tuple[str, float] | None = None) -> None:
        """A line of metrics, what it shows, and a checkpoint if one is due or `best` (metric, value) is a new best."""
        faults.reached("step.end")
        found = self._log({**metrics, **self.guard.reported()})
        self.behind, self._round = self.step, None
        faults.reached("step.logged")
        if better := best is not None and (self.best is None or best[1] > self.best.value):
            assert best
            self.best = Best(self.step, *best)
        self._stop_on(found)
        self._pause(due=better or is_due(self.place, self.keep.save_every))

    def begun(self, round: Round[B]) -> Round[B]:
        """A round that is complete, and that no update has seen yet."""
        faults.reached("rollout.scored")
        self._round = round
        return round

    def pause(self) -> None:
        """Between two optimiser steps of a round: saves where that is due, and ends where that was asked for."""
        self._pause(due=self.keep.save_updates > 0 and self.place.updates % self.keep.save_updates == 0)

    def _pause(self, *, due: bool) -> None:
        """All ranks do the same here: they tell each other what they have heard and how far their writing is."""
        late = self.keep.save_minutes > 0 and time.monotonic() - self._saved_at >= 60 * self.keep.save_minutes
        asked = self.signals.asked
        votes = [asked == SIGTERM, asked == SIGINT, due or (self.writes and late), *self.checkpoints.flags]
        term, interrupt, due, busy, failed = (x > 0 for x in self.strategy.agree(votes))
        self.checkpoints.go_on(busy, failed)
        self.guard.moved = False
        if due or term or interrupt:
            self.save()
        if term or interrupt:
            self.checkpoints.settle()
            raise Stopped(SIGTERM if term else SIGINT, self._told())

    def save(self) -> None:
        """A checkpoint of this moment."""
        clock = {"elapsed_s": time.monotonic() - self.started, "environment": self.environment}
        sizes = self.logs.sizes()
        if TIMING in sizes:
            clock[TIMING] = sizes[TIMING]
        self.checkpoints.save(Moment(self.place, self.best, self._round, sizes, clock))
        self._saved_at = time.monotonic()

    def save_before_stop(self) -> str:
        """Nothing that was learnt is lost where something else than the run stops it; returns what to tell."""
        if self.place == Place(0):
            return "nothing had been trained yet"
        self.save()
        self.checkpoints.settle()
        return self._told()

    def say(self, text: str) -> None:
        """A notice for the user."""
        self.console.say(text)

    def write_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.logs.append(SAMPLES, {"step": self.step, **row})

    def finish(self) -> Path:
        """The last checkpoint, and the export if one is asked for; returns the checkpoint to use."""
        self.save()
        self.checkpoints.settle()
        self.checkpoints.thin_out(self.place, over=True)
        for finding in self.diagnosis.unwritten():
            self.logs.append(FINDINGS, finding.line)
        chosen = self.checkpoints.folder(Place(self.best.step) if self.best else self.place)
        if self.settings.export and self.writes:
            target, left_out = Path(self.settings.export), shutil.ignore_patterns(*NOT_EXPORTED)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copytree(chosen, target, dirs_exist_ok=True, ignore=left_out)
        if self.writes:
            done = {"step": self.behind, "checkpoint": chosen.name}
            write_text(self.folder / "done.json", json.dumps(done))
        if summary := self.diagnosis.summary():
            self.say(summary)
        if plan := PLANNED.get():
            self.say(plan.told())
        self.say(f"done: {chosen}")
        self.strategy.barrier()
        return chosen

    def _told(self) -> str:
        if not self.keep.save_state:
            return f"saved without its state (--save_state false): {self.checkpoints.folder(self.place)}"
        return f"saved: {self.checkpoints.folder(self.place)}"

    def _log(self, metrics: Mapping[str, float]) -> list[StepFinding]:
        """One line of `metrics.jsonl`, and one of `timing.jsonl`: seconds since the start, tokens/s of each phase."""
        speeds = {
            f"{name}_tokens_per_s": tokens / max(self._phase_s.get(name, 0.0), 1e-9)
            for name, tokens in self._phase_tokens.items()
        }
        self._phase_s, self._phase_tokens = {}, {}
        # Timing first: whoever sees a step in metrics.jsonl finds its time.
        self.logs.append(TIMING, {"step": self.step, "time_s": round(time.monotonic() - self.started, 3), **speeds})
        self.logs.append(METRICS, {"step": self.step, **metrics})
        self.console.show(self.step, {**metrics, **speeds})
        return self._observe(metrics, write=True)

    def _observe(self, metrics: Mapping[str, Any], *, write: bool) -> list[StepFinding]:
        found = self.diagnosis.observe(self.step, metrics)
        for finding in found:
            if finding.seen == 1 and write:
                self.say(str(finding))
            if self.diagnosis.due(finding) and write:
                self.logs.append(FINDINGS, finding.line)
        return found

    def _stop_on(self, found: Sequence[StepFinding]) -> None:
        """A finding that `--stop_on` names ends the run with exit code 3: on all ranks or on none."""
        if not self.settings.stop_on:
            return
        fatal = next((finding for finding in found if stops(finding, self.settings.stop_on)), None)
        (votes,) = self.strategy.agree([fatal is not None])
        if not votes:
            return
        saved = self.save_before_stop()
        raise UserError(
            f"stopped at step {self.step} on {fatal.name}: {fatal.cause}" if fatal else "another process stopped",
            evidence=f"{fatal.evidence}; {saved}" if fatal else saved,
            fix=fatal.action if fatal else "see findings.jsonl",
            exit_code=3,
        )

    def _begin(self, settings: Mapping[str, Any]) -> bool:
        """An empty folder, or everything as it was at a checkpoint; returns whether the run goes on from one."""
        fault, found = None, None
        said: list[str] = []
        again = written_by_last_try(self.folder)
        anew = self.settings.overwrite and not again
        if self.writes:
            try:
                self.checkpoints.shelf.clear_aside()  # among it may be one that was about to be replaced
                found, said = way_back(self.folder, self.keep, anew=anew, again=again)
            except UserError as seen:  # told once every rank knows
                fault = seen
        found, said, fault = self.strategy.told((found, said, fault))
        if fault:
            raise fault
        for text in said:
            self.say(f"warning: {text}")
        if self.writes and (found is None or (anew and not found.is_relative_to(self.folder))):
            # Preference training has read or renewed its cache before; it fits or is not used.
            clear_run(self.folder, keep=(REFERENCE,) if self.stage == "prefer" else ())
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if found is None:
            return False
        with reading(found):
            self._go_on(found, settings, anew=anew)
        return True

    def _go_on(self, found: Path, settings: Mapping[str, Any], *, anew: bool) -> None:
        """`anew`: what the folder has beyond that checkpoint is made again."""
        run, clock = facts_of(found)
        if run["stage"] != self.stage:
            raise UserError(f"{found} is of another stage: {run['stage']}", fix="another --output")
        allowed = self.keep.allow_change
        rounded = check_settings(run["settings"], settings, allowed, str(found))
        check_made_from(run["made_from"], self.kept.made_from, allowed, str(found))
        place = Place.of(found.name)
        assert place
        if place > Place(self.total):
            raise UserError(
                f"{found} is beyond the end of this run", evidence=f"{self.total} steps", fix="more steps or epochs"
            )
        numbers = run["numbers"]
        if "tokens_per_microbatch" in rounded:  # the new setting holds
            numbers["budget"] = asdict(self.budget)
        self.kept.restore(self.strategy, found, numbers)
        source = found.parent.parent
        self.behind = self.step = place.step
        self.started -= clock["elapsed_s"]
        self.best, said = self.checkpoints.best_from(source, run["best"])
        if self.writes:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            said += self.logs.cut({**run["logs"], TIMING: clock.get(TIMING, 0)}, source)
            (self.folder / "done.json").unlink(missing_ok=True)
            write_best(self.folder, self.best)
            if anew and source == self.folder:
                self.checkpoints.forget_after(place)
        if run["round"]:
            self._taken_up = found, run["round"]
        if source == self.folder:
            self.checkpoints.on_disk.add(place)
        for row in self.strategy.told(self.logs.rows(METRICS)):
            self.step = row.pop("step")
            self._observe(row, write=False)
        self.step = place.step
        for text in (*said, *other_machine(clock["environment"], self.environment, rounded)):
            self.say(f"note: {text}")
        self.say(f"goes on from {found}")
        faults.reached("resume.read")


def budget_of(cfg: config.StageConfig, s: Strategy, say: Callable[[str], None]) -> Budget:
    """Of the settings; only a process that is alone may make a pass again."""
    return Budget(cfg.optim.tokens_per_microbatch, alone=s.world == 1 and not s.sharded, say=say)


def finding_of(fault: NotFinite, step: int, *, level: Level) -> StepFinding:
    cause = f"{fault.what} is not finite, first in {fault.place}"
    return step_finding("not_finite", cause, {"seen": fault.evidence}, fault.fix, step=step, level=level)
