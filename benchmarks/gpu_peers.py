"""transformers' ways to generate, on the weights of our model: by `generate` with a cache, and by `generate_batch`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.gpu_limits import Shape
from benchmarks.gpu_models import PAD, Setting, as_transformers_runs_it
from kinkajou.models.forward import LanguageModel

DYNAMIC, STATIC, CONTINUOUS = "generate, dynamic cache", "generate, static cache", "generate_batch"
Prompts = Sequence[Sequence[int]]
Answers = Callable[[], list[int]]
"""Answers all prompts; tokens of each answer, its end token among them."""
PAGES = 64
"""Blocks of `generate_batch` where it is only tried out: by itself it takes most of the memory there is."""


def sampling(new: int, ends: list[int]) -> GenerationConfig:
    """Plain sampling, like ours."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=ends or None,
        pad_token_id=PAD,
    )


def lengths_of(answers: torch.Tensor, ends: list[int]) -> list[int]:
    """Up to the first end token and with it.  (b, new)."""
    if not ends:
        return [answers.shape[1]] * len(answers)
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device))
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, answers.shape[1])
    return [int(n) for n in first]


def by_generate(cache: str) -> Callable[..., Answers]:
    def make(
        model: LanguageModel, shape: Shape, prompts: Prompts, new: int, ends: list[int], rows: int, here: Setting
    ) -> Answers:
        """Batches of `rows` prompts, which are of one length and so need no padding."""
        peer: Any = as_transformers_runs_it(model, shape)
        batches = [torch.tensor(prompts[i : i + rows], device=here.device) for i in range(0, len(prompts), rows)]
        settings = sampling(new, ends)
        settings.cache_implementation = cache

        @torch.no_grad()
        def generate() -> list[int]:
            found: list[int] = []
            for ids in batches:
                out = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                found += lengths_of(out[:, ids.shape[1] :], ends)
            return found

        return generate

    return make


def by_generate_batch(
    model: LanguageModel, shape: Shape, prompts: Prompts, new: int, ends: list[int], rows: int, here: Setting
) -> Answers:
    """Its manager is kept, so that graphs are recorded in the warm-up alone."""
    peer: Any = as_transformers_runs_it(model, shape)
    sizes = {"num_blocks": PAGES, "max_batch_tokens": 512} if here.small else {}
    batching = ContinuousBatchingConfig(max_requests_per_batch=rows, **sizes)
    settings, asked = sampling(new, ends), [list(prompt) for prompt in prompts]

    def generate() -> list[int]:
        out = peer.generate_batch(
            asked, generation_config=settings, continuous_batching_config=batching, persistent_manager=True
        )
        if len(out) < len(asked) or any(answer.error for answer in out.values()):
            raise RuntimeError(f"generate_batch answered {len(out)} of {len(asked)} prompts")
        return [len(answer.generated_tokens) for answer in out.values()]

    return generate


PEERS: dict[str, Callable[..., Answers]] = {
    DYNAMIC: by_generate("dynamic"),
    STATIC: by_generate("static"),
    CONTINUOUS: by_generate_batch,
}
