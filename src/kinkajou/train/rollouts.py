"""Sampling answers to prompts and having them judged, for training and on held-out prompts."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from kinkajou import faults
from kinkajou.algos.groups import overlong_penalty, zero_spread
from kinkajou.algos.kl import bounded, k1
from kinkajou.algos.running import Moments, scaled
from kinkajou.algos.tensors import masked_mean
from kinkajou.batch import Rollout, ScoredRollout, TokenBatch
from kinkajou.config import GRPOConfig, RLConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.loader import share
from kinkajou.engine.engine import AheadEngine
from kinkajou.engine.sampling import derive_seed
from kinkajou.errors import UserError
from kinkajou.memory import needed
from kinkajou.parallel.strategy import Strategy
from kinkajou.rewards.judges import Judge, Verdict, check_finite
from kinkajou.rewards.rules import Answer
from kinkajou.train.bad_scores import take_out
from kinkajou.train.parts import RLParts, Task
from kinkajou.train.round import Round
from kinkajou.train.run import Run
from kinkajou.train.update import in_parts

B = TypeVar("B", bound=TokenBatch)
FEWER = (
    "fewer answers at once (--tokens_per_microbatch / --max_len of them, 64 at least), or a lower --max_new_tokens, "
    "--dtype bf16, or --rollout ray or vllm on other devices"
)


@dataclass(frozen=True)
class Sampled:
    """This rank's judged answers, those to one prompt after one another."""

    rollout: ScoredRollout
    samples: list[dict[str, Any]]  # all ranks' answers as rows of `samples.jsonl`
    metrics: dict[str, float]


def sample_prompts(run: Run, cfg: RLConfig, parts: RLParts, batch: Sequence[int], attempt: int = 0) -> Sampled:
    """One answer, or a group of them, to each of this rank's prompts of the batch.

    The seed of each is (run seed, step, prompt), with its number in the group where there is one, and with the
    attempt's from the second on: a prompt that comes again in a step gets other answers.
    """
    s, size = run.strategy, group_size(cfg)
    if cfg.engine.max_staleness:
        begin_ahead(run, cfg, parts)
    tasks, seeds = asked(run, cfg, parts, batch, run.step, attempt)
    rollout, answers = generate(tasks, seeds, cfg, parts)
    faults.reached("rollout.sampled")
    verdict = judged(run, parts.judge, answers, rollout)
    scored = ScoredRollout(rollout.tokens, rollout.mask, rollout.sampler_logp, rollout.ended, verdict.scores)
    scored, bad = take_out(scored, verdict, answers, size, s, run.guard)
    details = {metric_of(name): mean_of_finite(x, s) for name, x in verdict.details.items()} | bad
    if cfg.engine.max_staleness:
        details["staleness"] = cast(AheadEngine, parts.engine).staleness
    return Sampled(scored, sample_rows(answers, verdict, s, size), details)


def group_size(cfg: RLConfig) -> int:
    return cfg.algo.group_size if isinstance(cfg, GRPOConfig) else 1


def asked(
    run: Run, cfg: RLConfig, parts: RLParts, batch: Sequence[int], step: int, attempt: int = 0
) -> tuple[list[Task], list[int]]:
    """This rank's prompts of a step, those of a group after one another, and the seeds of their answers."""
    mine = share(batch, rank=run.strategy.rank, world=run.strategy.world)
    again = (attempt,) if attempt else ()
    wanted = [(i, (k, *again) if isinstance(cfg, GRPOConfig) else ()) for i in mine for k in range(group_size(cfg))]
    return [parts.tasks[i] for i, _ in wanted], [derive_seed(cfg.run.seed, step, i, *number) for i, number in wanted]


def begin_ahead(run: Run, cfg: RLConfig, parts: RLParts) -> None:
    """Lets the workers begin on this step's prompts and those of the next ones, with the weights as they are now.

    What was begun in an earlier step stays as it is, so the answers of step n are sampled with the weights that
    step max(0, n - 1 - max_staleness) has left.
    """
    for step in range(run.step, min(run.step + cfg.engine.max_staleness, run.total) + 1):
        tasks, seeds = asked(run, cfg, parts, parts.order.batch(step - 1), step)
        cast(AheadEngine, parts.engine).begin(
            [task.tokens for task in tasks], parts.sampling, max_new_tokens=cfg.rollout.max_new_tokens, seeds=seeds
        )


def metric_of(detail: str) -> str:
    """The metric of a judge's detail: `score/PART`, or an ensemble's `disagreement`."""
    return detail if detail.endswith("disagreement") else f"score/{detail}"


def generate(
    tasks: Sequence[Task], seeds: Sequence[int], cfg: RLConfig, parts: RLParts
) -> tuple[Rollout, list[Answer]]:
    with needed("rollouts", FEWER):
        rollout = parts.engine.generate(
            [task.tokens for task in tasks],
            parts.sampling,
            max_new_tokens=cfg.rollout.max_new_tokens,
            seeds=seeds,
        )
    answers = [
        Answer(task.prompt, text, bool(ended))
        for task, text, ended in zip(tasks, texts(rollout, parts.form), rollout.ended, strict=True)
    ]
    return rollout, answers


def judged(run: Run, judge: Judge, answers: Sequence[Answer], rollout: Rollout, *, must: bool = False) -> Verdict:
    """The judge's scores.  If they cannot be had, nothing is lost: answers and weights are written before the stop.

    With `must` each score must be finite.
    """
    verdict, fault = None, None
    try:
        with record_function("kinkajou/judge"):
            verdict = judge(answers, rollout)
            if faults.reached("judge.scores") == "nan":
                verdict.scores[:1] = float("nan")
            if must:
                check_finite(verdict, answers)
    except UserError as found:  # told below, once every rank knows
        fault = found
    (failed,) = run.strategy.agree([fault is not None])
    if verdict is not None and not failed:
        return verdict
    path = keep_unscored(run, answers, rollout)
    saved = run.save_before_stop()
    fault = fault or UserError("the judge of another process failed", exit_code=5)
    evidence = "; ".join(
        filter(None, (fault.evidence, f"{len(answers)} answers without a score are kept in {path}", saved))
    )
    raise UserError(fault.problem, evidence=evidence, fix=fault.fix, exit_code=fault.exit_code)


def keep_unscored(run: Run, answers: Sequence[Answer], rollout: Rollout) -> Path:
    """Writes this rank's answers with tokens and log-probabilities, one a line."""
    path = run.folder / f"unscored-{run.step:06d}-{run.strategy.rank}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for answer, tokens, mask, logp in zip(answers, rollout.tokens, rollout.mask, rollout.sampler_logp, strict=True):
            row = {
                "prompt": answer.prompt.messages[-1].content,
                "response": answer.text,
                "ended": answer.ended,
                "tokens": tokens[1:][mask].tolist(),
                "sampler_logp": logp[mask].tolist(),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def regrouped(found: Sequence[tuple[ScoredRollout, list[dict[str, Any]]]], wanted: int, size: int) -> list[int]:
    """Numbers of the groups to train on: those whose scores differ, in order; equal ones fill up what is missing."""
    scores = torch.cat([rollout.scores for rollout, _ in found]).view(-1, size)
    flat = zero_spread(scores).tolist()
    chosen = [i for i, same in enumerate(flat) if not same][:wanted]
    spare = [i for i, same in enumerate(flat) if same]
    return sorted([*chosen, *spare[: wanted - len(chosen)]])


def sample_groups(run: Run, cfg: GRPOConfig, parts: RLParts) -> Sampled:
    """DAPO's dynamic sampling (Yu 2025, section 3.2): further prompts replace groups whose scores are all equal.

    At most 1 + `dynamic_sampling` rounds; what is then still missing is filled by such groups.
    """
    s, size, wanted = run.strategy, cfg.algo.group_size, cfg.rollout.prompts_per_step
    found: list[tuple[ScoredRollout, list[dict[str, Any]]]] = []
    useful, bad = 0, 0.0
    for attempt in range(1 + cfg.algo.dynamic_sampling):
        try:
            sampled = sample_prompts(run, cfg, parts, parts.order.batch(parts.state.batches + attempt), attempt)
        except UserError as fault:
            raise with_earlier(run, fault, [row for _, rows in found for row in rows]) from None
        bad += sampled.metrics.get("bad_scores", 0.0)
        whole = joined(sampled.rollout, s, size) if cfg.algo.dynamic_sampling else sampled.rollout
        found.append((whole, sampled.samples))
        useful += int((~zero_spread(whole.scores.view(-1, size))).sum())
        if not cfg.algo.dynamic_sampling or useful >= wanted:
            break
    parts.state.batches += len(found)
    rounds = {"sampling_rounds": float(len(found))} if cfg.algo.dynamic_sampling else {}
    rounds |= {"bad_scores": bad} if bad else {}
    if len(found) == 1:
        return replace(sampled, metrics=sampled.metrics | rounds)
    groups = regrouped(found, wanted, size)
    rows = [group * size + k for group in groups[s.rank :: s.world] for k in range(size)]
    everything = together([rollout for rollout, _ in found])
    samples = [row for _, part in found for row in part]
    picked = [samples[group * size + k] for group in groups for k in range(size)]
    details = set(picked[0]) - {"prompt", "response", "score", "ended"}
    metrics = {metric_of(name): mean_of_rows(picked, name) for name in sorted(details)}
    mine = everything.select(torch.tensor(rows, device=everything.tokens.device))
    return Sampled(mine, picked, metrics | rounds)


def mean_of_rows(rows: Sequence[dict[str, Any]], name: str) -> float:
    finite = [row[name] for row in rows if math.isfinite(row[name])]
    return fmean(finite) if finite else 0.0


def with_earlier(run: Run, fault: UserError, rows: Sequence[dict[str, Any]]) -> UserError:
    """The fault, once what earlier rounds of the step sampled and scored is written too."""
    if not rows:
        return fault
    path = run.folder / f"scored-{run.step:06d}.jsonl"
    if run.writes:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    evidence = f"{fault.evidence}; {len(rows)} scored answers of earlier rounds are kept in {path}"
    return UserError(fault.problem, evidence=evidence, fix=fault.fix, exit_code=fault.exit_code)


def together(parts: Sequence[B]) -> B:
    """Batches below one another, padded to the widest."""
    widest = max(part.mask.shape[1] for part in parts)
    wide = [part.widen(widest - part.mask.shape[1]) for part in parts]
    columns = zip(*(vars(part).values() for part in wide), strict=True)
    return type(parts[0])(*(torch.cat(column) for column in columns))


def joined(batch: B, s: Strategy, group: int = 1) -> B:
    """All ranks' rows in the order of one process, so that minibatches do not depend on the world size."""
    widest = max(cast(list[int], s.gather([batch.mask.shape[1]])))
    wide = batch.widen(widest - batch.mask.shape[1])
    return wide.map(lambda x: s.all_rows(x.view(-1, group, *x.shape[1:])).flatten(0, 1))


def minibatches(cfg: RLConfig, rows: int, step: int) -> Iterator[list[int]]:
    """Row numbers of each minibatch, epoch after epoch: a function of (seed, step), the same on all ranks."""
    for epoch in range(cfg.algo.epochs):
        order = list(range(rows))
        random.Random(f"{cfg.run.seed}/{step}/{epoch}").shuffle(order)
        for start in range(0, rows, cfg.algo.minibatch_size):
            yield order[start : start + cfg.algo.minibatch_size]


def shaped(cfg: RLConfig, rollout: ScoredRollout, seen: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """Scores as training sees them: scaled, bounded, less the penalties for no end and for length.  (b,).

    `seen` are the moments of all scores so far, these included (`RLState.scores`).

    Where advantages are per token the bound comes later, on what the baseline leaves (OpenRLHF; estimates.py).
    """
    shaping, longest = cfg.shaping, cfg.rollout.max_new_tokens
    later = isinstance(cfg, GRPOConfig) and cfg.algo.returns == "token"
    scores = scaled(rollout.scores, Moments(*seen), shaping.score_scale)
    scores = bounded(scores, 0.0 if later else cfg.numerics.score_clip)
    scores = scores - shaping.missing_end_penalty * ~rollout.ended
    buffer = max(1, round(shaping.overlong_share * longest)) if shaping.overlong_share else 0
    if buffer:
        lengths = rollout.mask.sum(1)
        scores = scores + shaping.overlong_penalty * overlong_penalty(lengths, longest, buffer)
    return scores


def mean_of_finite(x: Tensor, s: Strategy) -> float:
    """A judge's detail: a score that is not finite has been told of."""
    finite = x.isfinite()
    return masked_mean(x.where(finite, 0.0), finite, all_sum=s.all_sum).item()


def mean_over_samples(x: Tensor, s: Strategy) -> float:
    return masked_mean(x, torch.ones_like(x, dtype=torch.bool), all_sum=s.all_sum).item()


def texts(rollout: Rollout, form: ChatFormat) -> list[str]:
    return [form.answer(row[1:][mask].tolist()) for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]


def count_updates(run: Run, cfg: RLConfig, round: Round[Any]) -> None:
    """This rank's share of the tokens that the updates have read."""
    own = round.batch.lengths[run.strategy.rank :: run.strategy.world]
    run.count_tokens("update", own * cfg.algo.epochs)


def before_steps(run: Run, cfg: RLConfig, parts: RLParts) -> None:
    """The held-out prompts before anything is learnt, as step 0."""
    if parts.held_out and not run.resumed:
        found = held_out_scores(run, cfg, parts)
        run.end_step(found, best=best_of(cfg, found))


def best_of(cfg: RLConfig, metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """The metric that decides which checkpoint is the best, where one is to be kept and this step has it."""
    name = f"eval_{cfg.judge.keep_best}"
    return (name, metrics[name]) if name in metrics else None


def end_step(
    run: Run, cfg: RLConfig, parts: RLParts, round: Round[Any], metrics: dict[str, float], *, samples: int
) -> None:
    """What follows an update: new weights for the engine, evaluation, KL coefficient, samples, log, checkpoint.

    What can fail comes first: until the log has the step, it can be taken up again.
    """
    parts.engine.load(parts.weights(run.strategy))
    if parts.held_out and (run.due(cfg.run.eval_every) or run.step == run.total):
        metrics |= held_out_scores(run, cfg, parts)
    parts.state.follow(cfg, metrics.get("kl_ref", 0.0), samples)
    if run.due(cfg.run.sample_every) or run.step == 1:
        run.write_samples(round.samples[:16])
    run.end_step(metrics, best=best_of(cfg, metrics))


def held_out_scores(run: Run, cfg: RLConfig, parts: RLParts) -> dict[str, float]:
    """Mean score (and gold score if there is a gold judge) over the held-out prompts; the seeds never change.

    `eval_score_se` is the mean's standard error, `eval_kl_ref` in nats an answer. `eval_ref_nll`, the answers'
    negative log-likelihood under the reference in nats a token, shows whether they still are text of its kind.
    """
    s = run.strategy
    mine = range(s.rank, len(parts.held_out), s.world)
    seeds = [derive_seed(cfg.run.seed, "held out", i) for i in mine]
    rollout, answers = generate([parts.held_out[i] for i in mine], seeds, cfg, parts)
    scores = judged(run, parts.judge, answers, rollout, must=True).scores
    score = mean_over_samples(scores, s)
    spread = mean_over_samples((scores - score) ** 2, s) / len(parts.held_out)
    found = {
        "eval_score": score,
        "eval_score_se": spread**0.5,
        "eval_ended": mean_over_samples(rollout.ended.float(), s),
        "eval_length": mean_over_samples(rollout.mask.sum(1).float(), s),
    }
    if parts.reference:
        ref_logp = in_parts(rollout, parts.budget, parts.reference, s.passes)
        found["eval_kl_ref"] = mean_over_samples(k1(rollout.sampler_logp, ref_logp).sum(1), s)
        found["eval_ref_nll"] = -masked_mean(ref_logp, rollout.mask, all_sum=s.all_sum).item()
    if parts.gold:
        gold = judged(run, parts.gold, answers, rollout, must=True).scores
        found["eval_gold"] = mean_over_samples(gold, s)
    return found


def sample_rows(answers: Sequence[Answer], verdict: Verdict, s: Strategy, group: int) -> list[dict[str, Any]]:
    """The step's answers of all ranks as rows of `samples.jsonl`."""
    columns = {"score": verdict.scores, **verdict.details}
    rows = [
        {
            "prompt": answer.prompt.messages[-1].content,
            "response": answer.text,
            **{name: round(float(x[i]), 5) for name, x in columns.items()},
            "ended": answer.ended,
        }
        for i, answer in enumerate(answers)
    ]
    groups = [rows[i : i + group] for i in range(0, len(rows), group)]
    return [row for part in cast(list[list[dict[str, Any]]], s.gather(groups)) for row in part]
