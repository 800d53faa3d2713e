"""What is private in PyTorch and stands in parallel/imagined.py: a release that renames it is found here."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from kinkajou.parallel.imagined import imagined_world, without_data


@pytest.mark.parametrize("tracker", [FSDPMemTracker, MemTracker])
def test_trackers_have_what_is_overridden(tracker: type) -> None:
    for name in ("_update_peak_stats", "reset_mod_stats", "_pre_fw_hook", "_track_module_params_and_buffers"):
        assert callable(getattr(tracker, name))
    assert "_curr_mem_snap" in inspect.getsource(MemTracker.__init__)


def test_real_tensors_stay_real_and_others_answer() -> None:
    with imagined_world(4) as world, without_data(world):
        weight = torch.nn.Linear(3, 2).weight
        places = torch.arange(6).view(2, 3) % 2 == 0
        assert places.tolist() == [[True, False, True], [False, True, False]]
        assert weight[places].shape == (3,)  # what a fake tensor alone cannot know
        assert weight.sum().item() == 1.0
        assert bool(torch.isfinite(weight).all())


def test_collectives_are_counted() -> None:
    """A ring's all-reduce of 8 numbers over 4 ranks: each sends 2 x 3/4 of them."""
    with imagined_world(4) as world, without_data(world):
        dist.all_reduce(torch.nn.Parameter(torch.zeros(8)).detach())
        assert world.calls == {"all_reduce": 1}
        assert world.sent == {"all_reduce": 2 * 8 * 4 * 3 // 4}
