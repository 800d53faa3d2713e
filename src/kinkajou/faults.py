"""Named points at which a test may break the run: `KINKAJOU_FAULT=point:n:action`, several joined by commas.

The n-th time that the process comes to the point, the action happens; `*` for n means every time.  `@R` after the
action limits it to the process with RANK R.  Without the variable a point is a call of a function that does nothing.
"""

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kinkajou.errors import UserError, did_you_mean

VARIABLE = "KINKAJOU_FAULT"
POINTS: dict[str, str] = {
    "run.start": "settings, data and models are there, nothing has been trained",
    "step.start": "a step begins",
    "rollout.sampled": "answers have been sampled, none has been judged",
    "rollout.scored": "the step's batch is complete, no update has been made",
    "update.forward": "a micro-batch has been through the forward pass",
    "update.backward": "a micro-batch has been through the backward pass",
    "update.before_step": "gradients are clipped, the optimiser has not moved",
    "update.after_step": "the optimiser has moved the weights",
    "step.end": "a step has ended and is not yet in the metrics",
    "step.logged": "a step is in the metrics and not yet in a checkpoint",
    "save.snapshot": "a checkpoint has been copied to the host, nothing is written",
    "save.begin": "the folder aside has been made",
    "save.model": "the model's folder is written",
    "save.state": "a further file is written",
    "save.files": "all files are written, no manifest is",
    "save.manifest": "the manifest is written and not yet synced",
    "save.synced": "everything is on the disk, under its name aside",
    "save.renamed": "the checkpoint has its name",
    "save.pruned": "an older checkpoint has been deleted",
    "resume.read": "a checkpoint has been read, nothing has been trained",
    "judge.scores": "scores have come from the judge",
    "worker.step": "a model that is served is about to say its next tokens",
}
ACTIONS = ("kill", "raise", "enospc", "oom", "nan", "sleep", "stop", "term", "int", "draw")


@dataclass
class Fault:
    point: str
    at: int | None
    action: str
    rank: int | None = None
    seen: int = field(default=0)

    def due(self) -> bool:
        self.seen += 1
        return (self.at is None or self.seen == self.at) and self.rank in (None, int(os.environ.get("RANK", "0")))


def parsed(text: str) -> list[Fault]:
    """The faults of the variable's text."""
    found = []
    for part in filter(None, text.split(",")):
        point, at, action = (*part.split(":"), "", "")[:3]
        action, _, rank = action.partition("@")
        number = 1 if not at else None if at == "*" else int(at) if at.isdecimal() else 0
        if point not in POINTS or action not in ACTIONS or number == 0 or not (not rank or rank.isdecimal()):
            fix = did_you_mean(point, list(POINTS)) if point not in POINTS else f"an action is {', '.join(ACTIONS)}"
            raise UserError(f"{VARIABLE} has no fault {part!r}", evidence="point:n:action[@rank]", fix=fix)
        found.append(Fault(point, number, action, int(rank) if rank else None))
    return found


def nothing(point: str) -> str:
    return ""


def armed(faults: list[Fault]) -> Callable[[str], str]:
    """Acts at its points; returns the action that the caller has to carry out itself (`nan`)."""
    by_point: dict[str, list[Fault]] = {}
    for fault in faults:
        by_point.setdefault(fault.point, []).append(fault)

    def reach(point: str) -> str:
        told = ""
        for fault in by_point.get(point, ()):
            if fault.due():
                told = act(fault.action, point)
        return told

    return reach


def act(action: str, point: str) -> str:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in ("stop", "term", "int"):
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}[action])
    elif action == "sleep":
        time.sleep(3600)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    elif action == "oom":
        raise MemoryError(f"asked for at {point}")
    elif action == "raise":
        raise RuntimeError(f"asked for at {point}")
    elif action == "draw":
        draw()
    return action


def draw() -> None:
    """One number from each global generator, to see that a run that goes on has them where they were."""
    import random

    import numpy as np
    import torch

    random.random()
    np.random.random()
    torch.rand(())


def from_environment(environment: Mapping[str, str]) -> Callable[[str], str]:
    text = environment.get(VARIABLE, "")
    return armed(parsed(text)) if text else nothing


_reach = from_environment(os.environ)


def reached(point: str) -> str:
    """Marks a place in the code; what it returns is for the caller to do: "nan" or nothing ("")."""
    return _reach(point)


def arm(text: str) -> None:
    """The same as the variable, in a process that runs already: for tests."""
    global _reach
    _reach = armed(parsed(text)) if text else nothing
