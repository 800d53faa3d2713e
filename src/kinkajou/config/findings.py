"""The one table of what a run's diagnosis can find: names for `--stop-on`, limits with reasons, words.

`train/checks.py` holds the code of each row.  docs/diagnosis.md shows the table.
"""

from dataclasses import dataclass

from kinkajou.errors import UserError, did_you_mean

ANY = "any"


@dataclass(frozen=True, kw_only=True)
class Kind:
    metrics: tuple[str, ...]
    """What is looked at. A row of metrics without the first of them is passed over."""
    limit: float
    """Where it begins, in the unit that `why` names."""
    bf16: float | None = None
    """The limit for a run that computes in bfloat16, if it is another."""
    also: float = 0.0
    """A second bound that must hold too."""
    window: int = 1
    """Over how many of the newest values."""
    after: int = 1
    """Not before this many values: the warm-up."""
    why: str
    """Why this limit."""
    cause: str
    """What is wrong, and what it comes from."""
    action: str
    """What to do next."""

    def bound(self, *, bf16: bool) -> float:
        return self.bf16 if bf16 and self.bf16 is not None else self.limit


FINDINGS: dict[str, Kind] = {
    "not_finite": Kind(
        metrics=(),
        limit=0,
        why="no metric may be NaN or infinite, but `explained_variance` of returns that are all equal",
        cause="a number is NaN or infinite",
        action="lower --lr; if it comes at the first step, look at the model's weights and the step's records",
    ),
    "first_ratio": Kind(
        metrics=("first_ratio",),
        limit=1e-4,
        bf16=2e-2,
        why="mean distance of the two log-probabilities (first_gap), or of the mean ratio from 1; the same weights "
        "score the same tokens twice, so only rounding is left (measured: 1e-6 in fp32)",
        cause="the ratio of new to old probability is not 1 before the first update: the rollouts were scored with "
        "other weights, another temperature or another mask than the loss uses",
        action="trust no number of this run; check that temperature, top_k and top_p did not change, and report it",
    ),
    "engine_gap": Kind(
        metrics=("engine_gap",),
        limit=1e-4,
        bf16=2e-2,
        why="nats a token, mean; one code samples and trains, so fp32 differs by rounding alone (measured: 1e-7)",
        cause="the engine that samples and the trainer give the same tokens different probabilities",
        action="the same dtype, temperature, top_k and top_p on both sides; till then --rollout_correction truncate",
    ),
    "engine_gap_max": Kind(
        metrics=("engine_gap_max",),
        limit=1e-2,
        bf16=1.0,
        why="nats, the worst token of the step; at 1 the importance weight of that token is e",
        cause="engine and trainer disagree widely on at least one token: often one at the edge of top-k or top-p",
        action="--rollout_correction truncate or mask; if it stays, sample without top_k and top_p",
    ),
    "kl_negative": Kind(
        metrics=("kl_ref", "kl_ref_se"),
        limit=4,
        also=0.01,
        window=8,
        after=3,
        why="standard errors below 0 of the window's mean, and 0.01 nats an answer. One step within 2 is noise: k1 is "
        "negative every other time while the policy still is the reference. 4 over 8 steps, because it is asked "
        "again at each step",
        cause="the KL to the reference is below 0 beyond its noise, which no distribution can be: policy and reference "
        "are scored under different ones, or the tokens were drawn from a third",
        action="check that engine, policy and reference use the same temperature, top_k, top_p and template",
    ),
    "kl_high": Kind(
        metrics=("kl_ref", "response_length"),
        limit=50,
        also=0.5,
        window=3,
        after=3,
        why="nats an answer, and 0.5 nats a token: beyond both the reference calls the answers noise. Ouyang 2022 and "
        "later runs stay below",
        cause="the policy has left the reference far behind",
        action="raise --kl_coef or set --kl_target; look at samples.jsonl: is it still text?",
    ),
    "kl_leap": Kind(
        metrics=("kl_ref",),
        limit=4,
        also=10,
        window=8,
        after=5,
        why="times the median of the 8 steps before, and 10 nats an answer above it: a slow rise never does that",
        cause="the KL to the reference leaps: one update broke the policy",
        action="lower --lr, --epochs or --max_norm, or set --stop_kl 0.05",
    ),
    "kl_old_high": Kind(
        metrics=("kl_old",),
        limit=0.1,
        window=3,
        after=3,
        why="nats a token, median of 3 steps; usual targets of an update lie between 0.01 and 0.05",
        cause="each update moves the policy too far for its rollouts to speak of it",
        action="lower --lr or --epochs, or set --stop_kl 0.05",
    ),
    "clip_frac_high": Kind(
        metrics=("clip_frac",),
        limit=0.3,
        window=3,
        after=3,
        why="share of tokens, median of 3 steps; 0.05 to 0.2 is common, GSPO's narrow clip included",
        cause="the clip throws away the gradient of a large share of the tokens",
        action="lower --lr or --epochs; with a narrow clip (gspo) check --clip",
    ),
    "policy_still": Kind(
        metrics=("clip_frac", "kl_old", "lr"),
        limit=1e-6,
        window=20,
        after=20,
        why="nats a token in each of 20 steps with several updates, none of them clipped, at half the peak rate or "
        "more: healthy updates move 1e-4 to 1e-2",
        cause="the updates hardly move the policy",
        action="raise --lr; if zero_spread is near 1 there is nothing to learn from: change the prompts",
    ),
    "critic_useless": Kind(
        metrics=("explained_variance",),
        limit=0,
        window=15,
        after=30,
        why="median of 15 steps, not before 30; at 0 a constant would do as well",
        cause="the critic explains nothing of the returns, so advantages are noise",
        action="raise --critic_lr, set --critic_warmup 10, or start the critic from a reward model (--critic)",
    ),
    "zero_spread": Kind(
        metrics=("zero_spread", "score"),
        limit=0.9,
        window=10,
        after=10,
        why="share of groups, mean of 10 steps: nine tenths of the sampling teach nothing",
        cause="nearly all groups have equal scores: the prompts are all solved, or all too hard",
        action="if the score is near its best, stop; else take easier prompts, a larger --group_size, a finer reward, "
        "or --algorithm dapo",
    ),
    "ended_falls": Kind(
        metrics=("ended",),
        limit=0.3,
        also=0.2,
        window=5,
        after=10,
        why="share of answers, mean of 5 steps against the first 5, and below a fifth: policies that learn "
        "longer answers from scratch pass through a third",
        cause="fewer and fewer answers end by themselves: the policy forgets how to stop, or needs more room",
        action="raise --max_new_tokens, or set --missing_end_penalty 1 (or --overlong_share 0.2)",
    ),
    "length_gamed": Kind(
        metrics=("length_corr", "response_length", "score"),
        limit=0.5,
        also=1.25,
        window=10,
        after=15,
        why="correlation of score and length, mean of 10 steps, while answers grow by a quarter and the score rises",
        cause="the score follows the length, and the answers grow: the judge is pleased by length",
        action="look at long and short answers of equal quality (kinkajou eval reward); set --overlong_share 0.2",
    ),
    "gold_falls": Kind(
        metrics=("eval_gold", "eval_score"),
        limit=0.25,
        also=0.1,
        window=2,
        after=3,
        why="share of the gain that is lost again at two evaluations in a row, and a tenth of the best value",
        cause="the judge's score rises while the gold score falls: the policy games its judge (Gao 2023)",
        action="stop here and take the best step (--keep_best gold); raise --kl_coef or train a better reward model",
    ),
    "entropy_collapse": Kind(
        metrics=("entropy",),
        limit=0.05,
        also=0.01,
        window=5,
        after=8,
        why="share of the entropy of the first 3 steps, and 0.01 nats a token: below both an answer of 50 tokens comes "
        "out the same three times in five. Tasks with one right answer are learnt at 0.03",
        cause="the policy always says the same, so nothing new is tried",
        action="lower --lr, raise --kl_coef or --clip_high, or keep an earlier checkpoint; fine if the task has one "
        "answer and the score is at its best",
    ),
    "grad_spike": Kind(
        metrics=("grad_norm", "critic_grad_norm"),
        limit=10,
        window=50,
        after=10,
        why="times the median of the last 50 steps, and of the first 10: late gradients near 0 make no spikes",
        cause="the gradient's norm leaps: a broken record, or too high a learning rate",
        action="look at this step's records; lower --lr or --max_norm if it comes back",
    ),
    "lr_zero": Kind(
        metrics=("lr",),
        limit=0,
        window=3,
        after=3,
        why="3 steps in a row",
        cause="the learning rate is 0: nothing is trained",
        action="set --lr",
    ),
    "loss_rises": Kind(
        metrics=("loss",),
        limit=0.2,
        also=0.05,
        window=10,
        after=30,
        why="share above the lowest mean of 10 steps, 0.05 nats and 6 standard errors above it",
        cause="the training loss rises again",
        action="lower --lr or raise --warmup; if the records come sorted, shuffle them",
    ),
    "loss_still": Kind(
        metrics=("loss", "lr"),
        limit=0.01,
        window=20,
        after=100,
        why="share of the first 20 steps' loss by which the last 20 must be lower, unless noise hides it (2 standard "
        "errors); not before 100 steps and the end of the warm-up",
        cause="the loss has not fallen since the start",
        action="raise --lr; look at what is trained on with `kinkajou check`",
    ),
    "accuracy_stuck": Kind(
        metrics=("accuracy", "lr"),
        limit=0.55,
        window=40,
        after=60,
        why="mean of 40 steps and one standard error, after 60 steps and the warm-up; 0.5 is a coin flip",
        cause="chosen and rejected are told apart no better than by a coin",
        action="raise --lr; check that chosen and rejected are not swapped or equal (kinkajou check)",
    ),
    "overfits": Kind(
        metrics=("eval_loss", "loss"),
        limit=0.02,
        window=2,
        after=3,
        why="share above the lowest held-out loss at two evaluations in a row, while the training loss falls",
        cause="the held-out loss rises while the training loss falls: rows are learnt by heart",
        action="stop at the best step; fewer --epochs, a lower --lr, or more data",
    ),
    "likelihood_displacement": Kind(
        metrics=("logp_chosen", "margin"),
        limit=0.1,
        window=20,
        after=40,
        why="share that the chosen answers' log-probability has lost (and 4 standard errors), while the margin grows",
        cause="the margin grows while the chosen answers get less likely: probability goes to answers nobody chose "
        "(Razin 2024)",
        action="mix in likelihood (--loss sigmoid --loss 0.2*sft), lower --lr, or drop pairs of near-equal answers",
    ),
}


def check_names(names: tuple[str, ...]) -> None:
    """UserError for a finding that nobody knows."""
    for name in names:
        if name != ANY and name not in FINDINGS:
            raise UserError(
                f"--stop_on: unknown finding {name!r}",
                fix=f"{did_you_mean(name, (ANY, *FINDINGS))} docs/diagnosis.md explains them",
            )
