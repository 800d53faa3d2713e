"""Continuous batching: samples wait in a queue, run in slots and leave them at different times.

`step()` is the whole of it: fill free slots, or let every running sample say its next tokens.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import record_function

from kinkajou.batch import Sampling
from kinkajou.engine.cache import Cache
from kinkajou.engine.graphs import Graphs
from kinkajou.engine.sampling import penalised, pick
from kinkajou.engine.scheduler import Decoder, Sample, Scheduler
from kinkajou.models.attention import Layout, Packed
from kinkajou.models.forward import LanguageModel
from kinkajou.models.packing import Repacked

BLOCK = 8
"""Steady steps have a multiple of so many rows: a CPU's products give other bits to fewer than 4, and its elementwise
functions to what is left over after a multiple of 32 numbers, of which the width brings 4."""
BURST = 8
"""Tokens that a GPU draws for every row before the host looks whether a sample has ended."""


@dataclass(frozen=True)
class Said:
    """One token of one sample."""

    sample: Sample
    token: int
    logp: float
    own: float = math.nan
    """Its log-probability before temperature and cuts, where the sample asks for that."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The tokens that the model held most likely, and their log-probabilities."""


Opinion = tuple[float, tuple[tuple[int, float], ...]]
"""`Said.own` and `Said.likeliest`."""


class Session:
    """Samples of one model, at most `rows` at once, over a cache that has room for each of them.

    `steady`: a sample's logits have the same bits whatever runs beside it, on a CPU in float32.  Each prompt then goes
    through the model by itself, and a step has a multiple of `block` rows, for which the cache must have slots.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache,
        *,
        rows: int,
        room: int,
        end_ids: Iterable[int],
        sharded: bool = False,
        steady: bool = False,
    ) -> None:
        self.steady, self.block = steady, block(rows, model.device) if steady else 1
        self.sharded = sharded
        """Whether every step must be one pass through the model, which all ranks make together."""
        self.model, self.cache, self.room = model, cache, room
        self.device, self.ends = model.device, set(end_ids)
        self.scheduler = Scheduler(rows)
        self.decode: Decoder | None = None
        self.layers: Repacked | None = None
        self.graphs = Graphs(self._next, rows, every=not steady) if self.device.type == "cuda" and not sharded else None
        self._lay: list[int] = []
        self._first: dict[tuple[int, ...], Tensor] = {}
        """Logits after a prompt, as long as samples wait that start with it."""

    def renew(self, decode: Decoder | None) -> None:
        """Before a session is used again: graphs that read weights which have moved since are recorded anew."""
        self.decode = decode
        if self.graphs is None:
            return
        with torch.no_grad(), self.model.computing():
            lie = [param.data_ptr() for param in self.model.parameters()]
        if lie != self._lay:
            self.graphs.forget()
        self._lay = lie

    def add(self, sample: Sample) -> None:
        self.scheduler.add(sample)

    def drop(self, sample: Sample) -> None:
        """Ends a sample that waits or runs, between steps: its slot is free for the next one."""
        if sample.finished:
            return
        sample.finished = "dropped"
        if sample in self.scheduler.waiting:
            self.scheduler.leave(sample)
            if sample.prompt not in self.scheduler.wanted:
                self._first.pop(sample.prompt, None)
        else:
            self.scheduler.drop_finished(self.cache.move, self.cache.release)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.no_grad()
    def step(self) -> list[Said]:
        """The tokens said now, sample by sample in the order of time; none if nothing is left to do."""
        if not self.busy:
            return self._keep_company()
        with self.model.computing():
            if not self.sharded:  # else weights come and go with every pass
                self.layers = self.layers or Repacked(self.model.module, rows=self.scheduler.rows)
            with self.layers.in_place() if self.layers else nullcontext():
                said = self._start(self.scheduler.admit()) if self.scheduler.due else self._go_on()
        self.scheduler.drop_finished(self.cache.move, self.cache.release)
        return said

    def _keep_company(self) -> list[Said]:
        """A pass of one token that other ranks need."""
        if self.sharded:
            none = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            self.model.hidden(none, none, Packed((0, 1)))
        return []

    def _start(self, admitted: list[Sample]) -> list[Said]:
        """Runs each prompt that no running sample has, once; draws every new sample's first token."""
        running = self.scheduler.running
        holders = {sample.prompt: slot for slot, sample in enumerate(running) if sample.prompt in self._first}
        fresh: dict[tuple[int, ...], int] = {}
        for slot, sample in enumerate(admitted, len(running)):
            if sample.prompt not in holders:
                fresh[sample.prompt] = holders[sample.prompt] = slot
        if fresh:
            groups = [[prompt] for prompt in fresh] if self.steady else [list(fresh)]
            for prompts in groups:
                logits = self._prefill(prompts, [fresh[prompt] for prompt in prompts])
                self._first |= dict(zip(prompts, logits, strict=True))
        else:
            self._keep_company()
        for slot, sample in enumerate(admitted, len(running)):
            if holders[sample.prompt] != slot:
                self.cache.copy(holders[sample.prompt], slot, len(sample.prompt))
        logits = torch.stack([self._first[sample.prompt] for sample in admitted])
        running += admitted
        self._first = {prompt: row for prompt, row in self._first.items() if prompt in self.scheduler.wanted}
        with record_function("kinkajou/sample"):
            tokens, logps = self._draw(logits, admitted, self._dice(admitted, 1)[0])
            told = opinions(logits, tokens, admitted)
        return self._taken(admitted, [tokens], [logps], [told])

    def _prefill(self, prompts: list[tuple[int, ...]], slots: list[int]) -> Tensor:
        """Logits of what follows each prompt.  -> (len(prompts), v)."""
        with record_function("kinkajou/prefill"):
            bounds = (0, *accumulate(len(prompt) for prompt in prompts))
            ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=self.device)
            positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None].to(self.device)
            hidden = self.model.hidden(ids, positions, self.cache.prefill(Packed(bounds), slots))
            return self.model.logits(hidden[torch.tensor(bounds[1:], device=self.device) - 1])

    def _go_on(self) -> list[Said]:
        """The next token of every running sample; on a GPU several, of which those after an end are thrown away."""
        running = self.scheduler.running
        steps = self._burst(running)
        tokens = torch.tensor([sample.tokens[-1] for sample in running], device=self.device)
        positions = torch.tensor([sample.length for sample in running], device=self.device)
        dice = self._dice(running, steps)
        found = []
        told: list[dict[int, Opinion]] = []
        for i in range(steps):
            if self.graphs is not None and self._alike(running) and not curious(running):
                with record_function("kinkajou/decode"):
                    drawn = self.graphs.run(tokens, positions + i, dice[i], running[0].sampling)
                told.append({})
            else:
                with record_function("kinkajou/decode"):
                    longest = max(sample.length for sample in running) + 1 + i
                    logits = self._filled(tokens, positions + i, longest)
                with record_function("kinkajou/sample"):
                    drawn = self._draw(logits, running, dice[i])
                    told.append(opinions(logits, drawn[0], running))
            tokens = drawn[0]
            found.append(drawn)
        return self._taken(running, [x for x, _ in found], [y for _, y in found], told)

    def _burst(self, running: list[Sample]) -> int:
        """What needs the text so far needs every token at once; no sample runs over its end of the cache."""
        if (
            self.device.type == "cpu"
            or self.sharded
            or not self._alike(running)
            or any(sample.stops for sample in running)
        ):
            return 1
        return min(BURST, *(sample.max_new_tokens - len(sample.tokens) for sample in running))

    def _alike(self, running: list[Sample]) -> bool:
        return len({sample.sampling for sample in running}) == 1 and running[0].sampling.repetition_penalty == 1.0

    def _next(self, tokens: Tensor, positions: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """One step on tensors alone: what a CUDA graph records."""
        layout = self.cache.decode(positions)
        return pick(self._logits(tokens, positions, layout), sampling, uniform)

    def _filled(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """A step with rows of no account, at the start of free slots, up to a multiple of `block`."""
        n = len(tokens)
        if missing := -n % self.block:
            tokens, positions = (pad(x, (0, missing)) for x in (tokens, positions))
        layout = self.cache.decode(positions, None if self.steady else longest)
        return self._logits(tokens, positions, layout)[:n]

    def _logits(self, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Runs one new token in each slot.  (n,), (n,) -> (n, v)."""
        out = self.model.inner.base_model(
            input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False, layout=layout
        )
        return self.model.logits(out.last_hidden_state[:, 0])

    def _dice(self, samples: list[Sample], steps: int) -> Tensor:
        """The samples' next uniform numbers, handed to the device at once.  -> (steps, n) float64."""
        said = [len(sample.tokens) for sample in samples]
        rows = [[sample.dice[n + i] for sample, n in zip(samples, said, strict=True)] for i in range(steps)]
        return torch.tensor(rows, dtype=torch.float64, device=self.device)

    def _draw(self, logits: Tensor, samples: list[Sample], uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each sample from its own distribution, by its own number.  (n, v) -> (n,), (n,)."""
        if self._alike(samples):
            return pick(logits, samples[0].sampling, uniform)
        tokens = torch.empty(len(samples), dtype=torch.long, device=self.device)
        logps = torch.empty(len(samples), device=self.device)
        for sampling in dict.fromkeys(sample.sampling for sample in samples):
            rows = [i for i, sample in enumerate(samples) if sample.sampling == sampling]
            part = logits[rows]
            if sampling.repetition_penalty != 1.0:
                part = torch.stack([self._penalised(logits[i], samples[i]) for i in rows])
            tokens[rows], logps[rows] = pick(part, sampling, uniform[rows])
        return tokens, logps

    def _penalised(self, logits: Tensor, sample: Sample) -> Tensor:
        seen = torch.tensor([*sample.prompt, *sample.tokens], device=self.device)
        return penalised(logits, seen, sample.sampling.repetition_penalty)

    def _taken(
        self, samples: list[Sample], tokens: list[Tensor], logps: list[Tensor], told: list[dict[int, Opinion]]
    ) -> list[Said]:
        """Hands drawn tokens to their samples; those after a sample's end do not count.  (n,) for each step."""
        said = []
        steps = zip(torch.stack(tokens).tolist(), torch.stack(logps).tolist(), told, strict=True)
        for row_tokens, row_logps, opinion in steps:
            for i, (sample, token, logp) in enumerate(zip(samples, row_tokens, row_logps, strict=True)):
                if not sample.finished:
                    sample.take(token, logp, self.ends, self.decode)
                    said.append(Said(sample, token, logp, *opinion.get(i, ())))
        return said


def block(rows: int, device: torch.device) -> int:
    """Bits do not depend on the number of rows if it is a multiple of this: on a GPU each number has its kernels."""
    return BLOCK if device.type == "cpu" else rows


def curious(samples: list[Sample]) -> bool:
    return any(sample.likeliest is not None for sample in samples)


def opinions(logits: Tensor, tokens: Tensor, samples: list[Sample]) -> dict[int, Opinion]:
    """For each row that asks: its token's own log-probability, and the likeliest tokens.  (n, v), (n,)."""
    if not curious(samples):
        return {}
    rows = [i for i, sample in enumerate(samples) if sample.likeliest is not None]
    most = max(samples[i].likeliest or 0 for i in rows)
    logps = logits[rows].float().log_softmax(-1)
    own = logps.gather(-1, tokens[rows, None]).squeeze(-1).tolist()
    values, indices = logps.topk(min(most, logps.shape[-1]))
    pairs = zip(rows, own, indices.tolist(), values.tolist(), strict=True)
    return {i: (x, tuple(zip(ids, ps, strict=True))[: samples[i].likeliest]) for i, x, ids, ps in pairs}
