"""A run that was stopped goes on as if it had never been: bit by bit, by the same command."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kinkajou import faults
from kinkajou.checkpoint.manifest import seal
from kinkajou.errors import UserError
from kinkajou.train.signals import Signals, Stopped
from small import Small, metrics, say, steps_kept, write_rows

CLOCK = {"clock.json", "manifest.json"}
LOGS = ("metrics.jsonl", "samples.jsonl", "findings.jsonl")
RL = {"kl_coef": 0.1, "kl_target": 0.5, "ema_decay": 0.9, "save_every": 2, "save_updates": 1, "score_scale": "std"}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("step.end:3", {"save_every": 2, "eval_share": 0.2, "batch_size": 6}),
    "reward": ("step.logged:4", {"save_every": 2, "lora_rank": 2}),
    "prefer": ("step.start:4", {"save_every": 2}),
    "ppo": ("update.after_step:13", RL),
    "grpo": ("save.snapshot:3", RL),
}


@pytest.fixture(autouse=True)
def _unarmed() -> Iterator[None]:
    yield
    faults.arm("")


def left_of(run: Path) -> dict[str, str]:
    """Digests of all that a run has left, but for what the clock says."""
    last = max((run / "checkpoints").glob("step-*"))
    files = [path for path in last.rglob("*") if path.is_file() and path.name not in CLOCK]
    files += [run / name for name in LOGS if (run / name).is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def broken_off(small: Small, stage: str, run: Path, at: str, **changes: Any) -> None:
    """Trains until a point is reached (`point:n`), where something fails."""
    faults.arm(f"{at}:raise")
    with pytest.raises(RuntimeError, match="asked for at"):
        small.run(stage, run, **changes)
    faults.arm("")


@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on(stage: str, small: Small, tmp_path: Path) -> None:
    (at, changes), whole, run = STAGES[stage], tmp_path / "whole", tmp_path / "run"
    small.run(stage, whole, **changes)
    broken_off(small, stage, run, at, **changes)
    assert not (run / "done.json").exists()
    small.run(stage, run, **changes)
    assert left_of(run) == left_of(whole)
    assert json.loads((run / "done.json").read_text())["checkpoint"] == "step-000005"


@pytest.mark.parametrize(("number", "code"), [("term", 75), ("int", 130)])
def test_a_signal_saves_and_ends(number: str, code: int, small: Small, tmp_path: Path) -> None:
    """In the third update of step 2: that update is finished, and nothing is sampled again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = {**RL, "save_every": 0, "save_updates": 0}
    small.run("ppo", whole, **changes)
    before = signal.getsignal(signal.SIGTERM)
    faults.arm(f"update.backward:13:{number}")  # policy and critic: two a minibatch, four minibatches a step
    with pytest.raises(Stopped) as stopped:
        small.run("ppo", run, **changes)
    assert stopped.value.exit_code == code
    assert "the same command goes on" in str(stopped.value)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000001+003"]
    assert signal.getsignal(signal.SIGTERM) == before
    faults.arm("")
    small.run("ppo", run, **changes)
    assert left_of(run) == left_of(whole)


def test_two_of_the_same_signal_at_once_are_one_and_another_ends() -> None:
    """A launcher passes on what its group has got already."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with Signals() as held:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            os.write(write, b"held" if held.asked == signal.SIGTERM else b"lost")
            signal.raise_signal(signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.read(read, 9) == b"held"
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("lost", ["optimizer.safetensors", "critic_optimizer.safetensors", "random.json", "numbers"])
def test_a_sealed_checkpoint_that_lacks_a_part_is_refused(lost: str, small: Small, tmp_path: Path) -> None:
    """Nothing begins anew in silence: Adam without its moments would."""
    broken_off(small, "ppo", tmp_path / "run", "step.end:4", save_every=3)
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    if lost == "numbers":
        run = json.loads((folder / "state" / "run.json").read_text())
        del run["numbers"]["rl"]
        (folder / "state" / "run.json").write_text(json.dumps(run))
    else:
        (folder / "state" / lost).unlink()
    seal(folder)
    with pytest.raises(UserError) as refused:
        small.run("ppo", tmp_path / "run", save_every=3)
    assert refused.value.exit_code == 4
    assert (
        lost.partition(".")[0] if lost != "numbers" else "rl"
    ) in f"{refused.value.problem} {refused.value.evidence}"


def test_a_run_that_is_done_is_left_as_it_is(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.run("sft", tmp_path / "run")
    before = left_of(tmp_path / "run")
    small.run("sft", tmp_path / "run", log_every=1)  # a setting that decides nothing
    assert "done already" in capsys.readouterr().out
    assert left_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"lr": 3e-3}, "lr: 0.001 then, 0.003 now"), ({"max_len": 40}, "max_len: 48 then, 40 now")],
)
def test_other_settings_are_refused_by_name(changes: dict[str, Any], words: str, small: Small, tmp_path: Path) -> None:
    broken_off(small, "sft", tmp_path / "run", "step.end:4", save_every=2)
    with pytest.raises(UserError, match="the settings are not those of") as refused:
        small.run("sft", tmp_path / "run", save_every=2, **changes)
    assert words in refused.value.evidence
    assert f"--allow_change {next(iter(changes))}" in refused.value.fix
    assert len(metrics(tmp_path / "run")) == 3
    small.run("sft", tmp_path / "run", save_every=2, allow_change=tuple(changes), **changes)
    assert len(metrics(tmp_path / "run")) == 5


def test_other_records_are_refused(small: Small, tmp_path: Path) -> None:
    import random

    dice = random.Random(1)
    rows = [{"instruction": say(dice, 1, 9), "output": say(dice, 1, 9)} for _ in range(40)]
    data = write_rows(tmp_path / "chats.jsonl", rows)
    broken_off(small, "sft", tmp_path / "run", "step.end:4", save_every=2, data=data)
    write_rows(tmp_path / "chats.jsonl", [{"instruction": "w9", "output": "w8"}, *rows[1:]])
    with pytest.raises(UserError, match=r"records is not what .* was trained with"):
        small.run("sft", tmp_path / "run", save_every=2, data=data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    small.run("sft", whole, save_every=1)
    broken_off(small, "sft", run, "step.end:5", save_every=1)
    weights = run / "checkpoints" / "step-000004" / "model.safetensors"
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    capsys.readouterr()
    small.run("sft", run, save_every=1)
    told = capsys.readouterr().out
    assert "step-000004 is damaged: model.safetensors" in " ".join(told.split())
    assert "goes on from" in told
    assert left_of(run) == left_of(whole)


def test_nothing_whole_is_left(small: Small, tmp_path: Path) -> None:
    broken_off(small, "sft", tmp_path / "run", "step.end:4", save_every=2)
    (tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole") as refused:
        small.run("sft", tmp_path / "run", save_every=2)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize("names_checkpoint", [False, True])
def test_it_goes_on_in_another_folder(names_checkpoint: bool, small: Small, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    small.run("grpo", first, save_every=2)
    source = first / "checkpoints" / "step-000002" if names_checkpoint else first
    step = {} if names_checkpoint else {"from_step": 2}
    before = left_of(first)
    small.run("grpo", second, save_every=2, resume=str(source), **step)
    assert left_of(second) == before == left_of(first)
    assert steps_kept(second) == [4, 5]


def test_another_folder_then_goes_on_by_itself(small: Small, tmp_path: Path) -> None:
    """The same command with --resume: not from the other run's checkpoint again, and never over a third run."""
    first, second = tmp_path / "first", tmp_path / "second"
    small.run("sft", first, save_every=1)
    resumed = {"save_every": 1, "resume": str(first), "from_step": 2}
    broken_off(small, "sft", second, "step.end:2", **resumed)  # step 4
    assert steps_kept(second) == [3]
    broken_off(small, "sft", second, "step.end:1", **resumed)
    assert steps_kept(second) == [3]
    small.run("sft", second, **resumed)
    assert left_of(second) == left_of(first)
    small.run("reward", tmp_path / "third", save_every=1)
    with pytest.raises(UserError, match="already holds a run"):
        small.run("sft", tmp_path / "third", **resumed)


def test_numbers_that_stop_a_run_save_it_first(small: Small, tmp_path: Path) -> None:
    """In the first update of step 3: what is saved is step 2, and the run ends as if nothing had been."""
    changes = {"max_skipped": 0, "score_scale": "std", "epochs": 1, "minibatch_size": 8}
    whole, run = tmp_path / "whole", tmp_path / "run"
    small.run("grpo", whole, **changes)
    faults.arm("update.forward:5:nan")
    with pytest.raises(UserError) as stopped:
        small.run("grpo", run, **changes)
    assert stopped.value.exit_code == 3
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000002"]
    faults.arm("")
    small.run("grpo", run, **changes)
    (same,) = {row["score_std_running"] for row in (metrics(whole)[-1], metrics(run)[-1])}
    assert same > 0
    assert metrics(run) == metrics(whole)
    ends = [load_file(folder / "checkpoints" / "step-000005" / "model.safetensors") for folder in (whole, run)]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())


def test_the_best_goes_along_into_another_folder(small: Small, tmp_path: Path) -> None:
    """Nothing is learnt, so step 0 stays the best."""
    changes = {"eval_prompts": small.held_out, "eval_every": 1, "keep_best": "score", "save_every": 3, "steps": 3}
    rule = {"reward": "rule:mentions:w5,w6,w7,w8", "lr": 0.0, "kl_coef": 0.0}
    small.run("grpo", tmp_path / "first", **changes, **rule)
    best = (tmp_path / "first" / "best.json").read_text()
    small.run("grpo", tmp_path / "second", resume=str(tmp_path / "first"), **changes, **rule)
    assert (tmp_path / "second" / "best.json").read_text() == best
    kept = tmp_path / "second" / "checkpoints" / f"step-{json.loads(best)['step']:06d}"
    assert (kept / "model.safetensors").is_file()
    done = json.loads((tmp_path / "second" / "done.json").read_text())
    assert done["checkpoint"] == kept.name


def test_a_folder_that_is_not_there(small: Small, tmp_path: Path) -> None:
    """Told before records or models are read."""
    with pytest.raises(UserError, match="no folder nowhere to go on from"):
        small.run("sft", tmp_path / "run", resume="nowhere", data="neither")
    assert not (tmp_path / "run").exists()


def test_an_earlier_step_of_its_own(small: Small, tmp_path: Path) -> None:
    """What came later is forgotten only where that was asked for."""
    run = tmp_path / "run"
    small.run("sft", run, save_every=1)
    before = left_of(run)
    with pytest.raises(UserError, match="has checkpoints after step 2") as refused:
        small.run("sft", run, save_every=1, from_step=2)
    assert "--overwrite" in refused.value.fix
    with pytest.raises(UserError, match="there is no checkpoint of step 7"):
        small.run("sft", run, save_every=1, from_step=7, overwrite=True)
    faults.arm("step.end:2:raise")  # step 4
    with pytest.raises(RuntimeError):
        small.run("sft", run, save_every=1, from_step=2, overwrite=True)
    faults.arm("")
    assert steps_kept(run) == [1, 2, 3]
    small.run("sft", run, save_every=1)
    assert left_of(run) == before
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5]


def test_which_checkpoints_stay(small: Small, tmp_path: Path) -> None:
    small.run("sft", tmp_path / "run", batch_size=4, epochs=1, save_every=1, keep_last=2, keep_every=4)
    assert steps_kept(tmp_path / "run") == [4, 8, 9, 10]


def test_the_best_is_kept_and_found_again(small: Small, tmp_path: Path) -> None:
    changes = {"eval_prompts": small.held_out, "eval_every": 1, "keep_best": "score", "save_every": 2, "keep_last": 1}
    whole, run = tmp_path / "whole", tmp_path / "run"
    small.run("ppo", whole, **changes)
    broken_off(small, "ppo", run, "step.end:4", **changes)
    small.run("ppo", run, **changes)
    assert (run / "best.json").read_text() == (whole / "best.json").read_text()
    best = json.loads((run / "best.json").read_text())["step"]
    assert steps_kept(run) == steps_kept(whole)
    assert best in steps_kept(run)


def test_by_the_clock(small: Small, tmp_path: Path) -> None:
    """Every step takes longer than a ten-thousandth of a minute; the newest two stay while the run goes on."""
    broken_off(small, "sft", tmp_path / "run", "step.end:5", save_minutes=1e-4)
    assert steps_kept(tmp_path / "run") == [3, 4]


def test_without_state_it_cannot_go_on(small: Small, tmp_path: Path) -> None:
    broken_off(small, "sft", tmp_path / "run", "step.end:4", save_every=2, save_state=False)
    with pytest.raises(UserError, match="already holds a run") as refused:
        small.run("sft", tmp_path / "run", save_every=2, save_state=False)
    assert "--save_state false" in refused.value.evidence


def test_saving_in_the_open_is_the_same(small: Small, tmp_path: Path) -> None:
    small.run("ppo", tmp_path / "behind", save_every=1)
    small.run("ppo", tmp_path / "before", save_every=1, save_behind=False)
    assert left_of(tmp_path / "behind") == left_of(tmp_path / "before")


def test_a_fault_in_the_background_stops_the_run(small: Small, tmp_path: Path) -> None:
    faults.arm("save.state:2:enospc")
    with pytest.raises(UserError, match="could not be written") as stopped:
        small.run("sft", tmp_path / "run", save_every=1)
    assert stopped.value.exit_code == 4
    assert "No space left" in stopped.value.evidence
    faults.arm("")
    small.run("sft", tmp_path / "whole", save_every=1)
    small.run("sft", tmp_path / "run", save_every=1)
    assert left_of(tmp_path / "run") == left_of(tmp_path / "whole")


def test_a_run_of_another_stage(small: Small, tmp_path: Path) -> None:
    broken_off(small, "sft", tmp_path / "run", "step.end:4", save_every=2)
    with pytest.raises(UserError, match="already holds a run"):
        small.run("reward", tmp_path / "run")
    with pytest.raises(UserError, match="is of another stage: sft"):
        small.run("reward", tmp_path / "other", resume=str(tmp_path / "run"))


def test_the_reference_stays_what_it_was(small: Small, tmp_path: Path) -> None:
    """Measured against the model that the run started from, and not against the one it goes on with."""
    small.run("grpo", tmp_path / "whole", kl_coef=0.1, lr=1e-2)
    broken_off(small, "grpo", tmp_path / "run", "step.end:4", kl_coef=0.1, lr=1e-2, save_every=3)
    small.run("grpo", tmp_path / "run", kl_coef=0.1, lr=1e-2, save_every=3)
    assert [row["kl_ref"] for row in metrics(tmp_path / "run")] == [
        row["kl_ref"] for row in metrics(tmp_path / "whole")
    ]
    assert metrics(tmp_path / "run")[-1]["kl_ref"] > 1e-3
    optimizer = load_file(tmp_path / "run" / "checkpoints" / "step-000005" / "state" / "optimizer.safetensors")
    assert {float(x) for name, x in optimizer.items() if name.endswith(".step")} == {20.0}
