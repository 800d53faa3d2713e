"""Models of a simulation: built from sizes by transformers, made ready by our loader, computing as on a GPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.models import attention, bloom, linear_logp
from kinkajou.models.attention import Shape
from kinkajou.models.forward import LanguageModel, ScalarModel
from kinkajou.models.load import LoadOptions, finish, interface


class Flash(torch.autograd.Function):
    """What flash attention keeps and makes (Dao 2022): no matrix of positions by positions."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def flash(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    return cast(Tensor, Flash.apply(query, key, value))  # type: ignore[no-untyped-call]


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """The kernels and the tiles that a GPU is given, though the imagined device is a CPU: torch can imagine no other
    where there is none."""
    tables = (linear_logp.TILE, linear_logp.KEPT)
    before = [table["cpu"] for table in tables]
    attention.STAND_INS.append(flash)
    for table in tables:
        table["cpu"] = table["cuda"]
    try:
        yield
    finally:
        attention.STAND_INS.pop()
        for table, size in zip(tables, before, strict=True):
            table["cpu"] = size


def language_model(settings: Mapping[str, Any], options: LoadOptions) -> LanguageModel:
    model = LanguageModel(module_of(settings, scalar=False), dtype=options.dtype)
    return cast(LanguageModel, finish(model, options, scalar=False))


def scalar_model(settings: Mapping[str, Any], options: LoadOptions) -> ScalarModel:
    model = ScalarModel(module_of(settings, scalar=True), dtype=options.dtype)
    return cast(ScalarModel, finish(model, options, scalar=True))


def module_of(settings: Mapping[str, Any], *, scalar: bool) -> nn.Module:
    """A transformers model from the entries of its config.json, without dropout as the loader has it."""
    form = AutoConfig.for_model(**settings)
    for name, value in list(vars(form).items()):
        if "drop" in name and isinstance(value, float):
            setattr(form, name, 0.0)
    if scalar:
        form.num_labels = 1
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    module = cast(nn.Module, kind.from_config(form, attn_implementation=interface(form)))  # type: ignore[no-untyped-call]
    if form.model_type == "bloom":
        bloom.install(module)
    return module
