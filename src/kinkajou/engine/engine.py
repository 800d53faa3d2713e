"""The engine protocol and the local engine, which samples from the module that is being trained."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kinkajou.batch import Passes, Rollout, Sampling, pad_rows
from kinkajou.engine.cache import Cache, Slots
from kinkajou.engine.paged import Pages, can_page
from kinkajou.engine.scheduler import Decoder, Sample
from kinkajou.engine.session import Session, block
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel

Prompts = Sequence[Sequence[int]]


class Engine(Protocol):
    def generate(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> Rollout:
        """One sample for each prompt, in order; seeds[i] decides sample i and nothing else does."""
        ...

    def load(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Takes new weights by name."""
        ...

    def close(self) -> None:
        """Ends what the engine has started: workers, servers."""
        ...


class AheadEngine(Engine, Protocol):
    """An engine that samples while its caller does something else."""

    staleness: float
    """Times that weights have been loaded since those that the last answers were sampled with, in the mean."""

    def begin(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> None:
        """Starts, with the weights as they are now, on what `generate` will be asked for with these seeds."""
        ...

    def begun(self) -> "list[Begun]":
        """All that was begun and not asked for yet, once it is answered."""
        ...

    def take_up(self, begun: "Sequence[Begun]") -> None:
        """Goes on from what another engine had begun."""
        ...


class Answered(NamedTuple):
    """What was sampled to one prompt."""

    tokens: list[int]
    logps: list[float]
    ended: bool


@dataclass(frozen=True)
class Begun:
    """Answers that were begun ahead: to which seeds, and how many loads of weights ago (`AheadEngine.begin`)."""

    seeds: tuple[int, ...]
    answers: list[Answered]
    behind: int


class OwnedEngine(Engine, Protocol):
    """An engine of one process, through which others ask too."""

    staleness: float

    def answers(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Answered]:
        """What `generate` puts into a batch."""
        ...


@dataclass(frozen=True)
class Drawn:
    """One decoding step: the new token of each row that got one."""

    rows: list[int]  # indices into the prompts
    tokens: list[int]
    logps: list[float]


class LocalEngine:
    """Decodes with a KV cache in the trainer's own process and weights.

    `end_ids` stop a sample.  At most `max_rows` samples run at once; a slot that comes free is filled again.
    `decode` (tokens of an answer -> text) is needed for stop texts alone.  `passes` is given where the model is
    sharded: every step is then one pass that all ranks make together, also those that have no sample left.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        end_ids: Iterable[int],
        pad_id: int,
        max_rows: int = 64,
        decode: Decoder | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.model, self.pad_id, self.max_rows, self.decode = model, pad_id, max_rows, decode
        self.passes = passes
        self.end_ids = sorted(set(end_ids))
        self._kept: Session | None = None

    @torch.no_grad()
    def load(self, params: Iterable[tuple[str, Tensor]]) -> None:
        if self.passes:  # it reads the trainer's own shards
            return
        own = dict(self.model.named_parameters())
        for name, param in params:
            if own[name].data_ptr() != param.data_ptr():
                own[name].copy_(param)

    def close(self) -> None:
        return None

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        stops: Sequence[str] = (),
    ) -> Rollout:
        samples = self.samples(prompts, sampling, max_new_tokens=max_new_tokens, seeds=seeds, stops=stops)
        return as_rollout(prompts, self.answers(samples), pad_id=self.pad_id).to(self.model.device)

    def answers(self, samples: Sequence[Sample]) -> list[Answered]:
        """Runs the samples to their ends."""
        session = self.session(samples)
        while (self.passes or int)(session.busy):
            self.model.run(session.step)
        return [Answered(sample.tokens, sample.logps, sample.finished != "length") for sample in samples]

    def stream(self, samples: Sequence[Sample]) -> Iterator[Drawn]:
        """Every step's tokens as they are drawn."""
        session = self.session(samples)
        while session.busy:
            said = session.step()
            yield Drawn([x.sample.number for x in said], [x.token for x in said], [x.logp for x in said])

    def samples(
        self,
        prompts: Prompts,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        stops: Sequence[str] = (),
    ) -> list[Sample]:
        if not all(prompts):
            raise UserError("a prompt has no tokens", fix="give it at least a begin token or a word")
        if stops and self.decode is None:
            raise RuntimeError("stop texts need an engine with a decoder")
        return [
            Sample(i, tuple(prompt), seed, max_new_tokens, sampling, tuple(stops))
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def session(
        self, samples: Sequence[Sample], *, rows: int | None = None, room: int = 0, steady: bool = False
    ) -> Session:
        """A session with those samples in its queue; slots for `rows` of them (or as many as may run at once) of
        `room` tokens (or what the longest may come to).

        On a GPU the last one is used again where it is free and large enough: its graphs are recorded.
        """
        rows = rows or min(self.max_rows, max(1, len(samples)))
        room = max(room, *(len(sample.prompt) + sample.max_new_tokens for sample in samples), 1)
        session = None if steady else self._kept
        if session is None or session.busy or session.scheduler.rows < rows or session.room < room:
            session = Session(
                self.model,
                self._cache(rows + -rows % block(rows, self.model.device) if steady else rows, room),
                rows=rows,
                room=room,
                end_ids=self.end_ids,
                sharded=self.passes is not None,
                steady=steady,
            )
        self._kept = session if self.model.device.type == "cuda" and not steady else None
        session.renew(self.decode)
        for sample in samples:
            session.add(sample)
        return session

    def _cache(self, rows: int, room: int) -> Cache:
        dtype = torch.bfloat16 if self.model.dtype == "bf16" else torch.float32
        alibi = self.model.inner.config.model_type == "bloom"
        if can_page(self.model.device, dtype, alibi=alibi):
            return Pages(rows, room, self.model.device)
        return Slots(rows, room)


def as_rollout(prompts: Prompts, answers: Sequence[Answered], *, pad_id: int) -> Rollout:
    """Answers to prompts as a batch on the host."""
    pairs = list(zip(prompts, answers, strict=True))
    rows = [[*prompt, *answer.tokens] for prompt, answer in pairs]
    sampled = [[False] * len(prompt) + [True] * len(answer.tokens) for prompt, answer in pairs]
    batch = pad_rows(rows, sampled, pad_id=pad_id)
    flat = torch.tensor([logp for answer in answers for logp in answer.logps], dtype=torch.float32)
    sampler_logp = torch.zeros(batch.mask.shape).masked_scatter(batch.mask, flat)
    ended = torch.tensor([answer.ended for answer in answers], dtype=torch.bool)
    return Rollout(batch.tokens, batch.mask, sampler_logp, ended)
