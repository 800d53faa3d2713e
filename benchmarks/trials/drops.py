"""What a process that goes on with a run can be made to forget: each changes kinkajou in the process that calls it."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

Drop = Callable[[], None]


def nothing() -> None:
    """The control."""


def after_restore(then: Callable[[Any, Any, Any], None]) -> None:
    """`then(kept, s, folder)` once everything has been put back."""
    from kinkajou.train.kept import Kept

    real = Kept.restore

    def restore(self: Any, s: Any, folder: Any, numbers: Any) -> None:
        real(self, s, folder, numbers)
        then(self, s, folder)

    Kept.restore = restore  # type: ignore[method-assign]


def without(name: str) -> Drop:
    """An item of that name is not put back."""

    def drop() -> None:
        from kinkajou.train.kept import Kept

        real = Kept.restore

        def restore(self: Any, s: Any, folder: Any, numbers: Any) -> None:
            items = self.items
            self.items = [item for item in items if item.name != name]
            assert len(self.items) < len(items), f"no item is called {name}"
            real(self, s, folder, numbers)
            self.items = items

        Kept.restore = restore  # type: ignore[method-assign]

    return drop


def empties(key: str) -> Drop:
    """An optimiser's tensors of that name are 0 after all."""

    def then(kept: Any, s: Any, folder: Any) -> None:
        for item in kept.items:
            for state in item.optimizer.state.values() if hasattr(item, "optimizer") else ():
                state[key].zero_()

    return lambda: after_restore(then)


def forgets(group: str, name: str = "") -> Drop:
    """Numbers are as at a run's start: one of a group, or all of it; `best` is the best so far."""

    def drop() -> None:
        from kinkajou.train.kept import Kept
        from kinkajou.train.run import Run

        real, begin = Kept.restore, Run._go_on

        def restore(self: Any, s: Any, folder: Any, numbers: Mapping[str, Mapping[str, Any]]) -> None:
            assert not name or name in numbers[group], f"no number {group} {name}"
            kept = {key: value for key, value in numbers[group].items() if name and key != name}
            real(self, s, folder, {**numbers, group: kept})

        def go_on(self: Any, *rest: Any) -> None:
            begin(self, *rest)
            self.best = None

        if group == "best":
            Run._go_on = go_on  # type: ignore[method-assign]
        else:
            Kept.restore = restore  # type: ignore[method-assign]

    return drop


def resamples(*, keep_place: bool = False) -> Drop:
    """The rest of a round is trained on answers that are sampled anew, from its first minibatch or the same place."""

    def drop() -> None:
        from kinkajou.train import ppo
        from kinkajou.train.run import Run

        real, collect = Run.taken_up, ppo.collect
        done: list[int] = []

        def taken_up(self: Any, kind: Any) -> None:
            if found := real(self, kind):
                done.append(found.done)
                self._round = None

        def collected(*rest: Any) -> Any:
            found = collect(*rest)
            return replace(found, done=done.pop()) if done and keep_place else found

        Run.taken_up = taken_up  # type: ignore[method-assign, assignment]
        ppo.collect = collected

    return drop


def begins(name: str, value: Any) -> Drop:
    """A field of the round that is taken up is as at the round's start."""

    def drop() -> None:
        from kinkajou.train import run

        real = run.read_round
        run.read_round = lambda *rest: replace(real(*rest), **{name: value})  # type: ignore[assignment]

    return drop


def behind(then: Callable[[Any], None]) -> None:
    """`then(run)` once a run has found where it goes on."""
    from kinkajou.train.run import Run

    real = Run._go_on

    def go_on(self: Any, *rest: Any) -> None:
        real(self, *rest)
        then(self)

    Run._go_on = go_on  # type: ignore[method-assign]


def restarts() -> None:
    """Steps are counted from 1 again."""
    behind(lambda run: setattr(run, "behind", 0))


def cursor() -> None:
    """The records begin anew."""

    def then(run: Any) -> None:
        from kinkajou.data.loader import Shuffle

        real, start = Shuffle.batch, run.behind
        Shuffle.batch = lambda self, step: real(self, step - start)  # type: ignore[method-assign]

    behind(then)


def rate() -> None:
    """The schedule of the learning rate begins anew."""

    def then(run: Any) -> None:
        from kinkajou.train import fit

        real, start = fit.lr_at, run.behind
        fit.lr_at = lambda step, total, **more: real(step - start, total, **more)

    behind(then)


def duplicates() -> None:
    """The logs keep the lines of steps that are made again."""
    from kinkajou.train.logs import Logs

    Logs.cut = lambda self, sizes, source: []  # type: ignore[method-assign]


def reference() -> None:
    """The reference is the policy that the checkpoint has, as if it had been loaded from there."""
    from kinkajou.train import parts

    held: list[Any] = []
    real = parts.load_language_model

    def load(*rest: Any, **more: Any) -> Any:
        held.append(real(*rest, **more))
        return held[-1]

    def then(kept: Any, s: Any, folder: Any) -> None:
        policy, frozen = held[0], held[-1]
        assert frozen is not policy, "the reference is no model of its own"
        frozen.module.load_state_dict(policy.module.state_dict())

    parts.load_language_model = load
    after_restore(then)


def swapped() -> None:
    """The reference's folder holds other weights than before: the run has to refuse, or it would not know."""
    from kinkajou.train import parts

    real = parts.digest_of_model

    def digest(source: str) -> str:
        return real(source) if Path(source).name != "policy" else "other weights"

    parts.digest_of_model = digest


def generator(name: str) -> Drop:
    """One of the global generators is where chance has it."""

    def then(kept: Any, s: Any, folder: Any) -> None:
        import numpy
        import torch

        again = {"python": random.seed, "numpy": numpy.random.seed, "torch": torch.seed}
        again[name]()

    return lambda: after_restore(then)
