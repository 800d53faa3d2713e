"""Best-of-N and rejection sampling: several answers to each prompt, judged, and the good ones kept as training data."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import torch
from rich.progress import track

from kinkajou.batch import Rollout, Sampling
from kinkajou.config import SampleConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.records import Prompt
from kinkajou.data.sources import read_prompts
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.sampling import derive_seed
from kinkajou.errors import UserError
from kinkajou.models.load import LoadOptions, find_model, load_language_model
from kinkajou.rewards.judges import Judge, check_finite
from kinkajou.rewards.load import load_judge
from kinkajou.rewards.rules import Answer
from kinkajou.rewards.specs import check_specs
from kinkajou.train.inputs import told

AT_ONCE = 64
"""Answers that are sampled and judged together."""


@dataclass(frozen=True)
class Scored:
    answer: Answer
    score: float


@dataclass(frozen=True)
class Sampler:
    form: ChatFormat
    engine: LocalEngine
    judge: Judge

    def answers(self, cfg: SampleConfig, prompts: Sequence[tuple[int, Prompt]]) -> tuple[list[Answer], Rollout]:
        """`group_size` to each prompt; the seed of each is (seed, prompt, number in the group)."""
        wanted = [(i, prompt, k) for i, prompt in prompts for k in range(cfg.group_size)]
        own = cfg.sampler
        rollout = self.engine.generate(
            [self.form.prompt(prompt.messages) for _, prompt, _ in wanted],
            Sampling(own.temperature, own.top_k, own.top_p, own.min_p),
            max_new_tokens=own.max_new_tokens,
            seeds=[derive_seed(own.seed, "sample", i, k) for i, _, k in wanted],
        )
        said = [
            self.form.answer(row[1:][mask].tolist()) for row, mask in zip(rollout.tokens, rollout.mask, strict=True)
        ]
        answers = [
            Answer(prompt, text, bool(ended))
            for (_, prompt, _), text, ended in zip(wanted, said, rollout.ended, strict=True)
        ]
        return answers, rollout

    def groups(self, answers: Sequence[Answer], rollout: Rollout, size: int) -> list[list[Scored]]:
        """One for each prompt."""
        verdict = self.judge(answers, rollout)
        check_finite(verdict, answers)
        scores = verdict.scores.tolist()
        found = [Scored(answer, score) for answer, score in zip(answers, scores, strict=True)]
        return [found[i : i + size] for i in range(0, len(found), size)]


def sample_data(cfg: SampleConfig) -> Path:
    """Writes the file; returns its path.  It appears whole: until the end it is `OUTPUT.part`.

    Where the judge fails, its answers are kept in `OUTPUT.unscored.jsonl`.
    """
    check_specs(cfg.scoring.reward)
    target = Path(cfg.output)
    if target.exists() and not cfg.overwrite:
        raise UserError(f"{target} is already there", fix="choose another --output, or pass --overwrite to replace it")
    own = cfg.sampler
    prompts = told(read_prompts(own.prompts, max_rows=own.max_prompts, bad_rows=own.bad_rows))
    sampler = load_sampler(cfg)
    usable = list(enumerate(fitting(cfg, prompts, sampler.form)))
    aside = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    per_round = max(1, AT_ONCE // cfg.group_size)
    groups: list[list[Scored]] = []
    num_written = 0
    with aside.open("w", encoding="utf-8") as file:
        for start in track(range(0, len(usable), per_round), description="sample", transient=True):
            answers, rollout = sampler.answers(cfg, usable[start : start + per_round])
            try:
                part = sampler.groups(answers, rollout, cfg.group_size)
            except UserError as fault:
                write_through(file)
                raise unfinished(fault, answers, target, aside, num_written) from None
            groups += part
            for row in (row for group in part for row in kept(cfg, group)):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                num_written += 1
        write_through(file)
    if not num_written:
        aside.unlink()
        raise UserError(
            "no answer was good enough to be kept",
            evidence=f"best score {max(x.score for group in groups for x in group):.4g}, threshold {cfg.threshold}",
            fix="lower --threshold, or raise --group_size",
        )
    aside.replace(target)
    print(summary(cfg, groups, num_written, target))
    return target


def unfinished(fault: UserError, answers: Sequence[Answer], target: Path, aside: Path, num_written: int) -> UserError:
    """Keeps what the judge has not scored; the fault, and where the work lies."""
    unscored = target.with_name(f"{target.name}.unscored.jsonl")
    with unscored.open("w", encoding="utf-8") as file:
        for answer in answers:
            row = {"messages": [*prompt_of(answer), message(answer)]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        write_through(file)
    kept_in = f"{num_written} finished rows are kept in {aside}, {len(answers)} answers without a score in {unscored}"
    evidence = "; ".join(filter(None, (fault.evidence, kept_in)))
    return UserError(fault.problem, evidence=evidence, fix=fault.fix, exit_code=fault.exit_code)


def write_through(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def load_sampler(cfg: SampleConfig) -> Sampler:
    own, device = cfg.sampler, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = find_model(own.model)
    tokenizer, _ = load_tokenizer(source, template=own.template)
    form = ChatFormat(tokenizer)
    model = load_language_model(source, tokenizer, LoadOptions(dtype=own.dtype)).freeze()
    judge = load_judge(
        cfg.scoring.reward,
        tokenizer=tokenizer,
        dtype=own.dtype,
        place=lambda model: model.to(device),
        tokens_per_microbatch=8192,
        ensemble_penalty=cfg.scoring.ensemble_penalty,
        timeout_s=cfg.scoring.reward_timeout_s,
        retries=cfg.scoring.reward_retries,
    )
    model.to(device)
    context = getattr(model.inner.config, "max_position_embeddings", None)
    if context is not None and own.max_len > context:
        raise UserError(
            "max_len is longer than the model's context",
            evidence=f"{own.max_len}, the model has positions for {context}",
            fix=f"--max_len {context}",
        )
    return Sampler(form, LocalEngine(model, end_ids=form.end_ids, pad_id=form.pad_id), judge)


def fitting(cfg: SampleConfig, prompts: Sequence[Prompt], form: ChatFormat) -> list[Prompt]:
    """Prompts that leave room for an answer; others are refused, or skipped and counted."""
    room = cfg.sampler.max_len - cfg.sampler.max_new_tokens
    lengths = [len(form.prompt(prompt.messages)) for prompt in prompts]
    long = [i for i, length in enumerate(lengths) if length > room]
    if long and (cfg.sampler.bad_rows == "error" or len(long) == len(prompts)):
        raise UserError(
            f"{prompts[long[0]].place}: the prompt is too long",
            evidence=f"{lengths[long[0]]} tokens, max_len less max_new_tokens leave {max(room, 0)}; {len(long)} such",
            fix="raise --max_len, lower --max_new_tokens, or pass --bad_rows skip",
        )
    if long:
        print(f"note: {len(long)} of {len(prompts)} prompts are longer than {room} tokens and were skipped")
    return [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= room]


def kept(cfg: SampleConfig, group: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """The rows that one prompt gives.  Empty answers teach nothing and are left out."""
    ranked = sorted((x for x in group if x.answer.text), key=lambda x: -x.score)
    if not ranked:
        return
    prompt = prompt_of(group[0].answer)
    least = -math.inf if cfg.threshold is None else cfg.threshold
    if cfg.write == "pairs":
        best, worst = ranked[0], ranked[-1]
        distance = best.score - worst.score
        if distance > 0 and distance >= least and best.answer.text != worst.answer.text:
            scores = {"score_chosen": best.score, "score_rejected": worst.score}
            yield {"prompt": prompt, "chosen": [message(best.answer)], "rejected": [message(worst.answer)], **scores}
        return
    wanted = 1 if cfg.write == "best" else cfg.max_per_prompt
    different: dict[str, Scored] = {}
    for x in ranked:
        different.setdefault(x.answer.text, x)
    for x in list(different.values())[:wanted]:
        if x.score >= least:
            yield {"messages": [*prompt, message(x.answer)], "score": x.score}


def prompt_of(answer: Answer) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in answer.prompt.messages]


def message(answer: Answer) -> dict[str, Any]:
    """What was said; an answer that was cut off must not teach an end."""
    said: dict[str, Any] = {"role": "assistant", "content": answer.text}
    return said if answer.ended else said | {"ended": False}


def summary(cfg: SampleConfig, groups: Sequence[Sequence[Scored]], num_written: int, target: Path) -> str:
    """Mean score before and after the choice, and how far best-of-N is from the model (Stiennon 2020, appendix G.3)."""
    n = cfg.group_size
    mean, best = fmean(x.score for group in groups for x in group), fmean(max(x.score for x in g) for g in groups)
    lines = [f"{len(groups)} prompts x {n} answers: mean score {mean:.4g}, best of {n} {best:.4g}"]
    if cfg.write == "best":
        lines.append(f"KL of best-of-{n} to the model: at most {math.log(n) - (n - 1) / n:.2f} nats an answer")
    what = "pairs" if cfg.write == "pairs" else "answers"
    lines.append(f"{num_written} {what} written: {target}")
    return "\n".join(lines)
