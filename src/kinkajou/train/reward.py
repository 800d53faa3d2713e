"""Reward model: a scalar at the end of each answer, trained on pairs (Ouyang 2022, section 3.1 and eq. 1)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from kinkajou.algos.losses import Loss
from kinkajou.algos.preferences import RANKING
from kinkajou.batch import PairBatch, pad_pairs
from kinkajou.config import RewardConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.loader import Shuffle, check_shares
from kinkajou.data.sources import Pair
from kinkajou.evals.preference import preference_accuracy
from kinkajou.memory import afford
from kinkajou.models.load import find_model, load_scalar_model
from kinkajou.train import planned, preflight, setup
from kinkajou.train.fit import fit, kept_of_fit
from kinkajou.train.identity import digest_of
from kinkajou.train.inputs import Inputs
from kinkajou.train.optim import adamw
from kinkajou.train.run import Run

Tokens = tuple[list[int], list[int]]


def collate(rows: Sequence[Tokens], form: ChatFormat) -> PairBatch:
    return pad_pairs([row[0] for row in rows], [row[1] for row in rows], pad_id=form.pad_id)


def loss_of(cfg: RewardConfig) -> Callable[[nn.Module, PairBatch, Tensor], Loss]:
    ranking = RANKING[cfg.loss]

    def pair_loss(model: nn.Module, batch: PairBatch, count: Tensor) -> Loss:
        both = batch.stacked()
        chosen, rejected = model(both.tokens, both.mask, at="end").view(-1, 2).unbind(1)
        return ranking(chosen, rejected, count)

    return pair_loss


def train_reward(cfg: RewardConfig, inputs: Inputs[Pair]) -> Path:
    """Trains on pairs; returns the final checkpoint's folder."""
    s = setup.strategy_of(cfg.parallel)
    check_shares(cfg.batch_size, s.world)
    say = setup.voice(s)
    texts = setup.texts_of((*pair.prompt, *pair.chosen, *pair.rejected) for pair in inputs.train)
    form = setup.load_format(cfg.base, texts, say)
    rows = setup.encode_pairs(inputs.train, form, cfg.base.max_len, say)
    held_out = setup.encode_pairs(inputs.held_out, form, cfg.base.max_len, say)
    sides = preflight.counted(side for row in rows for side in row)
    planned.plan_run(cfg, form, sides)
    preflight.before_run(cfg, form, inputs, sides, say=say)
    order = Shuffle(len(rows), cfg.batch_size, cfg.run.seed)

    options = setup.load_options(cfg.base, cfg.run.seed)
    scorer = load_scalar_model(find_model(cfg.base.model), form.tokenizer, options)
    setup.check_context(scorer, max(len(side) for row in rows for side in row))
    model = s.wrap(scorer)
    optimizer = adamw(model, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)

    total = max(1, round(cfg.epochs * order.batches_per_epoch))
    shown = ("loss", "accuracy", "margin", "eval_accuracy", "train_tokens_per_s")
    kept = kept_of_fit(cfg, scorer, optimizer, form, records=digest_of(rows), held_out=digest_of(held_out))
    run = Run("reward", cfg, s, total=total, shown=shown, kept=kept)

    def evaluate() -> dict[str, float]:
        pairs = collate(held_out[s.rank :: s.world], form)
        ask = partial(preference_accuracy, scorer, pairs, all_sum=s.all_sum, passes=s.passes)
        return afford(run.budget, pairs.costs, "evaluation", ask)

    return fit(
        run,
        model,
        optimizer,
        cfg.optim,
        order=order,
        collate=lambda chosen: collate(setup.pick(rows, chosen), form).to(s.device),
        loss_fn=loss_of(cfg),
        evaluate=evaluate if held_out else None,
    )
