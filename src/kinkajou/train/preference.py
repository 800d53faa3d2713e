"""Learning from preferences without rollouts, the loss by name: DPO's family (Rafailov 2023), KTO, ORPO, CPO, SimPO."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kinkajou.algos.preferences import wilson_interval
from kinkajou.batch import passed
from kinkajou.config import PreferConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.loader import Shuffle, check_shares
from kinkajou.data.sources import Judged, Message, Pair
from kinkajou.memory import Budget, afford
from kinkajou.models.forward import LanguageModel
from kinkajou.models.load import find_model, load_language_model
from kinkajou.parallel.strategy import Strategy
from kinkajou.train import planned, preflight, setup
from kinkajou.train.fit import fit, kept_of_fit
from kinkajou.train.identity import digest_of, digest_of_model
from kinkajou.train.inputs import Inputs
from kinkajou.train.optim import adamw
from kinkajou.train.preference_rows import encode_compared, encode_judged
from kinkajou.train.preference_tasks import JudgedTask, PairTask, PreferenceTask
from kinkajou.train.reference import reference_logps
from kinkajou.train.run import Run, budget_of


def train_preference(cfg: PreferConfig, inputs: Inputs[Pair | Judged]) -> Path:
    """Trains on pairs or judged answers; returns the final checkpoint's folder."""
    s = setup.strategy_of(cfg.parallel)
    check_shares(cfg.batch_size, s.world)
    say = setup.voice(s)
    form = setup.load_format(cfg.base, setup.texts_of(map(messages_of, inputs.train)), say)
    task, rows, held_out = encode(cfg, inputs, form, say)
    sides = task.questions(()).rows
    planned.plan_run(cfg, form, sides)
    preflight.before_run(cfg, form, inputs, sides[: len(sides) * rows // (rows + held_out)], say=say)
    order = Shuffle(rows, cfg.batch_size, cfg.run.seed)
    total = max(1, round(cfg.epochs * order.batches_per_epoch))
    later = range(rows, rows + held_out)

    options = setup.load_options(cfg.base, cfg.run.seed)
    policy = load_language_model(find_model(cfg.base.model), form.tokenizer, options)
    setup.check_context(policy, task.longest)
    model, budget = s.wrap(policy), budget_of(cfg, s, say)
    if cfg.method.needs_reference:
        asked = task.questions([*(order.batch(step) for step in range(total)), later])
        task = task.with_reference(reference_logps(cfg, policy, form, asked, s, say, budget))
    optimizer = adamw(model, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)

    shown = ("loss", "accuracy", "margin", "eval_accuracy", "train_tokens_per_s")
    kept = kept_of_fit(cfg, policy, optimizer, form, records=digest_of(sides))
    if cfg.method.reference:
        kept.made_from["reference"] = digest_of_model(find_model(cfg.method.reference))
    run = Run("prefer", cfg, s, total=total, shown=shown, kept=kept, budget=budget)

    return fit(
        run,
        model,
        optimizer,
        cfg.optim,
        order=order,
        collate=lambda chosen: task.batch(chosen).to(s.device),
        prepare=lambda step, batch: task.prepare(policy, batch, order.batch(step), s, budget),
        loss_fn=task.loss,
        evaluate=(lambda: evaluate(task, policy, later, s, budget)) if held_out else None,
    )


def encode(
    cfg: PreferConfig, inputs: Inputs[Pair | Judged], form: ChatFormat, say: setup.Say
) -> tuple[PreferenceTask, int, int]:
    """The rows as a task, those held out last; how many there are of each."""
    max_len = cfg.base.max_len
    if cfg.method.reads == "judged":
        answers = [encode_judged(records, form, max_len, say) for records in (inputs.train, inputs.held_out)]
        tell_balance(cfg, sum(row.good for row in answers[0]), len(answers[0]), say)
        return (
            JudgedTask(cfg.method, [*answers[0], *answers[1]], form.pad_id, max_len),
            len(answers[0]),
            len(answers[1]),
        )
    pairs = [
        encode_compared([record for record in records if isinstance(record, Pair)], form, max_len, say)
        for records in (inputs.train, inputs.held_out)
    ]
    return PairTask(cfg.method, [*pairs[0], *pairs[1]], form.pad_id), len(pairs[0]), len(pairs[1])


def messages_of(record: Pair | Judged) -> Sequence[Message]:
    if isinstance(record, Pair):
        return (*record.prompt, *record.chosen, *record.rejected)
    return (*record.prompt, *record.answer)


def tell_balance(cfg: PreferConfig, good: int, total: int, say: setup.Say) -> None:
    """Good records should weigh 1 to 4/3 times what the bad ones do (Ethayarajh 2024, eq. 8)."""
    bad = total - good
    weights = cfg.method.desirable_weight * good, cfg.method.undesirable_weight * bad
    if min(weights) > 0 and 0.99 <= weights[0] / weights[1] <= 1.34:
        return
    advice = f"try --desirable_weight {bad / good:.2g}" if good and bad else "there is one kind only"
    say(f"note: {good} good and {bad} bad records do not weigh about the same: {advice}")


@torch.no_grad()
def evaluate(task: PreferenceTask, policy: LanguageModel, rows: range, s: Strategy, budget: Budget) -> dict[str, float]:
    """Loss, accuracy and its 95 % interval on held-out rows, as one batch."""
    batch = task.batch(rows[s.rank :: s.world]).to(s.device)
    batch = task.prepare(policy, batch, rows, s, budget)
    count: Tensor = s.all_sum(batch.count)

    def attempt(tokens: int) -> dict[str, float]:
        totals: dict[str, float] = {}
        for part, counts in passed(batch, tokens, s.passes):
            loss = task.loss(policy, part, count)
            for name, x in {"loss": loss.value, **loss.metrics}.items() if counts else ():
                totals[name] = totals.get(name, 0.0) + x.item()
        return totals

    totals = afford(budget, batch.costs, "evaluation", attempt)
    found: dict[str, float] = {}
    for ranks in s.gather([totals]):  # a rank without rows has no names
        assert isinstance(ranks, dict)
        for name, value in ranks.items():
            found[name] = found.get(name, 0.0) + value
    low, high = wilson_interval(found["accuracy"] * len(rows), len(rows))
    kept = {f"eval_{name}": found[name] for name in ("loss", "accuracy", "margin") if name in found}
    return kept | {"eval_accuracy_low": low, "eval_accuracy_high": high}
