"""The panels of each kind of stage: which metrics share a chart, in what unit, and how to read them."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small chart. `series` maps metric keys to their names in the legend; keys that begin with `prefix` join."""

    title: str
    unit: str
    read: str
    series: dict[str, str]
    include: tuple[float, ...] = ()
    reference: tuple[float, str] | None = None
    min_span: float = 0.0
    may_be_log: bool = False
    known: bool = True
    prefix: str = ""

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
    series={"lr": "", "lr_policy": "policy", "critic_lr": "critic", "lr_critic": "critic"},
    include=(0.0,),
    may_be_log=True,
)
_GRAD_NORM = Panel(
    title="Gradient norm",
    unit="before clipping",
    read="Steady is good. Spikes that come back point at bad rows or too high a learning rate.",
    series={"grad_norm": "", "grad_norm_policy": "policy", "critic_grad_norm": "critic", "grad_norm_critic": "critic"},
    include=(0.0,),
    may_be_log=True,
)
_LEFT_OUT = Panel(
    title="Left out",
    unit="per step",
    read="Updates and answers with numbers that were not finite. One is an accident, several are a fault to be found.",
    series={"skipped": "updates", "bad_scores": "scores"},
    include=(0.0,),
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
    ("Is each update sound, and how fast?", [_GRAD_NORM, _LEFT_OUT, _LEARNING_RATE, _SPEED]),
]
_RL: Groups = [
    (
        "Does it get better?",
        [
            panel(
                "Score",
                "in the judge's units",
                "What the policy climbs. It is an opinion: believe it only as long as the truth rises with it.",
                score="rollouts",
            ),
            panel(
                "Scores so far",
                "in the judge's units",
                "What scores are divided by (and their mean, where that is taken off): all of the run until here.",
                score_mean_running="mean",
                score_std_running="standard deviation",
            ),
            Panel(
                title="Parts of the score",
                unit="before their weights",
                read="One part that rises while the others stand still is the one that is being gamed.",
                series={},
                prefix="score/",
            ),
            panel(
                "Disagreement",
                "standard deviation over the judges",
                "Growing, it says that the policy goes where the judges know nothing.",
                (0.0,),
                disagreement="",
            ),
            panel(
                "Truth",
                "by the checker",
                "The number that counts. A fall while the score still rises means the reward is being gamed.",
                gold="rollouts",
                eval_gold="held-out",
            ),
            panel("Reward", "per response", "The score minus the price of leaving the reference.", reward=""),
            panel(
                "Groups without spread",
                "share of groups",
                "All their answers scored the same and teach nothing. Near 1, the prompts are too easy or too hard.",
                (0.0, 1.0),
                zero_spread="",
            ),
            panel(
                "Rounds of sampling",
                "per step",
                "More than one where groups without spread are sampled anew.",
                (1.0,),
                sampling_rounds="",
            ),
        ],
    ),
    (
        "Does it stay itself?",
        [
            panel(
                "KL to the reference",
                "nats/answer",
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
                eval_length="held-out",
            ),
            panel(
                "Score and length",
                "correlation in a step",
                "Above 0.5 while answers grow: the judge is pleased by length.",
                (0.0,),
                length_corr="",
            ),
            panel(
                "Still the reference's kind of text",
                "nats/token",
                "What the reference pays for the held-out answers. Rising, they stop being its kind of text.",
                eval_ref_nll="held-out",
            ),
            panel(
                "KL coefficient",
                "",
                "The price of leaving the reference; it moves only where the KL has a target.",
                (0.0,),
                kl_coef="",
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
                clip_frac="policy",
                value_clip_frac="critic",
            ),
            panel(
                "Ratio",
                "new ÷ old probability",
                "Mean over a step's updates. It stays near 1 in a sound one.",
                (1.0,),
                ratio="",
            ),
            panel(
                "Updates",
                "per step",
                "Fewer than planned where the KL of an update ended the step.",
                (0.0,),
                updates="",
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
            panel(
                "Engine against trainer",
                "nats/token",
                "Distance of the two log-probabilities of a token: rounding in fp32, some hundredths in bf16.",
                (0.0,),
                engine_gap="mean",
                engine_gap_max="worst token",
            ),
            panel(
                "Answers of earlier weights",
                "nats/token",
                "Distance of a token's log-probability when it was sampled and now: what the importance weights mend.",
                (0.0,),
                stale_gap="mean",
                stale_gap_max="worst token",
            ),
            panel(
                "Staleness",
                "steps",
                "Steps that the weights which sampled are behind those that are trained.",
                (0.0,),
                staleness="",
            ),
            panel(
                "Corrected",
                "share of tokens",
                "Tokens whose importance weight is not 1, because engine and trainer disagree.",
                (0.0,),
                correction="",
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
                "KL in the loss",
                "before its coefficient",
                "The pull back to the reference, by the estimator of the settings.",
                (0.0,),
                kl_loss="",
            ),
            panel(
                "Likelihood of the mixed-in chats",
                "nats/token",
                "The ptx loss. Rising, the policy forgets what it was tuned on.",
                ptx_loss="",
            ),
            panel(
                "Critic loss",
                "",
                "Should settle; it follows the scale of the rewards.",
                (0.0,),
                value_loss="",
                critic_loss="",
            ),
            _GRAD_NORM,
            _LEFT_OUT,
            _LEARNING_RATE,
            _SPEED,
        ],
    ),
]
GROUPS: dict[str, Groups] = {
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
        ("Is each update sound, and how fast?", [_GRAD_NORM, _LEFT_OUT, _LEARNING_RATE, _SPEED]),
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
        ("Is each update sound, and how fast?", [_GRAD_NORM, _LEFT_OUT, _LEARNING_RATE, _SPEED]),
    ],
    "prefer": _PREFERENCE,
    "preference": _PREFERENCE,
    "dpo": _PREFERENCE,
    "kto": _PREFERENCE,
    "ppo": _RL,
    "grpo": _RL,
}
ANY: Groups = [
    ("Does it learn?", [panel("Loss", "", "Lower is better.", loss="training"), _ACCURACY, _MARGIN]),
    *_RL,
]
