"""From a strategy's name to the strategy."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from kinkajou.errors import UserError
from kinkajou.parallel import allocator
from kinkajou.parallel.launch import COLLECTIVE_S
from kinkajou.parallel.ranks import Replicated
from kinkajou.parallel.sharded import GEMINI, ZERO2, ZERO2_CPU, ZERO3, Sharded
from kinkajou.parallel.strategy import Single, Strategy

BUILT: dict[str, Callable[..., Strategy]] = {
    "ddp": Replicated,
    "zero2": partial(Sharded, ZERO2),
    "zero2_cpu": partial(Sharded, ZERO2_CPU),
    "zero3": partial(Sharded, ZERO3),
    "gemini": partial(Sharded, GEMINI),
}


def make_strategy(
    name: str,
    *,
    tp: int = 1,
    device_share: float | None = None,
    interface: str | None = None,
    start_timeout_s: float = 60.0,
    collective_timeout_s: float = COLLECTIVE_S,
) -> Strategy:
    """The named strategy.  A process group without a strategy that uses it would train the same thing twice."""
    allocator.settle()
    if name == "naive":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "strategy 'naive' is one process, but torchrun started several",
                evidence=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
                fix="say --strategy ddp, or start one process",
            )
        return Single()
    options: dict[str, Any] = {
        "interface": interface,
        "start_timeout_s": start_timeout_s,
        "collective_timeout_s": collective_timeout_s,
    }
    if name == "ddp":
        return BUILT[name](**options)
    return BUILT[name](tp=tp, device_share=device_share, **options)
