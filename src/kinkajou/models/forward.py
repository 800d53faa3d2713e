"""The only place that packs rows, runs a model and unpacks: log-probabilities, values and scores of tokens.

Shapes: b rows, t targets, n packed tokens, k counting targets, c channels, v vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kinkajou.algos import tensors
from kinkajou.batch import PLAIN, Sampling, lengths_of
from kinkajou.models.attention import Layout, Packed
from kinkajou.models.precision import Bfloat16

Dtype = Literal["fp32", "bf16"]
LOGITS_BUDGET = 2**27
"""Logits (k x v elements) above which the head runs in chunks that are recomputed in the backward pass."""


@dataclass(frozen=True)
class TokenScores:
    """Per counting target: log-probability and entropy of the distribution, (b, t) float32, 0 elsewhere."""

    logp: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class PackedRows:
    ids: Tensor  # (1, n)
    positions: Tensor  # (1, n)
    layout: Packed
    inside: Tensor  # (b, width) bool: where row entries went, in row-major order


def pack(tokens: Tensor, lengths: Tensor) -> PackedRows:
    """Lays the first lengths[i] tokens of each row end to end.  (b, width), (b,)."""
    at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    inside = at < lengths[:, None]
    bounds = torch.cat([lengths.new_zeros(1), lengths[lengths > 0].cumsum(0)])
    return PackedRows(tokens[inside][None], at[inside][None], Packed(tuple(bounds.tolist())), inside)


def read_lengths(mask: Tensor) -> Tensor:
    """Tokens of each row that come before its last counting target: what the trunk reads.  (b, t) -> (b,).

    One token where no row has a target (all answers masked), so that the model runs and every rank has a gradient.
    """
    lengths = (lengths_of(mask) - 1).clamp(min=0)
    first = torch.arange(len(lengths), device=mask.device) == 0
    return lengths + (first & ~lengths.any())


class PackedModel(nn.Module):
    """A transformers model, plain or wrapped by PEFT, that is run on packed tokens."""

    def __init__(self, module: nn.Module, *, dtype: Dtype = "fp32") -> None:
        super().__init__()
        self.module, self.dtype = module, dtype
        self._half: Bfloat16 | None = None

    @property
    def inner(self) -> Any:
        """The transformers model itself, below PEFT's wrapper."""
        unwrap = getattr(self.module, "get_base_model", None)
        return unwrap() if unwrap else self.module

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def width(self) -> int:
        """Channels of the hidden states that the head reads."""
        return int(self.inner.get_output_embeddings().weight.shape[1])

    def computing(self) -> AbstractContextManager[None]:
        """Inside, the model computes in its compute type: bf16 binds bfloat16 copies of the float32 weights.

        Softmax, losses and the scalar head stay float32.  A decoding step that binds costs microseconds.
        """
        if self.dtype == "fp32":
            return nullcontext()
        if self._half is None or not self._half.fits(self.module):
            self._half = Bfloat16(self.module, keep=self.kept)
        return self._half.bind()

    @property
    def kept(self) -> list[Tensor]:
        """Parameters that stay float32."""
        return []

    def computing_again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed layer: its forward pass, and its recomputation after `computing` has ended."""
        again = nullcontext() if self._half is None else self._half.again()
        return nullcontext(), again

    @torch.no_grad()
    def freeze(self) -> Self:
        """No gradients any more; bf16 weights for good where the model computes in them, in half the memory."""
        self.requires_grad_(False)
        kept = {id(param) for param in self.kept}
        for param in self.module.parameters():
            if self.dtype == "bf16" and id(param) not in kept:
                param.data = param.data.to(torch.bfloat16)
        return self

    def hidden(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Last hidden states after the final norm.  (1, n), (1, n) -> (n, c)."""
        out = self.inner.base_model(input_ids=ids, position_ids=positions, use_cache=False, layout=layout)
        return cast(Tensor, out.last_hidden_state).squeeze(0)


class LanguageModel(PackedModel):
    """Scores the tokens of a batch under the model."""

    def forward(self, tokens: Tensor, mask: Tensor, sampling: Sampling = PLAIN) -> TokenScores:
        """(b, t+1), (b, t) bool -> log-probability and entropy of every counting target."""
        rows = pack(tokens[:, :-1], read_lengths(mask))
        counting = mask[rows.inside]
        with self.computing():
            hidden = self.hidden(rows.ids, rows.positions, rows.layout)[counting]
            logp, entropy = self.score(hidden, tokens[:, 1:][mask], sampling)
        unpacked = mask.new_zeros(mask.shape, dtype=torch.float32)
        return TokenScores(unpacked.masked_scatter(mask, logp), unpacked.masked_scatter(mask, entropy))

    @torch.no_grad()
    def alignment(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """log p minus log sum p^2 over the vocabulary, of every counting target: (b, t), 0 elsewhere, no gradient."""
        rows = pack(tokens[:, :-1], read_lengths(mask))
        with self.computing():
            hidden = self.hidden(rows.ids, rows.positions, rows.layout)[mask[rows.inside]]
            found = []
            for h, y in zip(torch.split(hidden, self.chunk), torch.split(tokens[:, 1:][mask], self.chunk), strict=True):
                logp = self.logits(h).float().log_softmax(-1)
                found.append(logp.gather(-1, y[:, None]).squeeze(-1) - (2 * logp).logsumexp(-1))
        return mask.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, torch.cat(found))

    @property
    def chunk(self) -> int:
        """Positions whose logits fit the budget."""
        return max(1, LOGITS_BUDGET // int(self.inner.config.get_text_config().vocab_size))

    def logits(self, hidden: Tensor) -> Tensor:
        """(k, c) -> (k, v)."""
        return cast(Tensor, self.inner.get_output_embeddings()(hidden))

    def score(self, hidden: Tensor, targets: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """(k, c), (k,) -> log-probability and entropy, (k,) float32 each."""

        def part(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = tensors.sampling_logits(
                self.logits(hidden),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                keep=targets,
            )
            with torch.no_grad():
                entropy = tensors.entropy(logits)
            return tensors.token_logps(logits, targets), entropy

        chunk = self.chunk
        if len(hidden) <= chunk:
            return part(hidden, targets)
        pieces = [
            checkpoint(part, h, y, use_reentrant=False)
            for h, y in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        ]
        return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


@dataclass(frozen=True)
class SharedScores(TokenScores):
    values: Tensor  # (b, t) float32, 0 off the value mask


class ActorCritic(nn.Module):
    """A policy and, on the same trunk, a linear unit that is its critic."""

    def __init__(self, language: LanguageModel, head: nn.Linear) -> None:
        super().__init__()
        self.language, self.head = language, head

    def forward(
        self, tokens: Tensor, mask: Tensor, value_mask: Tensor | None = None, sampling: Sampling = PLAIN
    ) -> SharedScores:
        """(b, t+1), (b, t), (b, t) -> log-probabilities at `mask`, values before the targets of `value_mask`."""
        model, asked = self.language, mask if value_mask is None else value_mask
        rows = pack(tokens[:, :-1], read_lengths(mask | asked))
        with model.computing():
            hidden = model.hidden(rows.ids, rows.positions, rows.layout)
            logp, entropy = model.score(hidden[mask[rows.inside]], tokens[:, 1:][mask], sampling)
            values = self.head(hidden[asked[rows.inside]].float()).squeeze(-1)
        if value_mask is None:  # nobody asked for values, but DDP waits for a gradient of every weight
            logp = logp + 0 * values
        empty = mask.new_zeros(mask.shape, dtype=torch.float32)
        scored = (empty.masked_scatter(where, x) for where, x in ((mask, logp), (mask, entropy), (asked, values)))
        return SharedScores(*scored)


class ScalarModel(PackedModel):
    """A trunk with one linear unit: a reward model read at the end, a critic read at every target."""

    @property
    def kept(self) -> list[Tensor]:
        return list(self.inner.score.parameters())

    def forward(self, tokens: Tensor, mask: Tensor, *, at: Literal["end", "targets"]) -> Tensor:
        """(b, t+1), (b, t) bool -> (b,) scores of the last real token, or (b, t) values before each target.

        A value belongs to the state in which its target was chosen, so it does not see the target.  A row
        without a counting target scores 0.
        """
        lengths = lengths_of(mask)
        if at == "targets":
            rows = pack(tokens[:, :-1], read_lengths(mask))
            where = mask[rows.inside]
        else:
            rows = pack(tokens, lengths)
            where = rows.positions[0] + 1 == lengths.repeat_interleave(lengths)
        with self.computing():
            hidden = self.hidden(rows.ids, rows.positions, rows.layout)[where]
            out = cast(Tensor, self.inner.score(hidden.float())).squeeze(-1)
        holes = mask if at == "targets" else lengths > 0
        return out.new_zeros(holes.shape).masked_scatter(holes, out)
