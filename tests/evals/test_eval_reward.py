"""`kinkajou eval reward` from the command line: the run's own held-out numbers, subsets, JSON, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinkajou.cli import main
from kinkajou.data.sources import read_pairs
from small import Small, write_rows

PAIR = {"prompt": "w3 w4", "chosen": "w5 w6", "rejected": "w7"}


def command(small: Small, **changes: Any) -> list[str]:
    flags = {"model": small.judge, "data": small.pairs, "template": "plain", "max_len": 48, **changes}
    return ["eval", "reward", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def result(small: Small, path: Path, **changes: Any) -> dict[str, Any]:
    assert main([*command(small, output=path, **changes), "--overwrite"]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A reward model that held out a quarter, and the last row of its metrics."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    rows = small.run("reward", folder, eval_share=0.25, seed=3)
    return folder, rows[-1]


def test_the_runs_own_held_out_numbers(small: Small, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, row = run
    found = result(small, tmp_path / "health.json", model=folder, eval_share=0.25, seed=3)
    assert found["accuracy"]["count"] == row["eval_pairs"] == 10
    assert found["accuracy"]["value"] == pytest.approx(row["eval_accuracy"], abs=1e-9)
    assert found["accuracy"]["low"] == pytest.approx(row["eval_accuracy_low"], abs=1e-9)
    assert found["margin"] == pytest.approx(row["eval_margin"], abs=1e-5)
    assert "trained_on" not in [item["name"] for item in found["findings"]]


@pytest.mark.parametrize("changes", [{}, {"eval_share": 0.25}, {"eval_share": 0.5, "seed": 3}])
def test_pairs_that_the_run_was_trained_on(
    changes: dict[str, Any], small: Small, run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint = next((run[0] / "checkpoints").iterdir())
    for model in (run[0], checkpoint):
        found = result(small, tmp_path / "health.json", model=model, **changes)
        assert found["findings"][0]["name"] == "trained_on"
    same_rows = write_rows(tmp_path / "other.jsonl", [PAIR] * 3)
    found = result(small, tmp_path / "health.json", model=run[0], data=same_rows)
    assert "trained_on" not in [item["name"] for item in found["findings"]]


def test_micro_batches_and_order_do_not_matter(small: Small, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(small.pairs).read_text().splitlines()]
    backwards = write_rows(tmp_path / "backwards.jsonl", rows[::-1])
    one = result(small, tmp_path / "1.json", tokens_per_microbatch=1)
    two = result(small, tmp_path / "2.json", data=backwards)
    for name in ("margin", "margin_deviation", "score", "score_deviation"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    assert max(one["stability"][name] for name in ("padded", "together", "reversed")) < 1e-4


def test_answer_tokens_are_counted_without_the_prompt(small: Small, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, "prompt": "w3 " * 20}])
    found = result(small, tmp_path / "health.json", data=data)["length"]
    assert (found["mean_chosen"], found["mean_rejected"]) == (3, 2)  # with the end token


def test_subsets_by_field(small: Small, tmp_path: Path) -> None:
    kinds = ["a", "b", "a", None]
    rows = [{**PAIR, "prompt": f"w{9 + i}", "kind": kind, "source": "s"} for i, kind in enumerate(kinds)]
    del rows[3]["kind"]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    found = result(small, tmp_path / "1.json", data=data, subset_field="kind")
    assert {part["name"]: part["accuracy"]["count"] for part in found["subsets"]} == {"(none)": 1, "a": 2, "b": 1}
    found = result(small, tmp_path / "2.json", data=data)
    assert (found["subset_field"], [part["name"] for part in found["subsets"]]) == ("source", ["s"])


def test_pairs_keep_their_other_fields(tmp_path: Path) -> None:
    row = {"instruction": "w3", "input": "w4", "chosen": "w5", "rejected": "w6", "output": "w5", "category": 2}
    (pair,) = read_pairs(write_rows(tmp_path / "pairs.jsonl", [row])).rows
    assert pair.meta == {"output": "w5", "category": 2}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *names: str, code: int = 2) -> None:
    assert main(arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    for name in names:
        assert name in said


def test_what_is_refused(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["eval", "reward"], "--model is missing")
    refused(capsys, ["eval", "reward", "--model", "m"], "--data is missing")
    refused(capsys, ["eval", "rewrad"], "rewrad", 'Did you mean "reward"', "kinkajou eval --help")
    refused(capsys, command(small, tokens_per_microbatch=0), "--tokens_per_microbatch must be at least 1")
    refused(capsys, command(small, sed=1), "sed", "kinkajou eval reward --help")
    refused(capsys, command(small, model=small.policy), "no scalar head", "kinkajou reward")
    refused(capsys, command(small, model="llama-tiny"), "llama-tiny is untrained", "kinkajou reward")
    refused(capsys, command(small, data=tmp_path / "pairs.jsonl"), "pairs.jsonl: no such file")
    refused(capsys, command(small, subset_field="kind"), "no pair has the field 'kind'", "leave --subset_field out")
    rows = write_rows(tmp_path / "rows.jsonl", [{**PAIR, "topic": "a"}])
    refused(capsys, command(small, data=rows, subset_field="tpoic"), "did you mean 'topic'")
    long = write_rows(tmp_path / "long.jsonl", [{**PAIR, "prompt": "w3 " * 90}])
    refused(capsys, command(small, data=long, max_len=512), "longer than the model's context", "--max_len 64")
    refused(capsys, command(small, data=write_unknown(tmp_path)), "no pair has two different answers in tokens")


def write_unknown(folder: Path) -> str:
    """Two words that the tokenizer does not know are the same token."""
    return write_rows(folder / "unknown.jsonl", [{**PAIR, "chosen": "what", "rejected": "who"}])


def test_the_output_is_looked_at_first(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "health.json").write_text("mine")
    refused(capsys, command(small, model="m", output=tmp_path / "health.json"), "already there", "--overwrite")
    refused(capsys, command(small, model="m", output=tmp_path / "no" / "health.json"), "does not exist")
    refused(capsys, command(small, model="m", output=tmp_path), "is a folder")
    assert (tmp_path / "health.json").read_text() == "mine"


def test_a_score_that_is_no_number(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(small.judge).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)  # finite, and no score is
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, command(small, model=broken), "no number", "pairs.jsonl:1, chosen: ", code=3)


def test_bad_pairs_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    code = (
        "import sys; from kinkajou.cli import main; rc = main(sys.argv[1:]);"
        "heavy = [m for m in ('torch', 'transformers', 'peft') if m in sys.modules]; print(rc, heavy)"
    )
    arguments = [sys.executable, "-c", code, "eval", "reward", "--model", "gpt2", "--data", "bad.jsonl"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert "bad.jsonl:1" in done.stderr


def test_cut_pairs_are_counted(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "long.jsonl", [{**PAIR, "prompt": "w3 " * 30}, *[PAIR] * 3])
    found = result(small, tmp_path / "health.json", data=data, max_len=16)
    assert found["cut"] == 0.25
    assert "1 of 4 pairs are longer than 16 tokens" in capsys.readouterr().out
    assert "cut" in [item["name"] for item in found["findings"]]
