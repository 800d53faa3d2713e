"""The few numbers of reinforcement learning that decide the future besides weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kinkajou.algos.kl import adapted_coefficient
from kinkajou.algos.running import Moments, merged, moments
from kinkajou.batch import ScoredRollout
from kinkajou.config import RLConfig
from kinkajou.models.load import find_model
from kinkajou.parallel.strategy import Strategy

NAME = "state/run.json"


@dataclass
class RLState:
    kl_coef: float
    """The coefficient in force: what an adaptive KL has come to, else the setting."""
    reference: str
    """Where the reference was loaded from."""
    batches: int = 0
    """Batches of prompts taken so far; dynamic sampling takes more than one a step."""
    scores: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Number, mean and sum of squares about it of all scores so far, where `score_scale` needs them."""
    trusted: int = 0
    """Further rollouts whose log-probabilities are taken from the engine without asking the trainer."""

    @staticmethod
    def at_start(cfg: RLConfig, source: str, say: Callable[[str], None]) -> "RLState":
        """From the settings; an adaptive KL goes on where the checkpoint that `--model` names had come to.

        With its reference: measured against another one, the coefficient would mean something else.
        """
        chosen = find_model(cfg.kl.reference) if cfg.kl.reference else source
        path = Path(source) / NAME
        if cfg.kl.kl_target is None or not path.is_file():
            return RLState(cfg.kl.kl_coef, chosen)
        kept = json.loads(path.read_text(encoding="utf-8"))["numbers"]["rl"]
        if not cfg.kl.reference:
            chosen = str(kept["reference"])
        say(f"kl_coef: {kept['kl_coef']:.4g}, where the adaptive KL of {source} had come to; reference: {chosen}")
        return RLState(float(kept["kl_coef"]), chosen)

    def see(self, cfg: RLConfig, rollout: ScoredRollout, s: Strategy) -> dict[str, float]:
        """Takes a step's scores, once, before its first update; what is then known of all of them."""
        if cfg.shaping.score_scale == "none":
            return {}
        seen = merged(Moments(*self.scores), moments(rollout.scores, rollout.mask.any(1), all_sum=s.all_sum))
        self.scores = seen
        return {"score_mean_running": seen.mean, "score_std_running": seen.std}

    def follow(self, cfg: RLConfig, kl_ref: float, samples: int) -> None:
        """Moves the coefficient after a step that measured `kl_ref` nats an answer (Ziegler 2019)."""
        if cfg.kl.kl_target is not None:
            self.kl_coef = adapted_coefficient(
                self.kl_coef, kl_ref, target=cfg.kl.kl_target, horizon=cfg.kl.kl_horizon, samples=samples
            )
