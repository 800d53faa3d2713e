"""The few numbers of reinforcement learning that decide the future besides weights."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kinkajou.algos.kl import adapted_coefficient
from kinkajou.config import RLConfig

NAME = "state/rl.json"


@dataclass
class RLState:
    kl_coef: float
    """The coefficient in force: what an adaptive KL has come to, else the setting."""
    batches: int = 0
    """Batches of prompts taken so far; dynamic sampling takes more than one a step."""

    @staticmethod
    def at_start(cfg: RLConfig, source: Path, say: Callable[[str], None]) -> "RLState":
        """From the settings; an adaptive KL goes on where the checkpoint that `--model` names had come to."""
        path = source / NAME
        if cfg.kl.kl_target is not None and path.is_file():
            coefficient = float(json.loads(path.read_text())["kl_coef"])
            say(f"kl_coef: {coefficient:.4g}, where the adaptive KL of {source} had come to")
            return RLState(coefficient)
        return RLState(cfg.kl.kl_coef)

    def follow(self, cfg: RLConfig, kl_ref: float, samples: int) -> None:
        """Moves the coefficient after a step that measured `kl_ref` nats an answer (Ziegler 2019)."""
        if cfg.kl.kl_target is not None:
            self.kl_coef = adapted_coefficient(
                self.kl_coef, kl_ref, target=cfg.kl.kl_target, horizon=cfg.kl.kl_horizon, samples=samples
            )


def save_state(state: RLState, folder: Path) -> None:
    path = folder / NAME
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(state)), encoding="utf-8")
