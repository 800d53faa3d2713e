"""Tensor parallel (Shoeybi 2019): the matrices of a block split over neighbours, as the family's plan in transformers
says, through DTensor."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def split_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    raise NotImplementedError
