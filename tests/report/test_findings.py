"""Findings and the newer metrics on the page."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import ppo_rows, report, write_run

from kinkajou.report.catalogue import panels_of
from kinkajou.report.folder import FINDINGS_KEPT, read_stage


def finding(name: str, step: int, **changes: Any) -> dict[str, Any]:
    own = {"name": name, "step": step, "cause": "it is ill", "action": "lower --lr or `stop`", "metrics": ["kl_ref"]}
    return {**own, "evidence": {"kl_ref": 31.25, "where": "module a"}, "seen": 1, **changes}


def write_findings(run: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    (run / "findings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_each_name_once_with_its_count_and_marks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ppo", ppo_rows())
    lines = [finding("kl_leap", 7), finding("gold_falls", 12, metrics=["eval_gold", "score"])]
    write_findings(run, [*lines, finding("kl_leap", 11, seen=4, evidence={"kl_ref": 99.0})])
    page = report(run)
    cards = page.all("article", "finding")
    assert len(cards) == 2
    for said in ("kl_leap step 7, 4 times", "gold_falls step 12", "It is ill.", "kl_ref 31.25", "where module a"):
        assert said in page.text
    assert "99" not in page.text
    assert "<code>--lr</code>" in page.source
    assert "<code>stop</code>" in page.source
    # A red line in each chart that has one of its metrics: KL; score and truth.
    assert len(page.all("path", "found")) == 3
    assert "kl_leap at step 7." in page.text
    assert page.text.index("kl_leap") < page.text.index("Does it get better?")


def test_overview_counts_them(tmp_path: Path) -> None:
    for name in ("sft", "ppo"):
        write_run(tmp_path / name, ppo_rows())
    write_findings(tmp_path / "ppo", [finding("kl_leap", 7), finding("x", 8)])
    text = report(tmp_path).text
    assert text.count("2 findings") == 1
    assert "0 findings" not in text


def test_a_run_without_findings_says_nothing(tmp_path: Path) -> None:
    assert "What its numbers show" not in report(write_run(tmp_path, ppo_rows())).text


def test_broken_lines_are_counted_and_the_rest_is_bounded(tmp_path: Path) -> None:
    run = write_run(tmp_path, ppo_rows())
    many = [finding(f"name-{i}", i) for i in range(1, 200)]
    odd = [finding("odd", 3, evidence=[1], metrics="x", cause=None, action=7, seen="many") | {"step": 0.5}]
    write_findings(run, [*odd, *many], tail='{"step": 9}\n{"name": "a", "st')
    page = report(run)
    assert len(page.all("article", "finding")) == FINDINGS_KEPT
    assert "2 lines of findings.jsonl could not be read and were skipped." in page.text


def test_a_finding_beyond_the_recorded_steps_draws_no_line(tmp_path: Path) -> None:
    run = write_run(tmp_path, ppo_rows(20))
    write_findings(run, [finding("not_finite", 21, metrics=["kl_ref"])])
    page = report(run)
    assert page.all("path", "found") == []
    assert "not_finite step 21" in page.text


def test_a_standard_error_is_a_band(tmp_path: Path) -> None:
    rows = [{"step": s, "eval_score": 0.5, "eval_score_se": 0.1, "odd_se": 1.0, "kl_ref": None} for s in (1, 2, 3)]
    rows[1] |= {"kl_ref_se": 0.1, "eval_score_se": None}
    series = read_stage(write_run(tmp_path, rows)).series
    assert series["eval_score_low"] == [(1, pytest.approx(0.304)), (2, None), (3, pytest.approx(0.304))]
    assert series["eval_score_high"][0] == (1, pytest.approx(0.696))
    assert series["kl_ref_low"] == [(2, None)]
    assert "odd_se" in series
    assert "eval_score_se" not in series
    page = report(tmp_path)
    assert len(page.all("path", "band")) == 1


GRPO = [
    "score",
    "reward",
    "response_length",
    "ended",
    "length_corr",
    "engine_gap",
    "kl_ref",
    "kl_coef",
    "zero_spread",
    "engine_gap_max",
    "correction",
    "policy_loss",
    "clip_frac",
    "kl_old",
    "ratio",
    "entropy",
    "kl_loss",
    "grad_norm",
    "first_ratio",
    "updates",
    "lr",
    "sampling_rounds",
    "score/length",
    "score/mentions",
    "disagreement",
    "eval_score",
    "eval_ended",
    "eval_length",
    "eval_kl_ref",
    "eval_ref_nll",
    "eval_gold",
    "rollout_tokens_per_s",
    "score_tokens_per_s",
    "update_tokens_per_s",
]
PPO = [*GRPO, "explained_variance", "value_loss", "value_clip_frac", "critic_grad_norm", "critic_lr", "ptx_loss"]
PREFER = [
    "loss",
    "accuracy",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "logp_chosen",
    "logp_rejected",
    "kl",
    "grad_norm",
    "lr",
]


@pytest.mark.parametrize(("kind", "keys"), [("grpo", GRPO), ("ppo", PPO), ("prefer", [*PREFER, "eval_loss"])])
def test_every_metric_of_the_trainers_has_its_panel(kind: str, keys: list[str]) -> None:
    groups = panels_of(kind, keys)
    assert "Other" not in [title for title, _ in groups]
    assert sorted(key for _, panels in groups for panel in panels for key in panel.keys) == sorted(keys)


def test_parts_of_the_score_share_a_panel_under_their_own_names() -> None:
    (parts,) = [panel for _, panels in panels_of("grpo", GRPO) for panel in panels if panel.prefix]
    assert parts.series == {"score/length": "length", "score/mentions": "mentions"}


def test_settings_name_the_kind_of_the_new_stages(tmp_path: Path) -> None:
    for kind, title in (("prefer", "Preference tuning"), ("grpo", "GRPO")):
        run = write_run(tmp_path / f"my-{kind}", [{"step": 1, "loss": 1.0}], config=f"[{kind}]\nsteps = 1\n")
        assert f"{title} · my-{kind}" in report(run).text
