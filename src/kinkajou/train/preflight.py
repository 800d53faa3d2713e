"""Preflight: the checks of data/preflight.py over what a stage has in hand, before its first step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from kinkajou import config
from kinkajou.batch import TokenBatch
from kinkajou.data import preflight as checks
from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.preflight import Record, share
from kinkajou.errors import UserError
from kinkajou.evals.reward_scores import spread_rows, stability
from kinkajou.findings import Finding, Level, passed
from kinkajou.models.forward import ScalarModel
from kinkajou.rewards.judges import Ensemble, Judge, ModelJudge, WeightedSum
from kinkajou.train.inputs import Inputs, RLInputs

CHATS_LOOKED_AT = 64
"""Chats whose template is tried before a run; `kinkajou check` looks at more."""
ANSWERS_SCORED = 4
UNSTABLE = 1e-3


def before_run(
    cfg: config.StageConfig,
    form: ChatFormat,
    inputs: Inputs[Any] | RLInputs,
    rows: Sequence[Encoded],
    *,
    say: Callable[[str], None],
    judge: Judge | None = None,
) -> None:
    """Says what is wrong with the tokens a trainer is about to train on; an error stops it, as does any warning
    with `--preflight strict`.  What the trainers refuse by themselves (context, vocabulary) is left to them."""
    if cfg.run.preflight == "off":
        return
    found = [
        *of_records(inputs, form),
        *of_rows(cfg, form, rows, lost=expected(inputs) - len(rows)),
        checks.cut([len(row.tokens) for row in rows], cfg.base.max_len, side=cut_side(cfg), whole=False),
        *checks.template(train_records(inputs), form, most=CHATS_LOOKED_AT),
        *([scores_told(reward_models(judge), rows, form)] if judge and reward_models(judge) else []),
    ]
    stops = [item for item in found if item.level == "error"]
    warned = [item for item in found if item.level == "warning"]
    for item in warned:
        say(str(item))
    if cfg.run.preflight == "strict":
        stops += warned
    if stops:
        refuse(stops, hint="--preflight off starts all the same")


def refuse(found: Sequence[Finding], *, hint: str) -> None:
    """All findings in one sentence of what, seen and fix."""
    count = "1 check" if len(found) == 1 else f"{len(found)} checks"
    raise UserError(
        f"preflight: {count} failed: {', '.join(item.name for item in found)}",
        evidence="; ".join(": ".join(filter(None, (item.cause, item.evidence))) for item in found),
        fix="; ".join([*(item.action for item in found if item.action), hint]),
    )


def uncounted(rows: Iterable[Sequence[int]]) -> list[Encoded]:
    """Prompts: nothing in them is trained."""
    return [Encoded(list(row), [False] * len(row)) for row in rows]


def counted(rows: Iterable[Sequence[int]]) -> list[Encoded]:
    """Sequences that are read as a whole, such as the sides of a reward model's pairs."""
    return [Encoded(list(row), [True] * len(row)) for row in rows]


# --- the checks of a stage --------------------------------------------------------------------------------


def train_records(inputs: Inputs[Any] | RLInputs) -> Sequence[Record]:
    return inputs.prompts if isinstance(inputs, RLInputs) else inputs.train


def expected(inputs: Inputs[Any] | RLInputs) -> int:
    """Sequences that the training records make."""
    return sum(max(1, len(checks.answers_of(record))) for record in train_records(inputs))


def cut_side(cfg: config.StageConfig) -> Any:
    return "end" if isinstance(cfg, config.SFTConfig) else "beginning"


def is_rl(cfg: config.StageConfig) -> bool:
    return isinstance(cfg, config.PPOConfig | config.GRPOConfig)


def of_records(inputs: Inputs[Any] | RLInputs, form: ChatFormat) -> Iterator[Finding]:
    records = train_records(inputs)
    yield checks.duplicates(records)
    yield checks.overlap(records, inputs.held_out)
    yield checks.controls(records, form.control_pattern)


def of_rows(cfg: config.StageConfig, form: ChatFormat, rows: Sequence[Encoded], *, lost: int) -> Iterator[Finding]:
    begin, unknown = form.tokenizer.bos_token_id, form.tokenizer.unk_token_id
    if not is_rl(cfg):
        yield checks.end_token(rows, form.end_ids)
        yield of_lost(cfg, lost, len(rows) + lost)
    yield checks.pad(rows, pad_id=form.pad_id, end_ids=form.end_ids, begin_id=begin)
    # GPT-2's end token doubles as its unknown one, which byte-level tokenizers never need.
    yield checks.unknown(rows, None if unknown in form.end_ids else unknown)


def of_lost(cfg: config.StageConfig, lost: int, total: int) -> Finding:
    if isinstance(cfg, config.SFTConfig):
        why = f"have no answer within --max_len {cfg.base.max_len}"
        return checks.dropped(lost, total, name="empty_mask", why=why, action="raise --max_len")
    why = f"belong to pairs that are equal within --max_len {cfg.base.max_len} tokens"
    action = "raise --max_len, or give pairs whose answers differ"
    return checks.dropped(lost, total, name="same_sides", why=why, action=action)


# --- the reward model -------------------------------------------------------------------------------------


def reward_models(judge: Judge) -> list[ScalarModel]:
    match judge:
        case ModelJudge():
            return [judge.model]
        case Ensemble():
            return [model for member in judge.members for model in reward_models(member)]
        case WeightedSum():
            return [model for term in judge.terms for model in reward_models(term.judge)]
    return []


def scores_told(models: Sequence[ScalarModel], rows: Sequence[Encoded], form: ChatFormat) -> Finding:
    """Scores alone, beside others, in another order and with more padding.  The prompts themselves are scored."""
    tokens = [[*row.tokens, form.end_id] for row in rows]
    tried = spread_rows(tokens, ANSWERS_SCORED)
    found = [stability(scorer(model), tried, pad_id=form.pad_id) for model in models]
    padded = max(one.padded for one in found)
    beside = max(max(one.together, one.reversed) for one in found)
    evidence = (
        f"over {len(tried)} texts extra padding changes a score by {padded:.1e} at most, the batch by {beside:.1e}"
    )
    if max(padded, beside) <= UNSTABLE:
        return passed("reward_scores", evidence)
    cause = "a text's score depends on the padding or the texts beside it"
    return Finding("reward_scores", cause, evidence, "with --dtype bf16 try fp32; else use another reward model")


def scorer(model: ScalarModel) -> Callable[[TokenBatch], Any]:
    def score(batch: TokenBatch) -> Any:
        batch = batch.to(model.device)
        return model(batch.tokens, batch.mask, at="end").cpu()

    return score


# --- the course of the run --------------------------------------------------------------------------------


def offline_steps(cfg: Any, records: int, rows: Sequence[Encoded], *, scale: float = 1.0) -> Finding:
    """Steps and tokens of SFT, reward model and preference learning, of `scale` times what is given."""
    epoch = round(records * scale) // cfg.batch_size
    if not epoch:
        evidence = f"{records:,} usable records, batches of {cfg.batch_size}"
        action = "give more data or a smaller --batch_size"
        return Finding("steps", "the records do not fill a batch", evidence, action, "error")
    total = max(1, round(cfg.epochs * epoch))
    tokens, trained = sum(len(row.tokens) for row in rows), sum(sum(row.counts) for row in rows)
    used = epoch * cfg.batch_size / records  # a remainder shorter than a batch waits for the next epoch
    evidence = (
        f"{'about ' * (scale != 1)}{epoch:,} steps an epoch, {total:,} in all; {short(tokens * used)} tokens an epoch "
        f"({short(trained * used)} of them in answers), {short(tokens * used * total / epoch)} in all"
    )
    return passed("steps", evidence)


def rl_steps(cfg: config.RLConfig, prompts: int, mean_prompt: float) -> Finding:
    group = cfg.algo.group_size if isinstance(cfg, config.GRPOConfig) else 1
    samples = cfg.rollout.prompts_per_step * group
    if prompts < cfg.rollout.prompts_per_step:
        evidence = f"{prompts:,} usable prompts, a step takes {cfg.rollout.prompts_per_step}"
        action = "give more prompts or a smaller --prompts_per_step"
        return Finding("steps", "the prompts do not fill a step", evidence, action, "error")
    if samples % cfg.algo.minibatch_size:
        evidence = f"{samples} answers a step, minibatches of {cfg.algo.minibatch_size}"
        action = "make minibatch_size a divisor of the answers of a step"
        return Finding("steps", "the answers of a step do not fill its minibatches", evidence, action, "error")
    answers, longest = cfg.algo.steps * samples, cfg.rollout.max_new_tokens
    seen = cfg.algo.steps * cfg.rollout.prompts_per_step / prompts
    evidence = (
        f"{cfg.algo.steps:,} steps of {samples:,} answers; up to {short(answers * longest)} sampled tokens after "
        f"{short(answers * mean_prompt)} of prompts; each prompt comes up {seen:.2g} times"
    )
    return passed("steps", evidence)


def room(cfg: config.RLConfig, lengths: Sequence[int]) -> Finding:
    """Prompts that leave room for the longest answer."""
    left = cfg.base.max_len - cfg.rollout.max_new_tokens
    long = sum(length > left for length in lengths)
    evidence = f"{share(len(lengths) - long, len(lengths))} prompts leave room for {cfg.rollout.max_new_tokens} tokens"
    if not long:
        return passed("room", f"{evidence} within --max_len {cfg.base.max_len}")
    action = f"--max_len {max(lengths) + cfg.rollout.max_new_tokens}, or --bad_rows skip to leave long ones out"
    stops = cfg.rollout.bad_rows == "error" or long == len(lengths)
    level: Level = "error" if stops else "warning" if long > checks.FEW * len(lengths) else "note"
    return Finding("room", "prompts leave no room for the longest answer", evidence, action, level)


def short(count: float) -> str:
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
