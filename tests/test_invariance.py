"""The invariance matrix: what changes memory, speed or order changes no number.

Every loss on a fixed batch (fixed.py), through one optimiser step: equal losses and metrics, gradient by parameter and
weights after the step.  Then whole runs, sampling and scoring included.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fixed import CASES, Case, Outcome, make_case, model_of, take_step, widened
from kinkajou.models.forward import ActorCritic, LanguageModel, ScalarModel
from kinkajou.models.load import load_language_model
from merged import merged
from small import Small, metrics, steps_kept, weights
from tiny import tiny_tokenizer
from train.test_ddp import torchrun

CLOSE = 1e-5
ORDER = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
Form = Callable[[Case, Small], Outcome]


def plain(case: Case, small: Small) -> Outcome:
    return take_step(case, model_of(small, case.kind))


def passes(budget: int) -> Form:
    return lambda case, small: take_step(case, model_of(small, case.kind), budget=budget)


def cut(pieces: int) -> Form:
    return lambda case, small: take_step(case, model_of(small, case.kind), cuts=pieces)


def reordered(case: Case, small: Small) -> Outcome:
    moved = dataclasses.replace(case, batch=case.batch.select(ORDER))
    return take_step(moved, model_of(small, case.kind), budget=30)


def padded(case: Case, small: Small) -> Outcome:
    wide = dataclasses.replace(case, batch=widened(case.batch, 6, token=8))
    return take_step(wide, model_of(small, case.kind))


def checkpointed(case: Case, small: Small) -> Outcome:
    return take_step(case, model_of(small, case.kind, checkpointing=True))


FORMS: dict[str, Form] = {
    "one row a pass": passes(1),
    "passes of 25 tokens": passes(25),
    "two halves": cut(2),
    "eight pieces": cut(8),
    "another order": reordered,
    "more padding": padded,
    "checkpointing": checkpointed,
}
RANKS = "two ranks"


@pytest.fixture(scope="module")
def case_of(small: Small) -> Callable[[str], tuple[Case, Outcome]]:
    """A case and its plain outcome, made once."""
    known: dict[str, tuple[Case, Outcome]] = {}

    def find(name: str) -> tuple[Case, Outcome]:
        if name not in known:
            case = make_case(name, small)
            known[name] = case, plain(case, small)
        return known[name]

    return find


@pytest.fixture(scope="module")
def on_two(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every case's step and every whole run on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {name: (stage, {**COMMON, **changes}) for name, (stage, changes) in RUNS.items()}
    plan = {"small": {k: str(v) for k, v in dataclasses.asdict(small).items()}, "jobs": jobs}
    (folder / "plan.json").write_text(json.dumps(plan))
    done = torchrun([str(Path(__file__).with_name("fixed_on_ranks.py")), str(folder / "plan.json")], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def told(folder: Path, name: str) -> Outcome:
    """What two ranks wrote."""
    numbers = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"gradient": {}, "weight": {}}
    for key, tensor in tensors.items():
        part, _, param = key.partition("/")
        parts[part][param] = tensor
    return Outcome(numbers, parts["gradient"], parts["weight"])


def assert_same(got: Outcome, want: Outcome) -> None:
    assert got.numbers == pytest.approx(want.numbers, abs=CLOSE, rel=CLOSE)
    assert_near(got.gradients, want.gradients, CLOSE * max(1.0, want.numbers["grad_norm"]))
    assert_near(got.weights, want.weights, CLOSE)


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], atol: float) -> None:
    assert got.keys() == want.keys()
    worst = {name: float((got[name] - want[name]).abs().max()) for name in want}
    assert max(worst.values()) <= atol, max(worst, key=worst.__getitem__)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", [*FORMS, RANKS])
def test_the_step_is_the_same(form: str, name: str, small: Small, case_of: Any, request: Any) -> None:
    case, want = case_of(name)
    got = told(request.getfixturevalue("on_two"), name) if form == RANKS else FORMS[form](case, small)
    assert_same(got, want)


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_a_step(name: str, small: Small, case_of: Any) -> None:
    """Or equality would say nothing: gradients and moves far above the tolerance, and some tokens are clipped."""
    case, outcome = case_of(name)
    start = dict(model_of(small, case.kind).named_parameters())
    moved = max(float((outcome.weights[key] - start[key].detach()).abs().max()) for key in start)
    assert outcome.numbers["grad_norm"] > 100 * CLOSE
    assert moved > 100 * CLOSE
    assert 0 < outcome.numbers.get("clip_frac", 0.5) < 1 or name in NEVER_CLIPPED


NEVER_CLIPPED = ("cispo", "sapo", "reinforce_baseline")


def unwrapped(name: str) -> str:
    """A parameter's name once its adapters are folded in."""
    for wrapper in ("base_model.model.", ".base_layer", ".modules_to_save.default"):
        name = name.replace(wrapper, "")
    return name


def folded(model: Any) -> Any:
    """The same model with its adapters in its weights, all of them trainable."""
    if isinstance(model, ActorCritic):
        return ActorCritic(folded(model.language), copy.deepcopy(model.head))
    kind = ScalarModel if isinstance(model, ScalarModel) else LanguageModel
    return kind(merged(model.module).requires_grad_(True))


@pytest.mark.parametrize("name", CASES)
def test_adapters_apart_are_adapters_merged(name: str, small: Small, case_of: Any) -> None:
    """Loss and metrics are equal; the gradients of W + 2 B A give those of A and B; and so after the step."""
    case, _ = case_of(name)
    apart = model_of(small, case.kind, rank=3)
    whole = folded(apart)
    matrices = {key: param.detach().clone() for key, param in apart.named_parameters()}
    got, want = take_step(case, apart), take_step(case, whole)
    skip = ("grad_norm",)
    for key, value in want.numbers.items():
        assert key in skip or got.numbers[key] == pytest.approx(value, abs=CLOSE, rel=CLOSE), key
    scale = CLOSE * max(1.0, want.numbers["grad_norm"])
    compared = 0
    for key, gradient in got.gradients.items():
        if "lora_" not in key:  # a head, trained as it is
            torch.testing.assert_close(gradient, want.gradients[unwrapped(key)], atol=scale, rtol=0)
            continue
        full = want.gradients[unwrapped(key.replace(".lora_A.default", "").replace(".lora_B.default", ""))]
        other = matrices[key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")]
        hand = 2 * (other.T @ full if "lora_A" in key else full @ other.T)
        torch.testing.assert_close(gradient, hand, atol=scale, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        compared += 1
    assert compared == 28  # two matrices on each of seven layers of two blocks
    for key, weight in folded(apart).named_parameters():
        down = got.weights.get(renamed(got.weights, key, "lora_A"))
        if down is not None:
            hand = got.weights[renamed(got.weights, key, "base_layer")].double()
            hand = hand + 2 * got.weights[renamed(got.weights, key, "lora_B")].double() @ down.double()
            torch.testing.assert_close(weight.detach().double(), hand, atol=1e-6, rtol=0)
    after = [case.loss_fn(model, case.batch, case.batch.count).value.item() for model in (apart, folded(apart))]
    assert after[0] == pytest.approx(after[1], abs=CLOSE, rel=CLOSE)
    assert after[0] != pytest.approx(want.numbers["loss"], abs=CLOSE)


def renamed(names: Mapping[str, Tensor], plain: str, part: str) -> str:
    """The adapted model's parameter that belongs to a merged one; "" where there is none."""
    return next(
        (name for name in names if part in name and unwrapped(name).replace(f".{part}.default", "") == plain), ""
    )


# --- whole runs -------------------------------------------------------------------------------------------

# Weights move from the first step on; 1e-4 and not more, because AdamW turns the rounding of a gradient near 0 into a
# whole step.
COMMON: dict[str, Any] = {"lr": 1e-4, "warmup": 0.0, "max_norm": 1.0, "gradient_checkpointing": False}
ANSWERS = {"steps": 2, "reward": "rule:length:3", "max_new_tokens": 6}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"batch_size": 8, "epochs": 0.4, "eval_share": 0.1}),
    "reward": ("reward", {"batch_size": 8, "epochs": 0.4, "eval_share": 0.1}),
    "prefer-sigmoid": ("prefer", {"batch_size": 6, "epochs": 0.4, "eval_share": 0.1}),
    "prefer-aot": ("prefer", {"loss": ("aot",), "batch_size": 6, "epochs": 0.4}),
    "prefer-kto": ("prefer", {"loss": ("kto",), "batch_size": 6, "epochs": 0.2}),
    "prefer-orpo": ("prefer", {"loss": ("orpo",), "batch_size": 6, "epochs": 0.4}),
    "ppo-run": ("ppo", {**ANSWERS, "top_k": 20, "kl_coef": 0.3}),
    "ppo-run-shared": ("ppo", {**ANSWERS, "backbone": "shared", "kl_in": "loss"}),
    "grpo-run": ("grpo", {**ANSWERS, "kl_coef": 0.1}),
    "dapo-run": ("grpo", {**ANSWERS, "algorithm": "dapo", "mask_truncated": True}),
    "gspo-run": ("grpo", {**ANSWERS, "algorithm": "gspo"}),
    "rloo-run": ("grpo", {**ANSWERS, "algorithm": "rloo", "top_p": 0.9}),
    "reinforce++-run": ("grpo", {**ANSWERS, "algorithm": "reinforce++"}),
    "reinforce_baseline-run": ("grpo", {**ANSWERS, "algorithm": "reinforce_baseline", "scale": "batch"}),
}
RUN_FORMS: dict[str, dict[str, Any]] = {
    "passes of 40 tokens": {"tokens_per_microbatch": 40},
    "checkpointing": {"gradient_checkpointing": True},
    RANKS: {},
}


@pytest.fixture(scope="module")
def plain_runs(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("plain")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            stage, changes = RUNS[name]
            small.run(stage, folder / name, **{**COMMON, **changes})
        return folder / name

    return run


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("form", RUN_FORMS)
def test_the_run_is_the_same(
    form: str, name: str, small: Small, plain_runs: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    want = plain_runs(name)
    if form == RANKS:
        got = request.getfixturevalue("on_two") / name
    else:
        stage, changes = RUNS[name]
        got = tmp_path / "run"
        small.run(stage, got, **{**COMMON, **changes, **RUN_FORMS[form]})
    rows = metrics(got), metrics(want)
    assert len(rows[0]) == len(rows[1]) >= 2
    for one, other in zip(*rows, strict=True):
        # A ratio of variances, of which the lower may be near 0.
        assert one.pop("explained_variance", 0) == pytest.approx(other.pop("explained_variance", 0), rel=1e-3)
        assert one == pytest.approx(other, abs=CLOSE, rel=CLOSE)
    last = steps_kept(want)[-1]
    ends = weights(got, last), weights(want, last)
    assert_near(*ends, CLOSE)
    start = load_file(Path(small.policy) / "model.safetensors")
    assert max(float((ends[1][key] - x).abs().max()) for key, x in start.items() if key in ends[1]) > 10 * CLOSE


@pytest.mark.parametrize("stage", ["sft", "prefer", "grpo"])
def test_a_run_is_the_same_whether_its_adapters_are_saved_merged_or_apart(
    stage: str, small: Small, tmp_path: Path
) -> None:
    own = {**ANSWERS, "kl_coef": 0.1} if stage == "grpo" else {"epochs": 0.4}
    scores = []
    for save in ("merged", "adapter"):
        run = tmp_path / save
        small.run(stage, run, lora_rank=2, lora_save=save, lr=1e-2, warmup=0.0, **own)
        folder = run / "checkpoints" / f"step-{steps_kept(run)[-1]:06d}"
        model = load_language_model(str(folder), tiny_tokenizer())
        batch = make_case("sft", small).batch
        with torch.no_grad():
            scores.append(model(batch.tokens, batch.mask).logp)
    torch.testing.assert_close(scores[0], scores[1], atol=CLOSE, rtol=0)
    one, other = (metrics(tmp_path / save) for save in ("merged", "adapter"))
    assert one == other
