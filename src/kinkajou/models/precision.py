"""bfloat16 compute over float32 weights: for the time of a pass, a module's parameters are bound as bfloat16 copies.

The float32 parameters stay the truth: optimiser, gradients, saving and averages know them alone.  The copies are cast
again where a parameter has changed, so once a step, however many passes and decoding steps read them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


@cache
def count_steps() -> None:
    """Lets every optimiser step count as a new version of its parameters, which torch's fused steps forget."""

    def counted(optimizer: Optimizer, *_: Any) -> None:
        increment_version([param for group in optimizer.param_groups for param in group["params"]])

    register_optimizer_step_post_hook(counted)


class Copy(torch.autograd.Function):
    """The kept bfloat16 copy of a float32 parameter, in the parameter's graph."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, copy: Tensor) -> Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].float(), None


def rounding(lookup: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return lookup(*args, **kwargs).to(torch.bfloat16)

    return forward


class Bfloat16:
    """A module's float32 parameters and their bfloat16 copies; `keep` are parameters that stay as they are.

    Embeddings are looked up in float32 and rounded then: the same numbers, and the gradients of a token that
    comes often are summed in float32.
    """

    def __init__(self, module: nn.Module, keep: Iterable[Tensor] = ()) -> None:
        count_steps()
        self.module = module
        kept = {id(param) for param in keep}
        numbers: dict[int, int] = {}  # a tied parameter is cast once
        self.params: list[Tensor] = []
        self.places: list[tuple[dict[str, Any], str, int]] = []
        self.embeddings = [owner for owner in module.modules() if isinstance(owner, nn.Embedding)]
        for owner in module.modules():
            if isinstance(owner, nn.Embedding):
                continue
            for name, param in owner._parameters.items():
                if param is None or param.dtype != torch.float32 or id(param) in kept:
                    continue
                if id(param) not in numbers:
                    numbers[id(param)] = len(self.params)
                    self.params.append(param)
                self.places.append((owner._parameters, name, numbers[id(param)]))
        self.copies: list[Tensor] = []
        self.seen: list[tuple[int, int]] = []
        self.bound: list[list[Tensor]] = [self.params]
        """What has been bound, the outermost first."""

    def fits(self, module: nn.Module) -> bool:
        """Whether that module still has the parameters that are known here."""
        held, params = self.bound[-1], self.places
        return module is self.module and all(place[name] is held[i] for place, name, i in params)

    def bind(self) -> AbstractContextManager[None]:
        """bfloat16 parameters inside; those that are trained are in the graph where gradients are recorded."""
        self.refresh()
        if not torch.is_grad_enabled():
            return self.holding(self.copies)
        pairs = zip(self.params, self.copies, strict=True)
        return self.holding([Copy.apply(p, c) if p.requires_grad else c for p, c in pairs])  # type: ignore[no-untyped-call]

    def source(self, tensor: Tensor) -> Tensor:
        """The parameter that a bound tensor stands for; any other tensor as it is."""
        return next((p for p, x in zip(self.params, self.bound[-1], strict=True) if x is tensor), tensor)

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts what has changed: by version, or by place where the module has moved.  In place, for CUDA graphs."""
        state = [(param._version, param.data_ptr()) for param in self.params]
        if state == self.seen:
            return
        moved = not self.copies or any(c.device != p.device for c, p in zip(self.copies, self.params, strict=True))
        if moved:
            self.copies = [param.to(torch.bfloat16) for param in self.params]
        else:
            changed = [i for i, (now, before) in enumerate(zip(state, self.seen, strict=True)) if now != before]
            torch._foreach_copy_([self.copies[i] for i in changed], [self.params[i] for i in changed])
        self.seen = state

    @contextmanager
    def holding(self, tensors: list[Tensor]) -> Iterator[None]:
        """Those tensors in the parameters' places."""
        outermost = len(self.bound) == 1
        self._put(tensors)
        self.bound.append(tensors)
        for embedding in self.embeddings if outermost else ():
            embedding.forward = rounding(embedding.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for embedding in self.embeddings if outermost else ():
                del embedding.forward
            self.bound.pop()
            self._put(self.bound[-1])

    def again(self) -> AbstractContextManager[None]:
        """What is bound now, bound again later: for a layer that the backward pass computes anew."""
        return self.holding(self.bound[-1])

    def _put(self, tensors: list[Tensor]) -> None:
        for place, name, i in self.places:
            place[name] = tensors[i]
