"""A reward model that has no weights of its own but an adapter and a head on the policy's trunk."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kinkajou.models.adapters import adapter_base, add_second_adapter, second_adapter, whole_weights
from kinkajou.models.forward import LanguageModel, ScalarModel
from kinkajou.models.heads import scalar_head

ADAPTER = "reward"


def shares_backbone(folder: str, base: str) -> bool:
    """Whether the folder holds a reward model's adapter on that very base model."""
    own = adapter_base(folder)
    return own is not None and Path(own).resolve() == Path(base).resolve() and "score.weight" in whole_weights(folder)


class BackboneScorer(ScalarModel):
    """Reads the policy's trunk with another adapter in place of the trained one."""

    def __init__(self, language: LanguageModel, folder: str, *, number: int) -> None:
        super().__init__(language.module, dtype=language.dtype)
        self._of = (language,)  # a tuple: its parameters are not counted twice
        self.name = f"{ADAPTER}{number}"
        weight = add_second_adapter(language.module, folder, self.name)
        self.head = scalar_head(language.width, seed=0).requires_grad_(False).to(language.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
        language.grown()

    @property
    def score_head(self) -> nn.Linear:
        return self.head

    def computing(self) -> AbstractContextManager[None]:
        return self._of[0].computing()

    def forward(self, tokens: Tensor, mask: Tensor, *, at: Literal["end", "targets"]) -> Tensor:
        with torch.no_grad(), second_adapter(self.module, self.name):
            return self._of[0].run(super().forward, tokens, mask, at=at)
