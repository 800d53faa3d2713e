"""What a checkpoint takes."""

from typing import NamedTuple

from kinkajou.plan.job import Job
from kinkajou.plan.memory import Books


class Saving(NamedTuple):
    """Bytes: on the disk, and in the main process's main memory while it is written, beside all the rest."""

    disk: float
    host: float


def saving_of(job: Job) -> Saving:
    """Whole trained weights, their moving average, both moments of Adam (of its own shards, where there are any).

    Adapters are stored as they are, and folded into whole weights besides.
    """
    disk = host = 0.0
    for name, model in Books(job).trained.items():
        models = 2 if job.average and name == "policy" else 1
        weights = models * 4.0 * (model.whole - model.adapted + (model.learning if job.how.lora_rank else 0))
        disk += weights + 8.0 * model.learning
        host += weights + 8.0 * model.held_learning
    return Saving(disk, host)
