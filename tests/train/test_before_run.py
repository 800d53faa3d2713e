"""Preflight by itself before a run: what it says, what it stops, and the reward model under padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.tokenizer import prepare
from kinkajou.errors import UserError
from kinkajou.rewards.judges import Ensemble, ModelJudge, RuleJudge, Term, WeightedSum
from kinkajou.rewards.load import load_reward_model
from kinkajou.train import preflight, setup
from kinkajou.train.inputs import records
from small import Small, write_rows
from tiny import tiny_tokenizer

Before = Callable[..., list[str]]


@pytest.fixture
def before(small: Small, tmp_path: Path) -> Before:
    """Preflight over the rows of an SFT run; returns what it says."""

    def run(rows: list[dict[str, Any]], **changes: Any) -> list[str]:
        data = write_rows(tmp_path / "d.jsonl", rows)
        cfg = small.settings("sft", tmp_path / "run", data=data, **changes)
        inputs, said = records(cfg), list[str]()
        form = setup.load_format(cfg.base, (), lambda text: None)
        encoded = setup.encode_chats(inputs.train, form, cfg.base.max_len, lambda text: None)
        preflight.before_run(cfg, form, inputs, encoded, say=said.append)
        return said

    return run


def rows(count: int, **more: object) -> list[dict[str, Any]]:
    return [{"instruction": f"w{i}", "output": f"w{i} w4", **more} for i in range(3, count + 3)]


def test_nothing_is_said_of_sound_data(before: Before) -> None:
    assert before(rows(20)) == []


def test_a_warning_is_cause_evidence_and_action(before: Before) -> None:
    (said,) = before([*rows(20), rows(1)[0]])
    cause, evidence, action = said.splitlines()
    assert cause == "warning: duplicates: records repeat others, and what is repeated is learnt by heart"
    assert evidence.startswith("  seen: 1 of 21 (4.8 %) records; ")
    assert evidence.endswith("d.jsonl:1 stands there 2 times")
    assert action == "  do:   leave each record once"


def test_strict_stops_at_warnings_and_off_says_nothing(before: Before) -> None:
    with pytest.raises(UserError, match="1 check failed: duplicates") as caught:
        before([*rows(20), rows(1)[0]], preflight="strict")
    assert "--preflight off" in caught.value.fix
    assert before([*rows(20), rows(1)[0]], preflight="off") == []


def test_an_error_stops_a_run_before_its_folder_is_made(small: Small, tmp_path: Path) -> None:
    """The prompt fills max_len to the last token but one: no end token is ever trained."""
    long = [{"instruction": "w3 w4 w5 w6 w7 w8", "output": f"w{i} w5 w6"} for i in range(3, 23)]
    data = write_rows(tmp_path / "d.jsonl", long)
    with pytest.raises(UserError, match="end_token") as caught:
        small.run("sft", tmp_path / "run", data=data, max_len=8)
    assert "0 of 20 (0 %) answers end" in caught.value.evidence
    assert "--max_len" in caught.value.fix
    assert not (tmp_path / "run").exists()
    assert small.run("sft", tmp_path / "run", data=data, max_len=8, preflight="off")


def test_a_reward_run_says_its_warnings(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"prompt": f"w{i}", "chosen": "w4", "rejected": "w5"} for i in range(3, 19)]
    data = write_rows(tmp_path / "p.jsonl", [*pairs, pairs[0], {"prompt": "w3", "chosen": "one", "rejected": "two"}])
    small.run("reward", tmp_path / "run", data=data)
    out = capsys.readouterr().out
    assert "warning: duplicates: records repeat others" in out
    assert "  seen: 1 of 18" in out
    assert "warning: same_sides: sequences belong to pairs that are equal" in out
    assert "  seen: 2 of 36" in out


def test_prompts_have_no_answers_to_end(small: Small, tmp_path: Path) -> None:
    cfg = small.settings("ppo", tmp_path / "run")
    inputs = records(cfg)
    form = setup.load_format(cfg.base, (), lambda text: None)
    tokens = form.prompts(prompt.messages for prompt in inputs.prompts)  # type: ignore[union-attr]
    said = list[str]()
    judge = ModelJudge(load_reward_model(small.judge, form.tokenizer, "fp32", nn.Module.cpu), tokens_per_microbatch=512)
    preflight.before_run(cfg, form, inputs, preflight.uncounted(tokens), say=said.append, judge=judge)
    assert said == []


class Scorer(torch.nn.Module):
    """A reward model whose score takes in what it should not."""

    device = torch.device("cpu")

    def __init__(self, *, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, tokens: Tensor, mask: Tensor, at: str) -> Tensor:
        scores = (tokens[:, 1:] * mask).sum(1).float()
        match self.fault:
            case "padding":
                return scores + 0.01 * mask.shape[1]
            case "batch":
                return scores + 0.01 * len(tokens)
        return scores


def chat_format() -> ChatFormat:
    tokenizer = tiny_tokenizer()
    prepare(tokenizer, template="plain", source="here")
    return ChatFormat(tokenizer)


@pytest.mark.parametrize(("fault", "level"), [("", "ok"), ("padding", "warning"), ("batch", "warning")])
def test_scores_under_padding_and_in_a_batch(fault: str, level: str) -> None:
    prompts: list[Encoded] = preflight.uncounted([[3] * n for n in range(1, 9)])
    models: list[Any] = [Scorer(fault=""), Scorer(fault=fault)]
    found = preflight.scores_told(models, prompts, chat_format())
    assert (found.name, found.level) == ("reward_scores", level)
    # Padding adds 32 columns; together, 4 rows stand where 1 stood, and the longest is wider than the shortest.
    worst = {"": "0.0e+00", "padding": "3.2e-01", "batch": "3.0e-02"}[fault]
    assert f"by {worst}" in found.evidence
    assert "over 4 texts" in found.evidence


def test_reward_models_are_found_in_sums_and_ensembles() -> None:
    one, two, three = (ModelJudge(Scorer(fault=""), tokens_per_microbatch=1) for _ in range(3))  # type: ignore[arg-type]
    rule = RuleJudge(lambda answer: 0.0)
    judge = WeightedSum(
        [Term("a", 1.0, one), Term("b", 0.5, Ensemble([two, three], penalty=0.0)), Term("c", 1.0, rule)]
    )
    assert preflight.reward_models(judge) == [one.model, two.model, three.model]
    assert preflight.reward_models(rule) == []
