"""One engine for all processes of a run: the first one owns it, the others ask through it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

from kinkajou.batch import Rollout, Sampling
from kinkajou.engine.engine import AheadEngine, Answered, Begun, OwnedEngine, Prompts, as_rollout
from kinkajou.errors import UserError
from kinkajou.parallel.strategy import Strategy

T = TypeVar("T")


class Together:
    """The engine protocol, called by all processes at the same time; their prompts lie in one queue."""

    def __init__(self, make: Callable[[], OwnedEngine], s: Strategy, *, pad_id: int) -> None:
        self.s, self.pad_id = s, pad_id
        self.engine: OwnedEngine | None = None
        self.staleness = 0.0

        def start() -> None:
            self.engine = make()

        self._told(start)

    def begin(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> None:
        everyone, every_seed, _ = self._joined(prompts, seeds)
        own = cast(AheadEngine, self.engine)
        self._told(lambda: own.begin(everyone, sampling, max_new_tokens=max_new_tokens, seeds=every_seed))

    def generate(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> Rollout:
        everyone, every_seed, start = self._joined(prompts, seeds)

        def answers() -> tuple[list[Answered], float]:
            found = self._own.answers(everyone, sampling, max_new_tokens=max_new_tokens, seeds=every_seed)
            return found, self._own.staleness

        found, self.staleness = self._told(answers)
        mine = found[start : start + len(prompts)]
        return as_rollout(prompts, mine, pad_id=self.pad_id).to(self.s.device)

    def begun(self) -> list[Begun]:
        return self._told(lambda: cast(AheadEngine, self._own).begun())

    def take_up(self, begun: Sequence[Begun]) -> None:
        self._told(lambda: cast(AheadEngine, self._own).take_up(begun))

    def load(self, params: Iterable[tuple[str, Tensor]]) -> None:
        def push() -> None:
            self._own.load(params)

        if self.s.rank > 0:
            for _ in params:  # where weights are sharded they are gathered by all processes
                pass
        self._told(push)

    def close(self) -> None:
        if self.engine:
            self.engine.close()

    @property
    def _own(self) -> OwnedEngine:
        assert self.engine
        return self.engine

    def _joined(self, prompts: Prompts, seeds: Sequence[int]) -> tuple[list[list[int]], list[int], int]:
        """All processes' prompts and seeds, and where this one's begin."""
        asked = cast(list[tuple[list[list[int]], list[int]]], self.s.gather([([*map(list, prompts)], list(seeds))]))
        before = sum(len(theirs) for theirs, _ in asked[: self.s.rank])
        return [p for theirs, _ in asked for p in theirs], [seed for _, theirs in asked for seed in theirs], before

    def _told(self, work: Callable[[], T]) -> T:
        """What the first process finds by the work, in all of them; its fault too, so that none waits for it."""
        found: tuple[Any, ...] = ()
        if self.s.rank == 0:
            try:
                found = (work(), None)
            except UserError as fault:
                found = (None, (fault.problem, fault.evidence, fault.fix, fault.exit_code))
        result, fault_of = cast(tuple[Any, Any], self.s.gather([found])[0])
        if fault_of:
            problem, evidence, fix, exit_code = fault_of
            raise UserError(problem, evidence=evidence, fix=fix, exit_code=exit_code)
        return cast(T, result)
