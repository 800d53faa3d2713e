"""The same model again, without its weights: what a process needs that gets them by name."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kinkajou.errors import UserError
from kinkajou.models import adapters, attention, bloom
from kinkajou.models.forward import Dtype, LanguageModel
from kinkajou.models.quantised import is_quantised

attention.register()


@dataclass(frozen=True)
class Shape:
    """What a language model is built from; of plain values, so that it can be sent."""

    config: dict[str, Any]
    dtype: Dtype
    lora_rank: int = 0
    lora_alpha: float | None = None


def shape_of(model: LanguageModel, *, lora_rank: int = 0, lora_alpha: float | None = None) -> Shape:
    if is_quantised(model.module):
        raise UserError(
            "workers and servers of an engine do not take quantised weights",
            fix="--rollout local, or take the model that the weights were made from",
        )
    return Shape(model.inner.config.to_dict(), model.dtype, lora_rank, lora_alpha)


def build(shape: Shape) -> LanguageModel:
    """A frozen model with the parameters of the one that the shape was taken from, their values still to come."""
    config = AutoConfig.for_model(**shape.config)
    is_bloom = config.model_type == "bloom"
    how = "eager" if is_bloom else attention.NAME
    module = cast(nn.Module, AutoModelForCausalLM.from_config(config, attn_implementation=how))  # type: ignore[no-untyped-call]
    if is_bloom:
        bloom.install(module)
    if shape.lora_rank:
        module = adapters.add_lora(module, rank=shape.lora_rank, alpha=shape.lora_alpha, scalar=False)
    model = LanguageModel(module.eval(), dtype=shape.dtype)
    return model.freeze()
