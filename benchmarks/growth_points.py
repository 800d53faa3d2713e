"""One point of a curve: a training step or a set of rollouts of one size, measured in a process of its own.

The process is forked from a server that has imported everything and computed nothing, so its peak of resident memory
is that of a process which was started for this point alone.
"""

import gc
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks.speed.material import FIRST, PAD, tiny_config
from kinkajou.batch import Sampling, TokenBatch, pad_rows
from kinkajou.engine.engine import LocalEngine
from kinkajou.models.attention import NAME, register
from kinkajou.models.forward import Dtype, LanguageModel
from kinkajou.parallel.strategy import Single
from kinkajou.train.optim import adamw
from kinkajou.train.sft import token_loss
from kinkajou.train.update import Objective, update

CONTEXT = 8192
ADAM_BYTES = 16
"""Of a float32 parameter, its gradient and AdamW's two moments."""
IMPORTED = (LlamaForCausalLM,)
"""transformers imports it when it is first asked for: before the fork, or every point would pay for it."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Sizes of one measurement; `curve` and `x` say where it is drawn."""

    curve: str
    x: int
    dtype: Dtype = "fp32"
    vocabulary: int = 8192
    rows: int = 1
    """Sequences of a step, or samples."""
    length: int = 512
    """Tokens of each sequence, or of each prompt."""
    microbatch: int = 8192
    new: int = 0
    """Tokens that each sample gets; 0 is a training step."""
    group: int = 1
    slots: int = 1


@dataclass(frozen=True)
class Measured:
    """Seconds of each repetition; bytes resident once everything was imported, and at most."""

    seconds: list[float]
    tokens: int
    parameters: int
    start_bytes: int
    peak_bytes: int

    @property
    def us_per_token(self) -> float:
        return 1e6 * median(self.seconds) / self.tokens

    @property
    def own_bytes(self) -> int:
        """What the work itself took, beyond the libraries."""
        return self.peak_bytes - self.start_bytes


register()


def resident_bytes() -> int:
    """What this process holds now.  Linux only, like the measurement."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Most that this process has held; Linux tells kilobytes, macOS bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def model_of(point: Point) -> LanguageModel:
    config = tiny_config()
    config.vocab_size, config.max_position_embeddings = point.vocabulary, CONTEXT
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config, attn_implementation=NAME), dtype=point.dtype)


def random_rows(count: int, point: Point) -> list[list[int]]:
    dice = random.Random(point.x)
    return [[dice.randrange(FIRST, point.vocabulary) for _ in range(point.length)] for _ in range(count)]


def training(model: LanguageModel, point: Point) -> tuple[Callable[[], object], int]:
    """One SFT step on rows that are full: all their tokens but the first are targets."""
    rows = random_rows(point.rows, point)
    batch: TokenBatch = pad_rows(rows, [[True] * point.length] * point.rows, pad_id=PAD)
    optimizer, strategy = adamw(model, lr=1e-4, weight_decay=0.01), Single()
    strategy.device = torch.device("cpu")

    def step() -> object:
        objective = Objective(batch, token_loss)
        return update(strategy, model, optimizer, [objective], tokens_per_microbatch=point.microbatch, max_norm=1.0)

    return step, point.rows * point.length


def rolling(model: LanguageModel, point: Point) -> tuple[Callable[[], object], int]:
    """Samples of `new` tokens each, `group` of them to a prompt; tokens that count are the new ones."""
    prompts = [row for row in random_rows(point.rows // point.group, point) for _ in range(point.group)]
    engine = LocalEngine(model.freeze(), end_ids=[], pad_id=PAD, max_rows=point.slots)

    def step() -> object:
        return engine.generate(prompts, Sampling(), max_new_tokens=point.new, seeds=range(len(prompts)))

    return step, point.rows * point.new


def measure(point: Point, repetitions: int, budget_s: float) -> Measured:
    """The first step is not timed: it makes the optimiser's state and every buffer.

    Repetitions end early, but not before the second, where they take longer than `budget_s`.
    """
    start = resident_bytes()
    model = model_of(point)
    step, tokens = (rolling if point.new else training)(model, point)
    step()
    seconds: list[float] = []
    while len(seconds) < repetitions and (len(seconds) < min(2, repetitions) or sum(seconds) < budget_s):
        gc.collect()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    parameters = sum(p.numel() for p in model.parameters())
    return Measured(seconds, tokens, parameters, start, peak_bytes())


def measure_all(
    points: list[Point], *, repetitions: int, budget_s: float, say: Callable[[Point, Measured], None]
) -> list[tuple[Point, Measured]]:
    """One after the other, each in a fork of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found = []
    for point in points:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            measured = pool.submit(measure, point, repetitions, budget_s).result()
        say(point, measured)
        found.append((point, measured))
    return found


def as_row(point: Point, measured: Measured) -> dict[str, Any]:
    """A point as it stands in the file."""
    return asdict(point) | asdict(measured)


def from_row(row: dict[str, Any]) -> tuple[Point, Measured]:
    sizes = {name: row[name] for name in Point.__dataclass_fields__}
    figures = {name: row[name] for name in Measured.__dataclass_fields__}
    return Point(**sizes), Measured(**figures)
