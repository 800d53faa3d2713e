"""Run by torchrun in tests: trains each job of a JSON file on all ranks, one after the other."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from kinkajou import faults
from kinkajou.errors import UserError
from kinkajou.parallel import ranks
from small import Small


def main(path: str) -> None:
    torch.set_num_threads(1)
    plan: dict[str, Any] = json.loads(Path(path).read_text())
    small = Small(**{**plan["small"], "folder": Path(plan["small"]["folder"])})
    for name, (stage, changes, *armed) in plan["jobs"].items():
        faults.arm(*armed or [""])
        try:
            small.run(stage, Path(path).parent / name, **{"strategy": "ddp", **changes})
        except UserError as fault:  # a refusal is a result here: the next job runs all the same
            (Path(path).parent / f"{name}.refused").write_text(str(fault))
        # The next job goes on in this group: a second one would read the first's addresses from torchrun's store.
        ranks.join = lambda **_: torch.device("cpu")  # type: ignore[assignment]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
