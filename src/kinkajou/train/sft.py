"""Supervised fine-tuning: maximise the likelihood of what the assistant says (Ouyang 2022, section 3.1)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from kinkajou.algos.losses import Loss, cross_entropy
from kinkajou.batch import TokenBatch, pad_rows
from kinkajou.config import SFTConfig
from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.loader import Shuffle, check_shares
from kinkajou.data.sources import Chat
from kinkajou.evals.loss import mean_loss
from kinkajou.memory import afford
from kinkajou.models.load import find_model, load_language_model
from kinkajou.train import planned, preflight, setup
from kinkajou.train.fit import fit, kept_of_fit
from kinkajou.train.identity import digest_of
from kinkajou.train.inputs import Inputs
from kinkajou.train.optim import adamw
from kinkajou.train.run import Run


def token_loss(model: nn.Module, batch: TokenBatch, count: Tensor) -> Loss:
    return cross_entropy(model(batch.tokens, batch.mask, slope=-1 / count).logp, batch.mask, count)


def collate(rows: Sequence[Encoded], form: ChatFormat) -> TokenBatch:
    return pad_rows([row.tokens for row in rows], [row.counts for row in rows], pad_id=form.pad_id)


def train_sft(cfg: SFTConfig, inputs: Inputs[Chat]) -> Path:
    """Trains on the assistant's tokens; returns the final checkpoint's folder."""
    s = setup.strategy_of(cfg.parallel)
    check_shares(cfg.batch_size, s.world)
    say = setup.voice(s)
    form = setup.load_format(cfg.base, setup.texts_of(chat.messages for chat in inputs.train), say)
    rows = setup.encode_chats(inputs.train, form, cfg.base.max_len, say)
    held_out = setup.encode_chats(inputs.held_out, form, cfg.base.max_len, say)
    planned.plan_run(cfg, form, rows)
    preflight.before_run(cfg, form, inputs, rows, say=say)
    order = Shuffle(len(rows), cfg.batch_size, cfg.run.seed)

    options = setup.load_options(cfg.base, cfg.run.seed)
    policy = load_language_model(find_model(cfg.base.model), form.tokenizer, options)
    setup.check_context(policy, max(len(row.tokens) for row in rows))
    model = s.wrap(policy)
    optimizer = adamw(model, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)

    total = max(1, round(cfg.epochs * order.batches_per_epoch))
    kept = kept_of_fit(cfg, policy, optimizer, form, records=digest_of(rows), held_out=digest_of(held_out))
    shown = ("loss", "eval_loss", "lr", "train_tokens_per_s")
    run = Run("sft", cfg, s, total=total, shown=shown, kept=kept)

    def evaluate() -> dict[str, float]:
        batch = collate(held_out[s.rank :: s.world], form)
        ask = partial(mean_loss, policy, batch, all_sum=s.all_sum, passes=s.passes)
        return {"eval_loss": afford(run.budget, batch.costs, "evaluation", ask)}

    return fit(
        run,
        model,
        optimizer,
        cfg.optim,
        order=order,
        collate=lambda chosen: collate(setup.pick(rows, chosen), form).to(s.device),
        loss_fn=token_loss,
        evaluate=evaluate if held_out else None,
    )
