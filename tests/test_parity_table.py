"""The parity table: its measure, the formulas retyped in `benchmarks/`, and TRL itself where it is installed."""

import pytest
import torch
from benchmarks.layout import LONGEST, Layout, draw_answers, draw_prompts

from benchmarks import against_retyped, cases, ours, parity, peers, table
from kinkajou.algos import losses

RETYPED = against_retyped.rows()


def test_the_measure() -> None:
    theirs = torch.tensor([2.0, -4.0])
    assert table.difference(theirs, theirs) == 0
    assert table.difference(torch.tensor([2.0, -4.004]), theirs) == pytest.approx(1e-3, rel=1e-3)
    assert table.difference(torch.tensor([2.0, float("nan")]), theirs) == float("inf")
    assert table.difference(torch.zeros(2), torch.zeros(2)) == 0
    assert table.difference(torch.ones(2), torch.zeros(2)) == float("inf")
    assert table.difference(torch.tensor(0.1), torch.tensor(0.0), size=torch.tensor(10.0)) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="shapes differ"):
        table.difference(torch.ones(2), torch.ones(2, 1))


def test_a_row_beyond_its_bound_says_so() -> None:
    row = table.Row("g", "n", "--loss x", "TRL", 1e-7, 2e-6)
    assert (row.worst, row.verdict) == (2e-6, table.FAIL)
    assert "DIFFERS" in table.markdown([row])
    assert table.Row("g", "n", "--loss x", "TRL", 1e-7, 2e-6, tolerance=1e-5).verdict == table.PASS


@pytest.mark.parametrize("row", RETYPED, ids=lambda row: f"{row.group}: {row.name}")
def test_openrlhf_and_verl(row: table.Row) -> None:
    assert row.verdict == table.PASS, row


def test_a_changed_formula_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dual clip that is 1e-4 off, and only there."""
    real = losses.clipped_objective

    def wrong(*args: object, dual_clip: float = 0.0, **kwargs: object) -> torch.Tensor:
        return real(*args, dual_clip=dual_clip * (1 + 1e-4), **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(losses, "clipped_objective", wrong)
    found = {row.name: row.verdict for row in against_retyped.policy_rows(against_retyped.OPENRLHF)}
    assert found["PPO policy loss, dual clip 3"] == table.FAIL
    assert found["PPO policy loss"] == table.PASS


def test_a_wrong_dialect_is_found() -> None:
    """verl's group deviation has 1e-6 where TRL has 1e-4."""
    x = cases.policy_tensors()
    case = next(case for case in cases.LOSSES if case.name == "GRPO, KL k3 in the loss, ratio-weighted")
    leaf = x["logp"].clone().requires_grad_()
    mine, other = (ours.policy(case, x, leaf, dialect) for dialect in ("trl-1.12", "verl-2026.01"))
    assert table.difference(other, mine) > table.TOLERANCE


def test_the_layouts_agree() -> None:
    prompts, answers = draw_prompts(), draw_answers()
    layout = Layout(prompts, answers)
    tokens = layout.answers(layout.batch.tokens[:, 1:])
    for row, answer in zip(tokens, answers, strict=True):
        assert row[: len(answer)].tolist() == answer
    x = torch.arange(1.0, len(prompts) * LONGEST + 1).view(len(prompts), LONGEST)
    back = layout.answers(layout.placed(x, layout.batch.mask.shape[1]) * layout.batch.mask)
    assert torch.equal(back, x * layout.within())


def test_the_table_goes_between_its_markers() -> None:
    page = f"before\n{parity.BEGIN}\nold\n{parity.END}\nafter\n"
    text = parity.inserted(page, "| new |\n")
    assert text.startswith("before\n")
    assert text.endswith(f"| new |\n{parity.END}\nafter\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="has no line"):
        parity.inserted("nothing", "")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(peers.installed, peers.VERSIONS)), reason="TRL is not there: python -m benchmarks.peers install"
)
def test_trl() -> None:
    """TRL's own code, in processes of its own."""
    rows = parity.all_rows()
    assert len(rows) > 100
    assert [row for row in rows if row.verdict != table.PASS] == []
