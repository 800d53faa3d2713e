"""What is known about each metric: its title, its unit, its company on one axis, and how to read it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

STAGE_TITLES = {
    "sft": "Supervised tuning",
    "reward": "Reward model",
    "prefer": "Preference tuning",
    "preference": "Preference tuning",
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "ppo": "PPO",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small chart. `series` maps metric keys to their names in the legend."""

    title: str
    unit: str
    read: str
    series: dict[str, str]
    include: tuple[float, ...] = ()
    reference: tuple[float, str] | None = None
    min_span: float = 0.0
    may_be_log: bool = False
    known: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.series)


Groups = list[tuple[str, list[Panel]]]


def panel(title: str, unit: str, read: str, include: tuple[float, ...] = (), **series: str) -> Panel:
    """A panel whose series are given as key="name in the legend"."""
    return Panel(title=title, unit=unit, read=read, include=include, series=series)


_LEARNING_RATE = Panel(
    title="Learning rate",
    unit="",
    read="The schedule as it was applied.",
    series={"lr": "", "lr_policy": "policy", "lr_critic": "critic"},
    include=(0.0,),
    may_be_log=True,
)
_GRAD_NORM = Panel(
    title="Gradient norm",
    unit="before clipping",
    read="Steady is good. Spikes that come back point at bad rows or too high a learning rate.",
    series={"grad_norm": "", "grad_norm_policy": "policy", "grad_norm_critic": "critic"},
    include=(0.0,),
    may_be_log=True,
)
_SPEED = Panel(
    title="Throughput",
    unit="tokens/s",
    read="Dips are waits for data, for the disk or for another program on the machine.",
    series={
        "tokens_per_s": "",
        "train_tokens_per_s": "training",
        "rollout_tokens_per_s": "rollout",
        "score_tokens_per_s": "scoring",
        "update_tokens_per_s": "update",
    },
    include=(0.0,),
    may_be_log=True,
)
_ACCURACY = Panel(
    title="Accuracy",
    unit="share of pairs",
    read="How often the chosen answer gets the higher score.",
    series={"accuracy": "training"},
    include=(0.5, 1.0),
    reference=(0.5, "coin flip"),
)
_MARGIN = panel(
    "Margin",
    "chosen minus rejected score",
    "Should grow. If it grows while accuracy stands still, the model is only getting more sure of itself.",
    (0.0,),
    margin="training",
)
_PREFERENCE: Groups = [
    (
        "Does it tell good from bad?",
        [
            panel("Loss", "", "Lower is better. DPO starts at 0.693, the cost of a coin flip.", loss="training"),
            _ACCURACY,
            replace(_MARGIN, unit="chosen minus rejected implicit reward"),
        ],
    ),
    (
        "By which side?",
        [
            panel(
                "Implicit reward",
                "beta x log-ratio to the reference",
                "Chosen should rise, rejected fall. Both falling together is common; chosen falling fast is a warning.",
                (0.0,),
                reward_chosen="chosen",
                reward_rejected="rejected",
            ),
            panel(
                "Log-probability of the answers",
                "nats/answer",
                "If the chosen answers become much less likely, lower the rate or raise beta, or add 0.2*sft.",
                logp_chosen="chosen",
                logp_rejected="rejected",
            ),
            panel(
                "Reference point",
                "nats/answer",
                "KTO's KL to the reference, of mismatched answers. It rises as the policy moves away.",
                (0.0,),
                kl="",
            ),
        ],
    ),
    ("Is each update sound, and how fast?", [_GRAD_NORM, _LEARNING_RATE, _SPEED]),
]
_PPO: Groups = [
    (
        "Does it get better?",
        [
            panel(
                "Score",
                "in the reward model's units",
                "What PPO climbs. It is an opinion: believe it only as long as the truth rises with it.",
                score="rollouts",
            ),
            panel(
                "Truth",
                "by the checker",
                "The number that counts. A fall while the score still rises means the reward is being gamed.",
                gold="rollouts",
                eval_gold="held-out",
            ),
            panel("Reward", "per response", "The score minus the price of leaving the reference.", reward=""),
        ],
    ),
    (
        "Does it stay itself?",
        [
            panel(
                "KL to the reference",
                "nats",
                "How far the policy has moved from where it started. A slow rise is normal, a leap is not.",
                (0.0,),
                kl_ref="",
            ),
            panel(
                "Entropy",
                "nats/token",
                "How open the choice of the next token still is. Near zero, it always says the same.",
                (0.0,),
                entropy="",
            ),
            panel(
                "Response length",
                "tokens",
                "Length creeping up with the score is the usual way to please a reward model.",
                (0.0,),
                response_length="rollouts",
            ),
            panel(
                "Ended by itself",
                "share of responses",
                "The rest was cut off at the length limit and says little about quality.",
                (0.0, 1.0),
                ended="rollouts",
            ),
        ],
    ),
    (
        "Is each update sound, and how fast?",
        [
            panel(
                "KL of one update",
                "nats/token",
                "How far one step moves the policy. Above a few hundredths, steps are too big.",
                (0.0,),
                kl_old="",
            ),
            panel(
                "Clipped",
                "share of tokens",
                "Tokens at the limit of the trust region. 0.05 to 0.2 is common; far above, lower the rate.",
                (0.0,),
                clip_frac="",
            ),
            Panel(
                title="First ratio",
                unit="new ÷ old probability",
                read="Before a step's first update both are the same weights: anything but 1 is a fault.",
                series={"first_ratio": ""},
                include=(1.0,),
                reference=(1.0, "must be 1"),
                min_span=0.02,
            ),
            Panel(
                title="Explained variance",
                unit="of the returns",
                read="1 is a perfect critic, 0 is no better than a constant, below 0 it does harm.",
                series={"explained_variance": ""},
                include=(0.0, 1.0),
                reference=(0.0, "no better than a constant"),
            ),
            panel(
                "Policy loss",
                "",
                "It hovers near zero by design: its height says nothing about progress.",
                policy_loss="",
            ),
            panel(
                "Critic loss",
                "",
                "Should settle; it follows the scale of the rewards.",
                (0.0,),
                critic_loss="",
            ),
            _GRAD_NORM,
            _LEARNING_RATE,
            _SPEED,
        ],
    ),
]
_GROUPS: dict[str, Groups] = {
    "sft": [
        (
            "Does it learn?",
            [
                panel(
                    "Loss",
                    "nats/token",
                    "Lower is better. Held-out rising while training falls means it learns rows by heart.",
                    loss="training",
                ),
            ],
        ),
        ("Is each update sound, and how fast?", [_GRAD_NORM, _LEARNING_RATE, _SPEED]),
    ],
    "reward": [
        (
            "Does it tell good from bad?",
            [
                Panel(
                    title="Loss",
                    unit="nats/pair",
                    read="Lower is better. 0.693 is what a coin flip costs.",
                    series={"loss": "training"},
                    reference=(0.6931, "coin flip"),
                ),
                _ACCURACY,
                _MARGIN,
            ],
        ),
        ("Is each update sound, and how fast?", [_GRAD_NORM, _LEARNING_RATE, _SPEED]),
    ],
    "prefer": _PREFERENCE,
    "preference": _PREFERENCE,
    "dpo": _PREFERENCE,
    "kto": _PREFERENCE,
    "ppo": _PPO,
}
_ANY: Groups = [
    ("Does it learn?", [panel("Loss", "", "Lower is better.", loss="training"), _ACCURACY, _MARGIN]),
    *_PPO,
]


def panels_of(kind: str, keys: Iterable[str]) -> Groups:
    """The groups of panels that show every key once; those nobody knows come last, under "Other".

    `eval_x` joins the panel of `x`; `x_low` and `x_high` are the band of `x` and get no panel.
    """
    left = list(keys)
    left = [key for key in left if not _is_band(key, left)]
    groups: Groups = []
    for title, panels in _GROUPS.get(kind, _ANY):
        shown = [_present(entry, left) for entry in panels]
        shown = [entry for entry in shown if entry.series]
        taken = {key for entry in shown for key in entry.keys}
        left = [key for key in left if key not in taken]
        if shown:
            groups.append((title, shown))
    other = []
    while left:
        key = left[0]
        base = key.removeprefix("eval_")
        entry = _present(Panel(title=base, unit="", read="", series={base: "training"}, known=False), left)
        left = [key for key in left if key not in entry.series]
        other.append(entry)
    return [*groups, ("Other", other)] if other else groups


def title_of(kind: str, key: str) -> str:
    """What a reader calls this metric, in a sentence."""
    if key == "eval_gold":
        return "truth"
    for _, panels in panels_of(kind, [key]):
        for entry in panels:
            held_out = "held-out " if key.startswith("eval_") else ""
            return held_out + entry.title.lower() if entry.known else key
    return key


def band_of(key: str) -> tuple[str, str]:
    """The keys of the band around a metric."""
    return f"{key}_low", f"{key}_high"


def _is_band(key: str, keys: list[str]) -> bool:
    base = key.removesuffix("_low").removesuffix("_high")
    return base != key and base in keys and all(edge in keys for edge in band_of(base))


def _present(entry: Panel, keys: list[str]) -> Panel:
    series: dict[str, str] = {}
    for key, name in entry.series.items():
        if key in keys:
            series[key] = name
        twin = f"eval_{key}"
        if twin in keys and twin not in entry.series:
            series[twin] = "held-out"
    return replace(entry, series=series)
