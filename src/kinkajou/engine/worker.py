"""A rollout worker: a local engine in another process, which takes weights in blocks and samples chunks of prompts."""

import platform
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinkajou import __version__
from kinkajou.batch import Sampling
from kinkajou.engine.engine import Answered, LocalEngine
from kinkajou.models.replica import Shape, build

Block = dict[str, NDArray[Any]]
"""Weights by name.  bfloat16 ones travel as int16: NumPy has no such type."""
FROZEN = -1
"""The version of weights that are never trained."""
NONE = -2
"""The version of a worker whose weights are not all of one."""


@dataclass(frozen=True)
class Plan:
    """What a worker's engine is built from."""

    shape: Shape
    end_ids: list[int]
    pad_id: int
    max_rows: int
    device: str = "cpu"


@dataclass(eq=False)
class Chunk:
    """Prompts that are sampled together, with the weights of that version."""

    rows: list[int]  # their places in the batch
    prompts: list[list[int]]
    seeds: list[int]
    sampling: Sampling
    max_new_tokens: int
    version: int
    tries: int = 0


@dataclass(frozen=True)
class Reply:
    """A worker's answers, and the version of the weights that it holds."""

    version: int
    answers: list[Answered]


def packages() -> dict[str, str]:
    """Versions that decide what a worker says; without the build of torch, which may be another on another device."""
    found = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
    return {"kinkajou": __version__, **found, "python": platform.python_version().rpartition(".")[0]}


class Worker:
    """Nothing is built before `build`: a worker of another version shall be able to say so."""

    def __init__(self) -> None:
        self.version = NONE
        self._coming = (NONE, 0)
        self._missing: set[str] = set()

    def about(self) -> dict[str, str]:
        return {**packages(), "host": platform.node()}

    def build(self, plan: Plan) -> None:
        model = build(plan.shape).to(plan.device)
        self.engine = LocalEngine(model, end_ids=plan.end_ids, pad_id=plan.pad_id, max_rows=plan.max_rows)
        self._params = dict(model.named_parameters())
        self._missing = set(self._params)

    @torch.no_grad()
    def take(self, version: int, index: int, last: bool, block: Block) -> int:
        """Weights of a version, block by block; with the last of them they are in force.  -> the version held."""
        if index and self._coming != (version, index):
            raise RuntimeError(f"block {index} of version {version} came after {self._coming}")
        self._coming = (version, index + 1)
        for name, array in block.items():
            put(self._params[name], array)
        self._missing -= set(block)
        if version == FROZEN:
            return self.version
        self.version = version if last else NONE
        if last and self._missing:
            raise RuntimeError(f"weights that never came: {sorted(self._missing)[:3]}")
        return self.version

    def sample(self, chunk: Chunk) -> Reply:
        samples = self.engine.samples(
            chunk.prompts, chunk.sampling, max_new_tokens=chunk.max_new_tokens, seeds=chunk.seeds
        )
        return Reply(self.version, self.engine.answers(samples))


def put(param: Tensor, array: NDArray[Any]) -> None:
    """On a CPU the parameter becomes the array itself, which workers of one machine share; it is never written to."""
    weights = as_tensor(array)
    if weights.shape != param.shape or weights.dtype != param.dtype:
        raise RuntimeError(f"{weights.dtype} {tuple(weights.shape)} for {param.dtype} {tuple(param.shape)}")
    if param.device.type == "cpu":
        param.data = weights
    else:
        param.copy_(weights)


def as_array(tensor: Tensor) -> NDArray[Any]:
    host = tensor.detach().cpu().contiguous()
    return (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()


def as_tensor(array: NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shared memory is not writable
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor
