"""The engine protocol and the local engine, which samples from the module that is being trained."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kinkajou.algos import tensors
from kinkajou.batch import Rollout, Sampling, pad_rows
from kinkajou.engine.cache import Cache, Decode, Prefill
from kinkajou.engine.sampling import draw, uniforms
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel, compute_context, pack

Prompts = Sequence[Sequence[int]]


class Engine(Protocol):
    def generate(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> Rollout:
        """One sample for each prompt, in order; seeds[i] decides sample i and nothing else does."""
        ...

    def load(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Takes new weights by name."""
        ...


@dataclass(frozen=True)
class Drawn:
    """One decoding step: the new token of each still running row."""

    rows: Tensor  # (r,) indices into the prompts
    tokens: Tensor  # (r,)
    logps: Tensor  # (r,) float32


class LocalEngine:
    """Decodes with a KV cache in the trainer's own process and weights.

    `end_ids` stop a sample.  At most `max_rows` samples run at once, longest prompts together.
    """

    def __init__(self, model: LanguageModel, *, end_ids: Iterable[int], pad_id: int, max_rows: int = 64) -> None:
        self.model, self.pad_id, self.max_rows = model, pad_id, max_rows
        self.end_ids = torch.tensor(sorted(end_ids), device=model.device)

    @torch.no_grad()
    def load(self, params: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, param in params:
            if own[name].data_ptr() != param.data_ptr():
                own[name].copy_(param)

    def generate(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> Rollout:
        if not all(prompts):
            raise UserError("a prompt has no tokens", fix="give it at least a begin token or a word")
        answers: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(prompts), self.max_rows):
            chosen = by_length[start : start + self.max_rows]
            steps = self.stream(
                [prompts[i] for i in chosen],
                sampling,
                max_new_tokens=max_new_tokens,
                seeds=[seeds[i] for i in chosen],
            )
            for step in steps:
                drawn = zip(step.rows.tolist(), step.tokens.tolist(), step.logps.tolist(), strict=True)
                for row, token, logp in drawn:
                    answers[chosen[row]].append(token)
                    logps[chosen[row]].append(logp)
        return self._rollout(prompts, answers, logps)

    @torch.no_grad()
    def stream(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]
    ) -> Iterator[Drawn]:
        """Decodes all prompts together and yields every step's tokens as they are drawn."""
        device = self.model.device
        dice = uniforms(seeds, max_new_tokens).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        cache = Cache(len(prompts), int(lengths.max()) + max_new_tokens)
        logits = self._prefill(prompts, lengths, cache)
        rows = torch.arange(len(prompts), device=device)
        for i in range(max_new_tokens):
            tokens, logps = self._draw(logits, sampling, dice[rows, i])
            yield Drawn(rows, tokens, logps)
            running = ~torch.isin(tokens, self.end_ids)
            if i + 1 == max_new_tokens or not running.any():
                return
            if not running.all():
                kept = running.nonzero().squeeze(1)
                rows, tokens = rows[kept], tokens[kept]
                cache.keep(kept)
            logits = self._decode(tokens, lengths[rows] + i, cache)

    def _prefill(self, prompts: Prompts, lengths: Tensor, cache: Cache) -> Tensor:
        """Runs the packed prompts; logits of what follows each.  -> (b, v)."""
        batch = pad_rows(prompts, [[True] * len(p) for p in prompts], pad_id=self.pad_id)
        rows = pack(batch.tokens.to(lengths.device), lengths)
        with compute_context(self.model.dtype, lengths.device):
            hidden = self.model.hidden(rows.ids, rows.positions, Prefill(rows.layout, cache))
            return self.model.logits(hidden[lengths.cumsum(0) - 1])

    def _decode(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Runs one new token in each row.  (r,), (r,) -> (r, v)."""
        with compute_context(self.model.dtype, tokens.device):
            out = self.model.inner.base_model(
                input_ids=tokens[:, None],
                position_ids=positions[:, None],
                use_cache=False,
                layout=Decode(cache, positions),
            )
            return self.model.logits(out.last_hidden_state[:, 0])

    def _draw(self, logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
        cut = tensors.sampling_logits(
            logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
        tokens = cut.argmax(-1) if sampling.temperature == 0 else draw(cut, uniform)
        return tokens, tensors.token_logps(cut, tokens)

    def _rollout(self, prompts: Prompts, answers: list[list[int]], logps: list[list[float]]) -> Rollout:
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        sampled = [
            [False] * len(prompt) + [True] * len(answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        batch = pad_rows(rows, sampled, pad_id=self.pad_id)
        flat = torch.tensor([logp for row in logps for logp in row], dtype=torch.float32)
        sampler_logp = torch.zeros(batch.mask.shape).masked_scatter(batch.mask, flat)
        ends = set(self.end_ids.tolist())
        ended = torch.tensor([answer[-1] in ends for answer in answers], dtype=torch.bool)
        return Rollout(batch.tokens, batch.mask, sampler_logp, ended).to(self.model.device)
