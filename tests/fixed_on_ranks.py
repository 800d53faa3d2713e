"""Run by torchrun in test_invariance.py: every case's step with its rows shared by the ranks, then whole runs."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from safetensors.torch import save_file

from fixed import CASES, make_case, model_of, take_step
from kinkajou.parallel import ranks
from kinkajou.parallel.ranks import Replicated
from small import Small
from train.ddp_stages import main as run_stages


def main(path: str) -> None:
    torch.set_num_threads(1)
    paths = json.loads(Path(path).read_text())["small"]
    small = Small(**{**paths, "folder": Path(paths["folder"])})
    strategy = Replicated()
    # The stages go on in this group: a second one would read its addresses from torchrun's store.
    ranks.join = lambda **_: torch.device("cpu")  # type: ignore[assignment]
    for name in CASES:
        case = make_case(name, small, strategy)
        outcome = take_step(case, model_of(small, case.kind), budget=40, strategy=strategy)
        if strategy.rank == 0:
            (Path(path).parent / f"{name}.json").write_text(json.dumps(outcome.numbers))
            tensors = {f"gradient/{key}": x for key, x in outcome.gradients.items()}
            save_file(
                tensors | {f"weight/{key}": x for key, x in outcome.weights.items()},
                Path(path).parent / f"{name}.safetensors",
            )
    run_stages(path)


if __name__ == "__main__":
    main(sys.argv[1])
