"""The only place that packs rows, runs a model and unpacks: log-probabilities, values and scores of tokens.

Shapes: b rows, t targets, n packed tokens, k counting targets, c channels, v vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from kinkajou.algos import tensors
from kinkajou.batch import PLAIN, Sampling, lengths_of
from kinkajou.models.attention import Layout, Packed
from kinkajou.models.linear_logp import Head, linear_logp, tile_rows
from kinkajou.models.precision import Bfloat16

Dtype = Literal["fp32", "bf16"]
T = TypeVar("T")


@dataclass(frozen=True)
class TokenScores:
    """Of each counting target: log-probability and, if asked for, the distribution's entropy; 0 elsewhere.

    (b, t) float32 each.
    """

    logp: Tensor
    entropy: Tensor | None


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
        self._gathered_on: torch.device | None = None

    @property
    def inner(self) -> Any:
        """The transformers model itself, below PEFT's wrapper."""
        unwrap = getattr(self.module, "get_base_model", None)
        return unwrap() if unwrap else self.module

    @property
    def device(self) -> torch.device:
        return self._gathered_on or next(self.module.parameters()).device

    @property
    def width(self) -> int:
        """Channels of the hidden states that the head reads."""
        return int(self.inner.get_output_embeddings().in_features)

    def computing(self) -> AbstractContextManager[None]:
        """Inside, the model computes in its compute type: bf16 binds bfloat16 copies of the float32 weights.

        Softmax, losses and the scalar head stay float32.  A decoding step that binds costs microseconds.
        """
        if self.dtype == "fp32" or self._gathered_on:
            return nullcontext()
        if self._half is None or not self._half.fits(self.module):
            self._half = Bfloat16(self.module, keep=self.kept)
        return self._half.bind()

    def hand_over(self, device: torch.device) -> None:
        """From now on a strategy gathers the weights, on that device and in the compute type."""
        self._gathered_on = device

    @property
    def gathered(self) -> bool:
        """Whether a strategy gathers the weights for each pass."""
        return self._gathered_on is not None

    @property
    def root(self) -> nn.Module:
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order."""
        lists = (m for m in self.inner.base_model.modules() if isinstance(m, nn.ModuleList))
        return list(next(m for m in lists if len(m) == self.inner.config.get_text_config().num_hidden_layers))

    @property
    def wide(self) -> list[nn.Module]:
        """Modules that compute in float32 whatever the compute type."""
        return []

    def run(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Does work that reads weights in another way than `forward`: where they are sharded, they are whole inside."""
        return work(*args, **kwargs)

    def grown(self) -> None:
        """Parameters have been added: what is bound is counted anew."""
        self._half = None

    def source(self, weight: Tensor) -> Tensor:
        """The float32 parameter that a bound weight is a copy of; any other weight as it is."""
        return weight if self._half is None else self._half.source(weight)

    @property
    def kept(self) -> list[Tensor]:
        """Parameters that stay float32."""
        return []

    def computing_again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed layer: its forward pass, and its recomputation after `computing` has ended."""
        again = nullcontext() if self._half is None else self._half.again()
        return nullcontext(), again

    def freeze(self) -> Self:
        """No gradients any more; bf16 weights for good where the model computes in them."""
        self.requires_grad_(False)
        return self.settle()

    @torch.no_grad()
    def settle(self) -> Self:
        """Weights that are not trained take the compute type for good: the same numbers in half the memory."""
        kept = {id(param) for param in self.kept}
        for param in self.module.parameters():
            frozen = not param.requires_grad and param.is_floating_point()  # quantised weights are no such numbers
            if self.dtype == "bf16" and frozen and id(param) not in kept:
                param.data = param.data.to(torch.bfloat16)
        return self

    def hidden(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Last hidden states after the final norm.  (1, n), (1, n) -> (n, c)."""
        with record_function("kinkajou/trunk"):
            out = self.inner.base_model(input_ids=ids, position_ids=positions, use_cache=False, layout=layout)
        return cast(Tensor, out.last_hidden_state).squeeze(0)


class LanguageModel(PackedModel):
    """Scores the tokens of a batch under the model."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        sampling: Sampling = PLAIN,
        *,
        entropy: bool = False,
        slope: Tensor | None = None,
    ) -> TokenScores:
        """(b, t+1), (b, t) bool -> log-probability and, if asked for, entropy of every counting target.

        `slope`, one number or (b, t): what the loss's derivative by each log-probability is a multiple of; where it
        is known before, the head's gradient is made along with the log-probabilities.
        """
        rows = pack(tokens[:, :-1], read_lengths(mask))
        counting = mask[rows.inside]
        if slope is not None:
            slope = slope.expand(mask.shape)[mask]
        with self.computing():
            hidden = self.hidden(rows.ids, rows.positions, rows.layout)[counting]
            with record_function("kinkajou/head"):
                logp, found = self.score(hidden, tokens[:, 1:][mask], sampling, entropy=entropy, slope=slope)
        return TokenScores(unpacked(logp, mask), None if found is None else unpacked(found, mask))

    @torch.no_grad()
    def alignment(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """log p minus log sum p^2 over the vocabulary, of every counting target: (b, t), 0 elsewhere, no gradient."""
        rows = pack(tokens[:, :-1], read_lengths(mask))
        with self.computing():
            hidden = self.hidden(rows.ids, rows.positions, rows.layout)[mask[rows.inside]]
            found = []
            for h, y in self.tiles(hidden, tokens[:, 1:][mask]):
                logp = self.logits(h).float().log_softmax(-1)
                found.append(logp.gather(-1, y[:, None]).squeeze(-1) - (2 * logp).logsumexp(-1))
        return unpacked(torch.cat(found), mask)

    def tiles(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Positions whose logits fit a tile, in turn; one tile at least."""
        rows = tile_rows(int(self.inner.config.get_text_config().vocab_size), hidden.device)
        return list(zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True))

    def logits(self, hidden: Tensor) -> Tensor:
        """(k, c) -> (k, v)."""
        return cast(Tensor, self.inner.get_output_embeddings()(hidden))

    def score(
        self,
        hidden: Tensor,
        targets: Tensor,
        sampling: Sampling,
        *,
        entropy: bool = False,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(k, c), (k,) -> log-probability and, if asked for, entropy, (k,) float32 each."""
        layer = self.inner.get_output_embeddings()
        cut = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
        if type(layer) is nn.Linear and not cut:
            bias = None if layer.bias is None else self.source(layer.bias)
            head = Head(self.source(layer.weight), bias, layer.weight, layer.bias)
            return linear_logp(hidden, head, targets, temperature=sampling.temperature, entropy=entropy, slope=slope)

        def part(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
            logits = tensors.sampling_logits(
                self.logits(hidden),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                keep=targets,
            )
            with torch.no_grad():
                found = tensors.entropy(logits) if entropy else None
            return tensors.token_logps(logits, targets), found

        tiles = self.tiles(hidden, targets)
        if len(tiles) == 1:
            return part(hidden, targets)
        # The parameters that are bound now belong to the backward pass too.
        pieces = [checkpoint(part, h, y, use_reentrant=False, context_fn=self.computing_again) for h, y in tiles]
        logps, entropies = zip(*pieces, strict=True)
        return torch.cat(logps), torch.cat(entropies) if entropy else None


def unpacked(x: Tensor, mask: Tensor) -> Tensor:
    """(k,) in the places of the mask, 0 elsewhere.  (b, t) float32."""
    return mask.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, x)


@dataclass(frozen=True)
class SharedScores(TokenScores):
    values: Tensor  # (b, t) float32, 0 off the value mask


class ActorCritic(nn.Module):
    """A policy and, on the same trunk, a linear unit that is its critic."""

    def __init__(self, language: LanguageModel, head: nn.Linear) -> None:
        super().__init__()
        self.language, self.head = language, head

    @property
    def dtype(self) -> Dtype:
        return self.language.dtype

    @property
    def gathered(self) -> bool:
        """Whether a strategy gathers the weights for each pass."""
        return self._gathered_on is not None

    @property
    def root(self) -> nn.Module:
        return self.language

    @property
    def blocks(self) -> list[nn.Module]:
        return self.language.blocks

    @property
    def wide(self) -> list[nn.Module]:
        return [self.head]

    def hand_over(self, device: torch.device) -> None:
        self.language.hand_over(device)

    def forward(self, *args: Any, **kwargs: Any) -> SharedScores:
        """(b, t+1), (b, t), (b, t) -> log-probabilities at `mask`, values before the targets of `value_mask`.

        `entropy` and `slope` as a `LanguageModel` takes them.
        """
        return self.language.run(self._scores, *args, **kwargs)

    def _scores(
        self,
        tokens: Tensor,
        mask: Tensor,
        value_mask: Tensor | None = None,
        sampling: Sampling = PLAIN,
        *,
        entropy: bool = False,
        slope: Tensor | None = None,
    ) -> SharedScores:
        model, asked = self.language, mask if value_mask is None else value_mask
        rows = pack(tokens[:, :-1], read_lengths(mask | asked))
        if slope is not None:
            slope = slope.expand(mask.shape)[mask]
        with model.computing():
            hidden = model.hidden(rows.ids, rows.positions, rows.layout)
            read, targets = hidden[mask[rows.inside]], tokens[:, 1:][mask]
            with record_function("kinkajou/head"):
                logp, found = model.score(read, targets, sampling, entropy=entropy, slope=slope)
                values = self.head(hidden[asked[rows.inside]].float()).squeeze(-1)
        if value_mask is None:  # nobody asked for values, but DDP waits for a gradient of every weight
            logp = logp + 0 * values
        entropies = None if found is None else unpacked(found, mask)
        return SharedScores(unpacked(logp, mask), entropies, unpacked(values, asked))


class ScalarModel(PackedModel):
    """A trunk with one linear unit: a reward model read at the end, a critic read at every target."""

    @property
    def score_head(self) -> nn.Module:
        return cast(nn.Module, self.inner.score)

    @property
    def wide(self) -> list[nn.Module]:
        return [self.score_head]

    @property
    def kept(self) -> list[Tensor]:
        return list(self.score_head.parameters())

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
            with record_function("kinkajou/head"):
                out = cast(Tensor, self.score_head(hidden.float())).squeeze(-1)
        holes = mask if at == "targets" else lengths > 0
        return out.new_zeros(holes.shape).masked_scatter(holes, out)
