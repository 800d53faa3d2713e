"""What PEFT itself makes of a model with its adapters folded in: the peer of `models.adapters.merged_weights`."""

import copy
from typing import Any, cast

from peft import PeftModel
from torch import nn


def merged(model: nn.Module) -> nn.Module:
    """A copy, in float32; a model without adapters as it is."""
    if not isinstance(model, PeftModel):
        return model
    return cast(nn.Module, cast(Any, copy.deepcopy(model).float()).merge_and_unload())
