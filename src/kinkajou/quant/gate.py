"""How far a quantised model is from the original: KL, agreement, perplexity, speed, and what a reward model says."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

from kinkajou.batch import Sampling
from kinkajou.data.chat import ChatFormat
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.sampling import derive_seed
from kinkajou.evals.reward_scores import padded, values
from kinkajou.models.forward import LanguageModel, ScalarModel, pack

GREEDY = Sampling(temperature=0.0)
Rows = Sequence[Sequence[int]]
Logits = Callable[[Sequence[int]], Tensor]
"""A row of n tokens -> (n, v)."""


@dataclass(frozen=True)
class Distance:
    """Over the tokens of a text; `kl` is KL(original || other), nats a token."""

    tokens: int
    kl: float
    worst_kl: float  # of one token
    agreement: float  # share of tokens whose likeliest successor is the same
    perplexity: float  # of the original
    perplexity_after: float


@torch.no_grad()
def our_logits(model: LanguageModel) -> Logits:
    def ask(row: Sequence[int]) -> Tensor:
        tokens = torch.tensor([list(row)], device=model.device)
        rows = pack(tokens, torch.tensor([len(row)], device=model.device))
        with torch.no_grad(), model.computing():
            return model.logits(model.hidden(rows.ids, rows.positions, rows.layout))

    return ask


def distance(original: Logits, other: Logits, rows: Rows) -> Distance:
    """Rows of at least two tokens each."""
    kls: list[Tensor] = []
    same: list[Tensor] = []
    losses: list[tuple[Tensor, Tensor]] = []
    for row in rows:
        p, q = (ask(row).float().cpu().double().log_softmax(-1) for ask in (original, other))
        q = q[:, : p.shape[1]]
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        targets = torch.tensor(list(row[1:]))[:, None]
        losses.append((-p[:-1].gather(1, targets), -q[:-1].gather(1, targets)))
    kl, before, after = torch.cat(kls), *(torch.cat(x) for x in zip(*losses, strict=True))
    return Distance(
        tokens=len(kl),
        kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        agreement=float(torch.cat(same).double().mean()),
        perplexity=float(before.mean().exp()),
        perplexity_after=float(after.mean().exp()),
    )


def engine_of(model: LanguageModel, form: ChatFormat, *, ends: bool = True) -> LocalEngine:
    return LocalEngine(model, end_ids=form.end_ids if ends else (), pad_id=form.pad_id, max_rows=16)


def own_text(model: LanguageModel, form: ChatFormat, *, tokens: int, length: int, seed: int) -> list[list[int]]:
    """Texts that the model says itself from its first token on: what it is asked where no text is given."""
    begin = form.tokenizer.bos_token_id
    first = form.end_id if begin is None else int(begin)
    count = -(-tokens // length)
    seeds = [derive_seed(seed, "gate", i) for i in range(count)]
    found = engine_of(model, form, ends=False).generate(
        [[first]] * count, Sampling(), max_new_tokens=length - 1, seeds=seeds
    )
    return [row.tolist() for row in found.tokens]


def speeds(models: Sequence[LanguageModel], form: ChatFormat, prompts: Rows, *, new: int) -> list[float]:
    """Tokens a second of each model in decoding the same prompts together, in turn: the median of three rounds."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(3):
        for model, rates in zip(models, found, strict=True):
            engine = engine_of(model, form, ends=False)
            engine.generate(prompts, GREEDY, max_new_tokens=2, seeds=[0] * len(prompts))
            start = time.perf_counter()
            engine.generate(prompts, GREEDY, max_new_tokens=new, seeds=[0] * len(prompts))
            rates.append(len(prompts) * new / (time.perf_counter() - start))
    return [median(rates) for rates in found]


def reward_of(
    model: LanguageModel, judge: ScalarModel, form: ChatFormat, prompts: Rows, *, new: int
) -> tuple[float, list[list[int]]]:
    """Mean score of the model's greedy answers, and the answers with their prompts."""
    found = engine_of(model, form).generate(prompts, GREEDY, max_new_tokens=new, seeds=[0] * len(prompts))
    rows = [row[: int(mask.nonzero().max()) + 2].tolist() for row, mask in zip(found.tokens, found.mask, strict=True)]
    scores: list[float] = []
    for row in rows:
        scores += values(
            lambda batch: judge(batch.tokens, batch.mask, at="end"), padded([row], form.pad_id).to(judge.device)
        )
    return fmean(scores), rows


def preferences(scores: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Pairs of neighbours, each text once the first."""
    return ((i, (i + 1) % len(scores)) for i in range(len(scores)))


def score_distance(before: Sequence[float], after: Sequence[float], tokens: int) -> Distance:
    """Of reward models: KL between what they prefer of two texts, by Bradley and Terry; agreement is the same order."""
    kls, same = [], []
    for i, j in preferences(before):
        p, q = (torch.tensor(s[i] - s[j], dtype=torch.float64) for s in (before, after))
        log = torch.nn.functional.logsigmoid
        kls.append(float(p.sigmoid() * (log(p) - log(q)) + (-p).sigmoid() * (log(-p) - log(-q))))
        same.append(float((p > 0) == (q > 0)))
    return Distance(tokens, fmean(kls), max(kls), fmean(same), math.nan, math.nan)
