"""The checks that each step's numbers pass: one function for each row of config/findings.py.

A check reads the history and its row of the table, and answers with what it saw, or None.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pvariance

from kinkajou.config.findings import Kind
from kinkajou.train.history import History


@dataclass(frozen=True)
class Sign:
    """The numbers that show it."""

    evidence: dict[str, float | str]
    metrics: tuple[str, ...] = ()  # those that show it, where they are not the table's


Check = Callable[[History, Kind, float], Sign | None]
"""History, row of the table, limit for this run's precision."""

MAY_BE_NAN = ("explained_variance",)


def not_finite(h: History, kind: Kind, limit: float) -> Sign | None:
    bad = {name: str(x) for name, x in h.row.items() if not math.isfinite(x) and not name.endswith(MAY_BE_NAN)}
    return Sign({**bad}, tuple(bad)) if bad else None


def first_ratio(h: History, kind: Kind, limit: float) -> Sign | None:
    # The mean ratio alone is near 1 for any policy, since the tokens were drawn from the old one.
    ratio, gap = h.row["first_ratio"], h.row.get("first_gap", 0.0)
    off = max(abs(ratio - 1), gap)
    return Sign({"first_ratio": ratio, "distance from 1": off, "limit": limit}) if off > limit else None


def above(h: History, kind: Kind, limit: float) -> Sign | None:
    """The newest value, or the median of the window."""
    name = kind.metrics[0]
    x = median(h.last(name, kind.window))
    said = name if kind.window == 1 else f"{name}, median of {kind.window} steps"
    return Sign({said: x, "limit": limit}) if x > limit else None


def kl_negative(h: History, kind: Kind, limit: float) -> Sign | None:
    means, errors = h.last("kl_ref", kind.window), h.last("kl_ref_se", kind.window)
    mean, error = fmean(means), math.sqrt(sum(se**2 for se in errors)) / len(errors)
    if mean > -max(limit * error, kind.also):
        return None
    return Sign({f"kl_ref, mean of {len(means)} steps": mean, "its standard error": error})


def kl_high(h: History, kind: Kind, limit: float) -> Sign | None:
    x, length = fmean(h.last("kl_ref", kind.window)), max(1.0, h.row["response_length"])
    if x <= limit or x / length <= kind.also:
        return None
    return Sign({"kl_ref (nats an answer)": x, "nats a token": x / length})


def kl_leap(h: History, kind: Kind, limit: float) -> Sign | None:
    x, usual = h.row["kl_ref"], median(h.last("kl_ref", kind.window, before=1))
    if x <= limit * usual or x - usual <= kind.also:
        return None
    return Sign({"kl_ref": x, f"median of the {kind.window} steps before": usual})


def policy_still(h: History, kind: Kind, limit: float) -> Sign | None:
    moved, clipped = max(h.last("kl_old", kind.window)), max(h.last("clip_frac", kind.window))
    several, at_work = h.row.get("updates", 1) > 1, h.row["lr"] >= 0.5 * max(h.last("lr", 200)) > 0
    if moved >= limit or clipped > 0 or not several or not at_work:
        return None
    return Sign({f"largest kl_old of {kind.window} steps": moved, "clip_frac": 0.0, "lr": h.row["lr"]})


def critic_useless(h: History, kind: Kind, limit: float) -> Sign | None:
    x = median(h.last("explained_variance", kind.window))
    if x > limit:
        return None
    return Sign({f"explained_variance, median of {kind.window} steps": x})


def zero_spread(h: History, kind: Kind, limit: float) -> Sign | None:
    x = fmean(h.last("zero_spread", kind.window))
    if x <= limit:
        return None
    return Sign({f"zero_spread, mean of {kind.window} steps": x, "score": fmean(h.last("score", kind.window))})


def ended_falls(h: History, kind: Kind, limit: float) -> Sign | None:
    start, now = fmean(h.first("ended", kind.window)), fmean(h.last("ended", kind.window))
    if start - now <= limit or now >= kind.also:
        return None
    seen = {"ended, first steps": start, "now": now}
    if h.has("response_length"):
        seen["response_length"] = h.row["response_length"]
    return Sign({**seen})


def length_gamed(h: History, kind: Kind, limit: float) -> Sign | None:
    together = fmean(h.last("length_corr", kind.window))
    lengths, scores = ((fmean(h.first(name, 5)), fmean(h.last(name, 5))) for name in ("response_length", "score"))
    if together <= limit or lengths[1] <= kind.also * lengths[0] or scores[1] <= scores[0]:
        return None
    seen = {"length_corr": together, "response_length, first steps": lengths[0], "now": lengths[1]}
    return Sign({**seen, "score, first steps": scores[0], "score now": scores[1]})


def gold_falls(h: History, kind: Kind, limit: float) -> Sign | None:
    golds, scores = h.points("eval_gold"), dict(h.points("eval_score"))
    best, at = max((x, step) for step, x in golds)
    bound = best - max(limit * (best - golds[0][1]), kind.also * abs(best))
    later = [(step, x) for step, x in golds if step > at]
    if len(later) < kind.window or max(x for _, x in later[-kind.window :]) >= bound:
        return None
    judged = scores.get(at, math.inf), h.row["eval_score"]
    if judged[1] <= judged[0]:
        return None
    numbers = {f"eval_gold at step {at}": best, "eval_gold now": later[-1][1]}
    numbers |= {f"eval_score at step {at}": judged[0], "eval_score now": judged[1]}
    return Sign({**numbers})


def entropy_collapse(h: History, kind: Kind, limit: float) -> Sign | None:
    start, now = fmean(h.first("entropy", 3)), fmean(h.last("entropy", kind.window))
    if now >= limit * start or now >= kind.also:
        return None
    return Sign({"entropy, first steps": start, f"now, mean of {kind.window} steps": now})


def grad_spike(h: History, kind: Kind, limit: float) -> Sign | None:
    for name in kind.metrics:
        before = h.last(name, kind.window, before=1)
        if not h.has(name) or len(before) < kind.after:
            continue
        x, usual = h.row[name], max(median(before), median(h.first(name, kind.after)))
        if usual > 0 and x > limit * usual:
            return Sign({name: x, f"median of {len(before)} steps before": usual}, (name,))
    return None


def lr_zero(h: History, kind: Kind, limit: float) -> Sign | None:
    return None if any(h.last("lr", kind.window)) else Sign({"lr": 0.0})


def loss_rises(h: History, kind: Kind, limit: float) -> Sign | None:
    values, width = h.last("loss", 200), kind.window
    now, before = values[-width:], values[:-width]
    blocks = [before[i : i + width] for i in range(0, len(before) - width + 1, width)]
    low = min(blocks, key=fmean)
    rise, noise = fmean(now) - fmean(low), standard_error(now, low)
    if rise <= limit * abs(fmean(low)) or rise <= kind.also or rise <= 6 * noise:
        return None
    numbers = {f"loss, mean of {width} steps": fmean(now), "lowest such mean": fmean(low)}
    return Sign({**numbers})


def loss_still(h: History, kind: Kind, limit: float) -> Sign | None:
    start, now = h.first("loss", kind.window), h.last("loss", kind.window)
    fall = fmean(start) - fmean(now)
    if fall >= limit * abs(fmean(start)) or fall > 2 * standard_error(start, now) or warming_up(h):
        return None
    return Sign({f"loss, first {kind.window} steps": fmean(start), "now": fmean(now), "lr": h.row["lr"]})


def accuracy_stuck(h: History, kind: Kind, limit: float) -> Sign | None:
    values = h.last("accuracy", kind.window)
    if fmean(values) + math.sqrt(pvariance(values) / len(values)) >= limit or warming_up(h):
        return None
    return Sign({f"accuracy, mean of {kind.window} steps": fmean(values), "lr": h.row["lr"]})


def overfits(h: History, kind: Kind, limit: float) -> Sign | None:
    points = h.points("eval_loss")
    best, at = min((x, step) for step, x in points)
    later = [x for step, x in points if step > at]
    since = [x for step, x in h.points("loss") if step > at]
    half = len(since) // 2
    if len(later) < kind.window or half < 2 or min(later[-kind.window :]) <= best + limit * abs(best):
        return None
    if fmean(since[half:]) >= fmean(since[:half]):
        return None
    numbers = {f"eval_loss at step {at}": best, "eval_loss now": later[-1], "loss now": fmean(since[half:])}
    return Sign({**numbers})


def likelihood_displacement(h: History, kind: Kind, limit: float) -> Sign | None:
    (start, now), (narrow, wide) = (
        (h.first(name, kind.window), h.last(name, kind.window)) for name in ("logp_chosen", "margin")
    )
    lost = fmean(start) - fmean(now)
    if lost <= limit * abs(fmean(start)) or lost <= 4 * standard_error(start, now) or fmean(wide) <= fmean(narrow):
        return None
    numbers = {f"logp_chosen, first {kind.window} steps": fmean(start), "logp_chosen now": fmean(now)}
    return Sign({**numbers, "margin": fmean(wide)})


def standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the difference of two means."""
    return math.sqrt(pvariance(a) / len(a) + pvariance(b) / len(b))


def warming_up(h: History) -> bool:
    """Whether the learning rate still rises."""
    before, now = h.last("lr", 2)
    return now > before or now == 0


CHECKS: dict[str, Check] = {
    "not_finite": not_finite,
    "first_ratio": first_ratio,
    "engine_gap": above,
    "engine_gap_max": above,
    "kl_negative": kl_negative,
    "kl_high": kl_high,
    "kl_leap": kl_leap,
    "kl_old_high": above,
    "clip_frac_high": above,
    "policy_still": policy_still,
    "critic_useless": critic_useless,
    "zero_spread": zero_spread,
    "ended_falls": ended_falls,
    "length_gamed": length_gamed,
    "gold_falls": gold_falls,
    "entropy_collapse": entropy_collapse,
    "grad_spike": grad_spike,
    "lr_zero": lr_zero,
    "loss_rises": loss_rises,
    "loss_still": loss_still,
    "accuracy_stuck": accuracy_stuck,
    "overfits": overfits,
    "likelihood_displacement": likelihood_displacement,
}
"""By name, in the order in which they are asked."""
