"""The engine protocol over a pool of workers, and sampling ahead of the trainer."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from kinkajou.batch import Rollout, Sampling
from kinkajou.engine.engine import Answered, Begun, Prompts, as_rollout
from kinkajou.engine.pool import Batch, Pool
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel


class PoolEngine:
    """Workers that have the weights of a model of the trainer's; the first `load` brings them up."""

    def __init__(self, pool: Pool, model: LanguageModel) -> None:
        self.pool, self.model = pool, model
        self.trained = {name for name, param in model.named_parameters() if param.requires_grad}
        self.staleness = 0.0
        self._started = False
        self._begun: dict[tuple[int, ...], Batch] = {}
        self._given: dict[tuple[int, ...], Begun] = {}

    def begin(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> None:
        if not all(prompts):
            raise UserError("a prompt has no tokens", fix="give it at least a begin token or a word")
        key = tuple(seeds)
        if key not in self._begun and key not in self._given:
            self._begun[key] = self.pool.submit(prompts, sampling, max_new_tokens=max_new_tokens, seeds=seeds)

    def answers(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Answered]:
        if given := self._given.pop(tuple(seeds), None):
            self.staleness = float(self.pool.newest + given.behind)
            return given.answers
        self.begin(prompts, sampling, max_new_tokens=max_new_tokens, seeds=seeds)
        batch = self._begun.pop(tuple(seeds))
        found = self.pool.collect(batch)
        self.staleness = float(self.pool.newest - batch.version)
        return found

    def begun(self) -> list[Begun]:
        """Waits for all that is being sampled; what was taken up and not asked for yet is among it."""
        now = self.pool.newest
        own = [Begun(key, self.pool.collect(batch), now - batch.version) for key, batch in self._begun.items()]
        return [*(replace(given, behind=now + given.behind) for given in self._given.values()), *own]

    def take_up(self, begun: Sequence[Begun]) -> None:
        """Before the first weights: from then on loads are counted."""
        self._given = {given.seeds: given for given in begun}

    def generate(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> Rollout:
        found = self.answers(prompts, sampling, max_new_tokens=max_new_tokens, seeds=seeds)
        return as_rollout(prompts, found, pad_id=self.pool.plan.pad_id).to(self.model.device)

    def load(self, params: Iterable[tuple[str, Tensor]]) -> None:
        computed = ((name, self._compute(param)) for name, param in params)
        if self._started:
            self.pool.load(computed, self.trained)
        else:
            self._started = True
            self.pool.start(computed, self.trained)

    def close(self) -> None:
        self.pool.close()

    def _compute(self, param: Tensor) -> Tensor:
        """A weight as the workers compute with it: half the bytes where that is bfloat16."""
        return param.detach().bfloat16() if self.model.dtype == "bf16" else param.detach()
