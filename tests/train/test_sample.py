"""kinkajou sample: what it writes is read back, and really is the best; bad input leaves nothing behind."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kinkajou import config
from kinkajou.cli import main
from kinkajou.data.records import Message, Prompt
from kinkajou.data.sources import read_chats, read_pairs
from kinkajou.errors import UserError
from kinkajou.rewards.answer import Answer
from kinkajou.train import sample
from kinkajou.train.sample import Scored, kept, sample_data
from rl import ending
from small import Small, grouped

WANTED = 4


def settings(small: Small, output: Path, **changes: Any) -> config.SampleConfig:
    plain = {"model": ending(small), "prompts": small.prompts, "template": "plain", "max_len": 48}
    size = {"max_new_tokens": 8, "group_size": 5, "reward": f"rule:length:{WANTED}", "output": str(output)}
    made: config.SampleConfig = grouped(config.SampleConfig, {**plain, **size, **changes})
    return made


def write(small: Small, output: Path, **changes: Any) -> list[dict[str, Any]]:
    assert sample_data(settings(small, output, **changes)) == output
    return [json.loads(line) for line in output.read_text().splitlines()]


def score(text: str) -> float:
    return max(0.0, 1 - abs(len(text.split()) - WANTED) / WANTED)


def by_prompt(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, float]]]:
    found = defaultdict(list)
    for row in rows:
        found[row["messages"][0]["content"]].append((row["messages"][1]["content"], row["score"]))
    return found


@pytest.fixture(scope="module")
def everything(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, float]]]:
    """Every different answer to each prompt: what the choice is made from."""
    path = tmp_path_factory.mktemp("all") / "all.jsonl"
    return by_prompt(write(small, path, write="threshold", threshold=-9.0, max_per_prompt=5))


def test_the_best_of_each_group(
    small: Small, tmp_path: Path, everything: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """One chat a prompt whose score is the highest of its group, by the rule typed again."""
    path = tmp_path / "best.jsonl"
    rows = write(small, path)
    said = capsys.readouterr().out
    found = by_prompt(rows)
    assert len(rows) == len(found) == len(everything) > 25  # others said nothing, five times
    for prompt, ((text, told),) in found.items():
        assert told == pytest.approx(score(text), abs=1e-6)
        assert told == pytest.approx(max(score(other) for other, _ in everything[prompt]), abs=1e-6)
    assert sum(len(answers) > 1 for answers in everything.values()) > 20
    best = sum(told for ((_, told),) in found.values()) / 40
    assert f"best of 5 {best:.4g}" in said
    assert f"{math.log(5) - 4 / 5:.2f} nats" in said
    chats = read_chats(str(path)).rows
    assert [chat.messages[1].content for chat in chats] == [row["messages"][1]["content"] for row in rows]
    assert [chat.messages[0].role for chat in chats] == ["user"] * len(rows)


def test_cut_off_answers_say_so(small: Small, tmp_path: Path) -> None:
    """They hold 8 words and no end; training on them must not teach one."""
    rows = write(small, tmp_path / "all.jsonl", write="threshold", threshold=-9.0, max_per_prompt=5)
    cut = [row["messages"][1].get("ended", True) for row in rows]
    assert set(cut) == {True, False}
    for row, ended in zip(rows, cut, strict=True):
        assert ended or len(row["messages"][1]["content"].split()) <= 8
    assert [chat.messages[1].ended for chat in read_chats(str(tmp_path / "all.jsonl")).rows] == cut
    ended = write(small, tmp_path / "ended.jsonl", reward="rule:ended", write="threshold", threshold=1.0)
    assert not any("ended" in row["messages"][1] for row in ended)
    assert all(row["score"] == 1 for row in ended)


def test_answers_beyond_a_threshold(small: Small, tmp_path: Path, everything: Any) -> None:
    rows = by_prompt(write(small, tmp_path / "good.jsonl", write="threshold", threshold=0.75, max_per_prompt=2))
    for prompt, answers in everything.items():
        good = sorted((told for _, told in answers if told >= 0.75), reverse=True)[:2]
        assert [told for _, told in rows.get(prompt, [])] == good
    assert {len(answers) for answers in rows.values()} == {1, 2}
    assert len(rows) < 40


def test_pairs(small: Small, tmp_path: Path, everything: Any) -> None:
    """Best against worst, at least `threshold` apart; a reward model can be trained on the file."""
    rows = write(small, tmp_path / "pairs.jsonl", write="pairs", threshold=0.5)
    wide = 0
    for answers in everything.values():
        scores = [told for _, told in answers]
        wide += max(scores) - min(scores) >= 0.5
    assert len(rows) == wide < 40
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        scores = [told for _, told in everything[row["prompt"][0]["content"]]]
        assert (row["score_chosen"], row["score_rejected"]) == (max(scores), min(scores))
        assert (score(chosen), score(rejected)) == pytest.approx((max(scores), min(scores)))
    pairs = read_pairs(str(tmp_path / "pairs.jsonl")).rows
    assert len(pairs) == len(rows)
    small.run("reward", tmp_path / "run", data=str(tmp_path / "pairs.jsonl"), batch_size=4, max_rows=8)


def test_seeds(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed writes the same bytes, in rounds of any size; another seed other answers; no two are the same."""
    one = write(small, tmp_path / "one.jsonl")
    monkeypatch.setattr(sample, "AT_ONCE", 7)
    assert write(small, tmp_path / "two.jsonl") == one
    other = write(small, tmp_path / "other.jsonl", seed=1)
    before, after = by_prompt(one), by_prompt(other)
    assert sum(before[prompt] == after[prompt] for prompt in before) < 10
    data = tmp_path / "same.jsonl"
    data.write_text('{"prompt": "w5 w6"}\n' * 6)
    rows = write(small, tmp_path / "many.jsonl", prompts=str(data), model=small.policy, seed=3)
    assert len({row["messages"][1]["content"] for row in rows}) == 6


def judged(text: str, told: float, *, ended: bool = True) -> Scored:
    return Scored(Answer(Prompt((Message("user", "w5"),), {}, "here"), text, ended), told)


def test_the_same_text_with_several_scores(small: Small, tmp_path: Path) -> None:
    """Cut off and ended, one text has two scores: it counts once, with the better."""
    group = [judged("w3", 1.0, ended=False), judged("w4", 3.0), judged("w3", 5.0), judged("", 9.0)]
    (row,) = kept(settings(small, tmp_path / "x"), group)
    assert (row["messages"][1], row["score"]) == ({"role": "assistant", "content": "w3"}, 5.0)
    rows = list(kept(settings(small, tmp_path / "x", write="threshold", threshold=0.0, max_per_prompt=3), group))
    assert [row["score"] for row in rows] == [5.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"write": "pairs", "group_size": 1}, "a pair needs two answers"),
        ({"write": "threshold"}, "needs a threshold"),
        ({"max_per_prompt": 2}, "--max_per_prompt does nothing with --write best"),
        ({"write": "pairs", "max_per_prompt": 2}, "--max_per_prompt does nothing with --write pairs"),
        ({"reward": ""}, "--reward is missing"),
        ({"reward": "rule:lenght:3"}, "did you mean 'length'"),
        ({"temperature": 0.0}, "--temperature"),
        ({"group_size": 0}, "--group_size"),
        ({"max_len": 12, "max_new_tokens": 11}, "prompt is too long"),
        ({"max_len": 65}, "longer than the model's context"),
        ({"write": "threshold", "threshold": 2.0}, "no answer was good enough"),
        ({"write": "pairs", "threshold": 2.0}, "no answer was good enough"),
        ({"model": "nowhere"}, "no"),
    ],
)
def test_bad_input(changes: dict[str, Any], problem: str, small: Small, tmp_path: Path) -> None:
    """One sentence, and nothing under the file's name."""
    with pytest.raises(UserError, match=problem) as refused:
        sample_data(settings(small, tmp_path / "out" / "file.jsonl", **changes))
    assert refused.value.exit_code == 2
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_a_file_that_is_there_stays(small: Small, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UserError, match="already there"):
        sample_data(settings(small, path, max_prompts=2))
    with pytest.raises(UserError, match="good enough"):
        sample_data(settings(small, path, max_prompts=2, overwrite=True, write="threshold", threshold=2.0))
    assert path.read_text() == "mine\n"
    assert len(write(small, path, max_prompts=2, overwrite=True)) == 2


def test_a_judge_that_fails_loses_no_answer(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second round: both rounds' answers lie aside, and nothing under the file's name."""
    every = {"write": "threshold", "threshold": -9.0, "max_per_prompt": 5}
    whole = write(small, tmp_path / "whole.jsonl", **every)
    monkeypatch.setattr(sample, "AT_ONCE", 5)
    load, calls = sample.load_judge, []

    def failing(*given: Any, **named: Any) -> Any:
        judge = load(*given, **named)

        def once(answers: Any, rollout: Any) -> Any:
            calls.append(len(answers))
            if len(calls) == 2:
                raise UserError("the service is down", evidence="5 tries", fix="start it again", exit_code=5)
            return judge(answers, rollout)

        return once

    monkeypatch.setattr(sample, "load_judge", failing)
    with pytest.raises(UserError, match="service is down") as stopped:
        sample_data(settings(small, tmp_path / "out.jsonl", **every))
    assert calls == [5, 5]
    assert not (tmp_path / "out.jsonl").exists()
    finished, unscored = tmp_path / "out.jsonl.part", tmp_path / "out.jsonl.unscored.jsonl"
    for word in ("5 tries", f"rows are kept in {finished}", f"5 answers without a score in {unscored}"):
        assert word in stopped.value.evidence
    assert (stopped.value.fix, stopped.value.exit_code) == ("start it again", 5)
    first = [json.loads(line) for line in finished.read_text().splitlines()]
    assert first == whole[: len(first)]
    assert len({row["messages"][0]["content"] for row in first}) == 1
    second = [json.loads(line)["messages"] for line in unscored.read_text().splitlines()]
    asked = second[0][0]["content"]
    wanted = [row["messages"] for row in whole if row["messages"][0]["content"] == asked]
    assert len(second) == 5
    assert all(messages in second for messages in wanted)


def test_the_command_line(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    words = ["--model", small.policy, "--prompts", small.prompts, "--max-prompts", "3", "--max-len", "48"]
    words += ["--max-new-tokens", "4", "--group-size", "2", "--reward", "rule:length:3", "--output", str(path)]
    assert main(["sample", *words]) == 0
    assert len(path.read_text().splitlines()) == 3
    assert main(["sample", *words]) == 2
    assert "--overwrite" in capsys.readouterr().err
