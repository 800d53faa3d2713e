"""Steps that are not finite are left out, counted and told; after several in a row the run stops."""

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kinkajou import faults
from kinkajou.algos.losses import Loss, cross_entropy
from kinkajou.batch import TokenBatch
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel
from kinkajou.parallel.strategy import Single
from kinkajou.train.nonfinite import NotFinite
from kinkajou.train.optim import adamw
from kinkajou.train.skips import Guard
from kinkajou.train.update import Objective, update
from small import Small, metrics, weights
from tiny import ours, peer, ragged, tiny_config
from train.test_ddp import torchrun

NAN = float("nan")


class Here(Single):
    def __init__(self) -> None:
        self.device = torch.device("cpu")


def guard(limit: int = 3) -> tuple[Guard, list[int]]:
    told: list[int] = []
    return Guard(limit, tell=lambda fault, number: told.append(number), keep=lambda fault: "kept in a folder"), told


def made() -> LanguageModel:
    return LanguageModel(
        ours(AutoModelForCausalLM, tiny_config("llama"), peer(AutoModelForCausalLM, tiny_config("llama")))
    )


def objective(how: str = "") -> Objective:
    tokens, real = ragged((9, 3, 7), width=9)

    def loss(model: nn.Module, batch: TokenBatch, count: Tensor) -> Loss:
        value = cross_entropy(model(batch.tokens, batch.mask).logp, batch.mask, count).value
        if how == "gradient":  # the root of 0 has no derivative
            value = value + (model.module.lm_head.weight * 0).sum().sqrt()
        if how == "loss":
            value = value * NAN
        if how == "loss alone":  # whose gradient is finite
            value = value + torch.tensor(float("inf"))
        return Loss(value, {"shown": value.detach()})

    return Objective(TokenBatch(tokens, real[:, 1:]), loss)


@pytest.mark.parametrize("how", ["loss", "gradient", "loss alone"])
def test_a_step_is_left_out(how: str) -> None:
    """Weights, optimiser and gradients are as if it had never been asked for, and the next step is the same as ever."""
    given = {"tokens_per_microbatch": 9, "max_norm": 1.0}
    model = made()
    optimizer = adamw(model, lr=0.01, weight_decay=0.1)
    update(Here(), model, optimizer, [objective()], **given)
    other = LanguageModel(copy.deepcopy(model.module))
    twin = adamw(other, lr=0.01, weight_decay=0.1)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours, told = guard()
    assert update(Here(), model, optimizer, [objective(how)], guard=ours, **given) == {}
    assert told == [1]
    assert ours.skips.total == 1
    assert all(param.grad is None for param in model.parameters())
    found = update(Here(), model, optimizer, [objective()], guard=ours, **given)
    assert found == update(Here(), other, twin, [objective()], **given)
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert asdict(ours.skips) == {"in_a_row": {}, "total": 1, "this_step": 1}
    assert ours.reported() == {"skipped": 1.0}
    assert ours.reported() == {}


def test_one_too_many_in_a_row_stops() -> None:
    model = made()
    optimizer = adamw(model, lr=0.01, weight_decay=0.1)
    given = {"tokens_per_microbatch": 9, "max_norm": 1.0}
    ours, told = guard(limit=2)
    for _ in range(2):
        for how in ("loss", "loss", ""):
            update(Here(), model, optimizer, [objective(how)], guard=ours, **given)
    assert told == [1, 2, 1, 2]
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        update(Here(), model, optimizer, [objective("loss")], guard=ours, **given)
    with pytest.raises(NotFinite) as fault:
        update(Here(), model, optimizer, [objective("loss")], guard=ours, **given)
    assert fault.value.exit_code == 3
    assert "3 in a row" in fault.value.evidence
    assert "kept in a folder" in fault.value.fix
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_models_are_counted_apart() -> None:
    """A critic that learns does not hide that the policy does not."""
    ours, _ = guard(limit=1)
    fault = NotFinite("x", "", "")
    ours.left_out("policy_loss", fault)
    ours.taken("value_loss")
    with pytest.raises(NotFinite):
        ours.left_out("policy_loss", fault)


def findings(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "findings.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sft", "reward", "prefer", "ppo", "grpo"])
@pytest.mark.parametrize("point", ["update.forward", "update.backward"])
def test_a_run_goes_on_without_the_step(
    stage: str, point: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"ema_decay": 0.5} if stage in ("ppo", "grpo") else {}
    faults.arm(f"{point}:3:nan")
    try:
        rows = small.run(stage, tmp_path / "run", **more)
    finally:
        faults.arm("")
    assert len(rows) == 5
    assert sum(row.get("skipped", 0) for row in rows) == 1
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
    assert all(x.isfinite().all() for x in weights(tmp_path / "run", 5).values())
    (line,) = [line for line in findings(tmp_path / "run") if line["name"] == "not_finite"]
    assert line["step"] == next(row["step"] for row in rows if "skipped" in row)
    assert f"step {line['step']}: left out: a loss or gradient is not finite" in capsys.readouterr().out


def test_an_average_does_not_follow(small: Small, tmp_path: Path) -> None:
    """All updates but the first are left out: policy and average are those of a run that makes only that one."""
    given = {"ema_decay": 0.5, "steps": 1, "prompts_per_step": 4, "minibatch_size": 4}
    for name, epochs in (("one", 1), ("three", 3)):
        # An update is one pass of the critic and one of the policy.
        faults.arm(",".join(f"update.forward:{n}:nan" for n in range(3, 7)) if epochs == 3 else "")
        try:
            (row,) = small.run("ppo", tmp_path / name, epochs=epochs, **given)
        finally:
            faults.arm("")
        assert row.get("skipped", 0) == 2 * (epochs - 1)
        assert row["updates"] == 1
    for part in ("", "ema", "critic"):
        folders = (tmp_path / name / "checkpoints" / "step-000001" / part for name in ("one", "three"))
        mine, theirs = (load_file(folder / "model.safetensors") for folder in folders)
        assert all(torch.equal(x, theirs[name]) for name, x in mine.items()), part


def test_the_first_one_stops_where_none_may_be_left_out(small: Small, tmp_path: Path) -> None:
    for number, how in enumerate(({"max_skipped": 0}, {"stop_on": ("not_finite",)})):
        faults.arm("update.forward:2:nan")
        try:
            with pytest.raises(UserError, match="not finite") as fault:
                small.run("sft", tmp_path / f"{number}", **how)
        finally:
            faults.arm("")
        assert fault.value.exit_code == 3
        assert len(metrics(tmp_path / f"{number}")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_all_ranks_leave_out_what_one_has_seen(strategy: str, small: Small, tmp_path: Path) -> None:
    """The fault is the second rank's alone; both go on, and the stop leaves one whole folder for a replay."""
    given = {"data": small.chats, "batch_size": 8, "epochs": 1, "model": small.policy, "template": "plain"}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    for name, limit, kept in (("goes-on", 3, 5), ("stops", 0, 2)):
        more = ["--output", name, "--strategy", strategy, "--max_len", "48", "--max_skipped", str(limit)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KINKAJOU_FAULT", "update.backward:3:nan@1")
            done = torchrun(["-m", "kinkajou", "sft", *flags, *more], cwd=tmp_path)
        rows = metrics(tmp_path / name)
        assert len(rows) == kept, done.stderr[-2000:]
        assert [row["step"] for row in rows if "skipped" in row] == ([3] if limit else [])
    held = load_file(tmp_path / "stops" / "replay" / "step-000003" / "weights.safetensors")
    assert all(x.isfinite().all() for x in held.values())
    assert "replay" not in [path.name for path in (tmp_path / "goes-on").iterdir()]
