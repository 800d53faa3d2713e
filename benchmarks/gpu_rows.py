"""Rows of the GPU benchmark: training, rollouts and decoding, each a function from the setting to its figures."""

import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_limits import SHAPES, Plan, Shape, decoding_bytes, plan, training_flops
from benchmarks.gpu_models import PAD, Setting, end_ids, fresh, memory_figures, random_model, random_rows, timed
from benchmarks.gpu_peers import CONTINUOUS, DYNAMIC, PEERS, STATIC, Answers
from benchmarks.speed.material import lengths
from kinkajou.batch import Sampling, pad_rows
from kinkajou.engine.engine import LocalEngine
from kinkajou.models.forward import LanguageModel
from kinkajou.parallel.strategy import Single
from kinkajou.train.optim import adamw
from kinkajou.train.sft import token_loss
from kinkajou.train.update import Objective, update

MICROBATCHES = 8
"""Of a training step."""
Figures = dict[str, Any]


def shape_of(name: str, here: Setting) -> Shape:
    return SHAPES["small" if here.small else name]


def sft(name: str, here: Setting) -> Figures:
    """Steps on sequences of mixed lengths (log-normal, mean about 470 of at most 2,048), every token a target."""
    fits = Plan(shape_of(name, here), 256) if here.small else plan(shape_of(name, here), here.memory)
    fresh(here)
    model = random_model(fits.shape, here)
    rows = training_rows(fits, mean=64 if here.small else 512, most=256 if here.small else 2048)
    batch = pad_rows(rows, [[True] * len(row) for row in rows], pad_id=PAD).to(here.device)
    optimizer, strategy = adamw(model, lr=1e-6, weight_decay=0.0), Single()
    strategy.device = torch.device(here.device)

    def step() -> dict[str, float]:
        objective = [Objective(batch, token_loss)]
        return update(strategy, model, optimizer, objective, tokens_per_microbatch=fits.tokens, max_norm=1.0)

    first = step()["loss"]
    seconds = [timed(step, here)[0] for _ in range(here.repetitions)]
    sizes = [len(row) for row in rows]
    # The trunk reads all but the last token of a row; each of those has a target.
    flops = training_flops(fits.shape, [n - 1 for n in sizes], sum(sizes) - len(sizes))
    return {
        "shape": asdict(fits.shape),
        "parameters": fits.shape.parameters,
        "whole_shape": fits.shape == shape_of(name, here),
        "tokens_per_microbatch": fits.tokens,
        "tokens": sum(sizes),
        "seconds": seconds,
        "first_loss": first,
        "tokens_per_s": sum(sizes) / median(seconds),
        "flops_per_s": flops / median(seconds),
        **({"mfu": flops / median(seconds) / here.peak.flops} if here.peak else {}),
        **memory_figures(here),
    }


def training_rows(fits: Plan, *, mean: int, most: int) -> list[list[int]]:
    """Rows of a few micro-batches' tokens."""
    dice = random.Random(1)
    wanted = lengths(dice, mean=mean, sigma=0.7, least=16, most=most)
    sizes: list[int] = []
    while sum(sizes) < MICROBATCHES * fits.tokens:
        sizes += islice(wanted, 1)
    return [[dice.randrange(2, fits.shape.vocabulary) for _ in range(n)] for n in sizes]


def frozen(shape: Shape, here: Setting) -> LanguageModel:
    return random_model(shape, here).freeze()


def decode(name: str, here: Setting) -> Figures:
    """64 samples run together from prompts of 128 tokens for 256 steps; prompts are not in the time."""
    shape = shape_of(name, here)
    count, prompt, new = (4, 8, 16) if here.small else (64, 128, 256)
    fresh(here)
    model = frozen(shape, here)
    engine = LocalEngine(model, end_ids=[], pad_id=PAD, max_rows=count)
    prompts = random_rows(count, prompt, shape.vocabulary)

    def run() -> float:
        samples = engine.samples(prompts, Sampling(), max_new_tokens=new, seeds=range(count))
        session = engine.session(samples)
        while len(session.scheduler.running) < count:
            session.step()
        assert all(len(sample.tokens) == 1 for sample in samples)  # prompts filled the slots in one pass

        def rest() -> None:
            while session.busy:
                session.step()

        return timed(rest, here)[0]

    run()
    seconds = [run() for _ in range(here.repetitions)]
    # Step i reads the prompt and the tokens so far, the one it writes among them.
    moved = decoding_bytes(shape, count, [prompt + i for i in range(1, new)])
    return {
        "shape": asdict(shape),
        "cache": type(engine.session([]).cache).__name__,
        "rows": count,
        "seconds": seconds,
        "tokens_per_s": count * (new - 1) / median(seconds),
        "ms_per_step": 1000 * median(seconds) / (new - 1),
        "bytes_per_s": moved / median(seconds),
        **({"bandwidth_share": moved / median(seconds) / here.peak.bandwidth} if here.peak else {}),
        **memory_figures(here),
    }


def ours(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int, ends: list[int], rows: int) -> Answers:
    engine = LocalEngine(model, end_ids=ends, pad_id=PAD, max_rows=rows)
    count = 0

    def generate() -> list[int]:
        nonlocal count
        count += len(prompts)
        rollout = engine.generate(prompts, Sampling(), max_new_tokens=new, seeds=range(count - len(prompts), count))
        return [int(n) for n in rollout.mask.sum(1)]

    return generate


def rollouts(kind: str, here: Setting) -> Figures:
    """64 x 256 new tokens, or 256 samples that end by themselves after about 170 of at most 512, 64 at once."""
    shape = shape_of("1b", here)
    rows, prompt = (4, 8) if here.small else (64, 128)
    fixed = kind == "fixed"
    new = (8 if fixed else 16) if here.small else (256 if fixed else 512)
    ends = [] if fixed else end_ids(shape.vocabulary, 6 if here.small else 170)
    prompts = random_rows(rows if fixed else 4 * rows, prompt, shape.vocabulary)
    model = frozen(shape, here)
    sides: dict[str, Callable[[], Answers]] = {"ours": lambda: ours(model, prompts, new, ends, rows)}
    for peer in (DYNAMIC, STATIC, CONTINUOUS) if fixed else (DYNAMIC, CONTINUOUS):
        sides[peer] = lambda peer=peer: PEERS[peer](model, shape, prompts, new, ends, rows, here)  # type: ignore[misc]
    found = {name: guarded(lambda make=make: rate(make(), here)) for name, make in sides.items()}  # type: ignore[misc]
    known = {name: side["tokens_per_s"] for name, side in found.items() if "tokens_per_s" in side}
    ratios = {name: known["ours"] / x for name, x in known.items() if name != "ours"} if "ours" in known else {}
    return {"shape": asdict(shape), "rows": rows, "samples": len(prompts), "sides": found, "ratios": ratios}


def rate(generate: Answers, here: Setting) -> Figures:
    """New tokens a second, end tokens among them; the first time warms up and is not counted."""
    fresh(here)
    generate()
    runs = [timed(generate, here) for _ in range(here.repetitions)]
    rates = [sum(answers) / seconds for seconds, answers in runs]
    mean = sum(map(sum, (answers for _, answers in runs))) / sum(len(answers) for _, answers in runs)
    seconds = [seconds for seconds, _ in runs]
    return {"seconds": seconds, "tokens_per_s": median(rates), "mean_length": mean, **memory_figures(here)}


def guarded(work: Callable[[], Figures]) -> Figures:
    """The figures, or why there are none: a card is lent for minutes, so what fails must not take the rest along."""
    try:
        return work()
    except Exception as fault:  # of any library or peer: the page names it, and the next check, side or row runs
        traceback.print_exc()
        return {"failed": f"{type(fault).__name__}: {(str(fault).strip().splitlines() or ['no word'])[0][:300]}"}
