"""A finding reads the same wherever it comes from."""

from kinkajou.findings import Finding, passed
from kinkajou.train.diagnosis import step_finding


def test_cause_evidence_and_action() -> None:
    assert str(Finding("cut", "sequences are long", "3 of 9", "raise --max_len", "note")) == (
        "note: cut: sequences are long\n  seen: 3 of 9\n  do:   raise --max_len"
    )
    assert str(step_finding("lr_zero", "nothing is trained", {"lr": 0.0, "in": "x"}, "set --lr", step=7)) == (
        "warning: lr_zero at step 7: nothing is trained\n  seen: lr 0, in x\n  do:   set --lr"
    )
    assert Finding("name", "cause", "", "action").details == "do:   action"


def test_what_is_well_has_no_cause() -> None:
    found = passed("cut", "all 9 fit")
    assert (found.level, found.cause, found.evidence, found.action) == ("ok", "", "all 9 fit", "")
