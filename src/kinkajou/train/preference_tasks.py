"""What learning from pairs and from single judged answers do differently: rows, batches, the whole-batch pass, loss."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kinkajou.algos import dpo
from kinkajou.algos.kto import reference_point
from kinkajou.algos.losses import Loss
from kinkajou.batch import JudgedBatch, PreferenceBatch, TokenBatch, pad_rows
from kinkajou.config import PreferenceLossConfig
from kinkajou.data.chat import Encoded
from kinkajou.memory import Budget
from kinkajou.models.forward import LanguageModel
from kinkajou.parallel.strategy import Strategy
from kinkajou.train import preference_losses as losses
from kinkajou.train.preference_rows import Compared, JudgedRow, cut_to_fit
from kinkajou.train.reference import Questions, token_logps
from kinkajou.train.update import in_parts

B = TypeVar("B", bound=TokenBatch)


class PreferenceTask(Protocol):
    """Rows are numbered: those to train on, then those held out."""

    @property
    def longest(self) -> int: ...

    def questions(self, batches: Iterable[Sequence[int]]) -> Questions:
        """What the reference must answer for these batches, each the whole of one step."""
        ...

    def with_reference(self, logps: Tensor) -> "PreferenceTask": ...

    def batch(self, chosen: Sequence[int]) -> TokenBatch: ...

    def prepare(
        self, policy: LanguageModel, batch: Any, everyone: Sequence[int], s: Strategy, budget: int | Budget
    ) -> TokenBatch:
        """The batch with what depends on the whole of the step; `everyone` are its rows on all ranks."""
        ...

    def loss(self, model: nn.Module, batch: Any, count: Tensor) -> Loss: ...


@dataclass(frozen=True)
class PairTask:
    method: PreferenceLossConfig
    rows: Sequence[Compared]
    pad_id: int
    ref_logp: Tensor | None = None  # (n, 2)

    @property
    def longest(self) -> int:
        return max(len(side.tokens) for row in self.rows for side in row)

    def questions(self, batches: Iterable[Sequence[int]]) -> Questions:
        sides = [side for row in self.rows for side in row]
        shared = [min(sum(side.counts) for side in row) for row in self.rows for _ in row]
        return Questions(sides, shared, self.method.ld_alpha)

    def with_reference(self, logps: Tensor) -> "PairTask":
        return dataclasses.replace(self, ref_logp=logps.view(-1, 2))

    def batch(self, chosen: Sequence[int]) -> PreferenceBatch:
        sides = [side for i in chosen for side in self.rows[i]]
        both = pad_rows([side.tokens for side in sides], [side.counts for side in sides], pad_id=self.pad_id)
        width = both.mask.shape[1]  # not -1: a rank may have no row of a small held-out set
        tokens, answer = both.tokens.view(len(chosen), 2, width + 1), both.mask.view(len(chosen), 2, width)
        mask = answer
        if "orpo" in self.method.names:  # its likelihood term is of the prompt too
            real = torch.tensor([[len(self.rows[i][0].tokens)] for i in chosen])
            all_of_it = torch.arange(1, width + 1) < real
            mask = torch.stack([all_of_it, answer[:, 1]], 1)
        known = torch.zeros(len(chosen), 2) if self.ref_logp is None else self.ref_logp[list(chosen)]
        ones, none = torch.ones(len(chosen)), torch.zeros(len(chosen), 3)
        return PreferenceBatch(tokens, mask, answer, known, ones, none)

    def prepare(
        self, policy: LanguageModel, batch: PreferenceBatch, everyone: Sequence[int], s: Strategy, budget: int | Budget
    ) -> PreferenceBatch:
        if self.method.use_weighting:
            weight = in_parts(batch, budget, lambda part: self._weight(policy, part), s.passes)
            batch = dataclasses.replace(batch, weight=weight)
        if self.method.names & {"aot", "aot_unpaired"}:

            def both(part: PreferenceBatch) -> Tensor:
                return torch.cat([self._sides(policy, part).logp, part.ref_logp], 1)

            own = in_parts(batch, budget, both, s.passes)
            whole = torch.tensor(s.gather(own.tolist()), device=own.device)
            batch = dataclasses.replace(batch, partners=partners(whole)[s.rank :: s.world])
        return batch

    def loss(self, model: nn.Module, batch: PreferenceBatch, count: Tensor) -> Loss:
        sides = self._sides(model, batch)
        values = {name: losses.pair_loss(name, sides, self.method, count) for name, _ in self.method.terms}
        return losses.summed(values, self.method, losses.pair_metrics(sides, self.method, count[0]))

    def _sides(self, model: nn.Module, b: PreferenceBatch) -> losses.Sides:
        both = b.stacked()
        logp = model(both.tokens, both.mask).logp.view(b.mask.shape)
        said = logp * b.answer
        lengths = b.answer.sum(-1)
        scales = dpo.length_weights(b.answer, lengths.amin(1, keepdim=True), self.method.ld_alpha)
        nll, whole_nll = -said[:, 0].sum(-1), -logp[:, 0].sum(-1)
        return losses.Sides((said * scales).sum(-1), b.ref_logp, lengths, b.weight, b.partners, nll, whole_nll)

    def _weight(self, policy: LanguageModel, b: PreferenceBatch) -> Tensor:
        tokens, answer = b.tokens.flatten(0, 1), b.answer.flatten(0, 1)
        return dpo.policy_weight(policy.run(policy.alignment, tokens, answer).view(b.answer.shape), b.answer)


def partners(whole: Tensor) -> Tensor:
    """What AOT compares each pair with.  (n, 4): policy's and reference's logp of both sides -> (n, 3)."""
    logp, ref_logp = whole[:, :2], whole[:, 2:]
    chosen, rejected = (logp - ref_logp).unbind(1)
    gaps = logp[:, 0] - logp[:, 1], ref_logp[:, 0] - ref_logp[:, 1]
    found = (dpo.sorted_partner(*gaps), dpo.sorted_partner(chosen, rejected), dpo.sorted_partner(rejected, chosen))
    return torch.stack(found, 1)


@dataclass(frozen=True)
class JudgedTask:
    method: PreferenceLossConfig
    rows: Sequence[JudgedRow]
    pad_id: int
    max_len: int
    ref_logp: Tensor | None = None  # (n,)
    mixed: dict[tuple[int, int], int] = field(default_factory=dict)
    """Where `ref_logp` holds the answer of one row to the prompt of another."""

    @property
    def longest(self) -> int:
        prompts, answers = ([len(row.prompt) for row in self.rows], [len(row.answer.tokens) for row in self.rows])
        wanted = max(map(sum, zip(prompts, answers, strict=True)))
        if "kto" in self.method.names:  # any answer may follow any prompt
            wanted = max(prompts) + max(answers)
        return min(wanted, self.max_len)

    def questions(self, batches: Iterable[Sequence[int]]) -> Questions:
        asked = [self._joined(i, i) for i in range(len(self.rows))]
        if "kto" in self.method.names:
            for place in (place for batch in batches for place in mismatched(batch)):
                if place not in self.mixed:
                    self.mixed[place] = len(asked)
                    asked.append(self._joined(*place))
        return Questions(asked, [len(row.tokens) for row in asked])

    def with_reference(self, logps: Tensor) -> "JudgedTask":
        return dataclasses.replace(self, ref_logp=logps)

    def batch(self, chosen: Sequence[int]) -> JudgedBatch:
        rows = self._padded([(i, i) for i in chosen])
        good = torch.tensor([self.rows[i].good for i in chosen], dtype=torch.bool)
        known = torch.zeros(len(chosen)) if self.ref_logp is None else self.ref_logp[list(chosen)]
        return JudgedBatch(rows.tokens, rows.mask, good, known, torch.zeros(len(chosen)))

    def prepare(
        self, policy: LanguageModel, batch: JudgedBatch, everyone: Sequence[int], s: Strategy, budget: int | Budget
    ) -> JudgedBatch:
        if "kto" not in self.method.names:
            return batch
        assert self.ref_logp is not None
        own = mismatched(everyone)[s.rank :: s.world]
        mixed = self._padded(own).to(s.device)
        logp = in_parts(mixed, budget, lambda part: token_logps(policy, part), s.passes).sum(1)
        ref_logp = self.ref_logp[[self.mixed[place] for place in own]].to(s.device)
        point = reference_point(torch.tensor(s.gather((logp - ref_logp).tolist())))
        return dataclasses.replace(batch, kl=batch.kl.new_full(batch.kl.shape, point.item()))

    def loss(self, model: nn.Module, batch: JudgedBatch, count: Tensor) -> Loss:
        logp = model(batch.tokens, batch.mask).logp.sum(1)
        known = logp, batch.ref_logp, batch.good, batch.kl
        values = {name: losses.judged_loss(name, *known, self.method, count) for name, _ in self.method.terms}
        return losses.summed(values, self.method, losses.judged_metrics(*known, self.method, count))

    def _joined(self, prompt: int, answer: int) -> Encoded:
        return cut_to_fit(self.rows[prompt].prompt, self.rows[answer].answer, self.max_len)

    def _padded(self, places: Sequence[tuple[int, int]]) -> TokenBatch:
        rows = [self._joined(*place) for place in places]
        return pad_rows([row.tokens for row in rows], [row.counts for row in rows], pad_id=self.pad_id)


def mismatched(batch: Sequence[int]) -> list[tuple[int, int]]:
    """Each row's prompt with the answer of the next row of the batch, the last with the first."""
    return list(zip(batch, [*batch[1:], *batch[:1]], strict=True))
