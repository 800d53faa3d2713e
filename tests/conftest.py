"""What every test runs under: one thread, no network; the shared data beside the checkout; a tiny source model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

import pytest
import torch

if TYPE_CHECKING:
    from small import Small

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The `shared/data` folder beside the checkout; the only reason for which a test may be skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared data folder is not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> "Small":
    """A tiny policy, reward model and data.  Read them; never write there."""
    from small import make_small

    return make_small(tmp_path_factory.mktemp("small"))
