"""Diagnosis during the run: each step's metrics pass named checks; what they find is said once and counted after."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kinkajou.config.findings import ANY, FINDINGS
from kinkajou.findings import Finding
from kinkajou.train.checks import CHECKS, Sign
from kinkajou.train.history import History


@dataclass(frozen=True, kw_only=True)
class StepFinding(Finding):
    """What one step's numbers say. `seen` counts the steps that said so, this one included."""

    step: int
    numbers: Mapping[str, float | str]  # the evidence one by one
    metrics: tuple[str, ...] = ()
    seen: int = 1

    @property
    def heading(self) -> str:
        return f"{self.level}: {self.name} at step {self.step}: {self.cause}"

    @property
    def line(self) -> dict[str, Any]:
        """As it stands in findings.jsonl."""
        return {
            "step": self.step,
            "name": self.name,
            "level": self.level,
            "cause": self.cause,
            "evidence": {name: x if isinstance(x, str) else float(f"{x:.6g}") for name, x in self.numbers.items()},
            "action": self.action,
            "metrics": list(self.metrics),
            "seen": self.seen,
        }


def step_finding(
    name: str, cause: str, numbers: Mapping[str, float | str], action: str, *, step: int, **more: Any
) -> StepFinding:
    """With the numbers as its evidence."""
    evidence = ", ".join(f"{name} {x if isinstance(x, str) else f'{x:.4g}'}" for name, x in numbers.items())
    return StepFinding(name, cause, evidence, action, step=step, numbers=numbers, **more)


@dataclass
class Record:
    """What is known of one name: its first and last finding, and what was written of it."""

    first: StepFinding
    last: StepFinding
    written: int = 0  # `seen` of its newest line in findings.jsonl


class Diagnosis:
    """A function of the rows alone: the same rows give the same findings, on every rank and after a resume."""

    def __init__(self, *, bf16: bool) -> None:
        self.bf16, self.history, self.records = bf16, History(), dict[str, Record]()

    def observe(self, step: int, row: Mapping[str, Any]) -> list[StepFinding]:
        """Everything that this row and those before it show."""
        numbers = {name: float(x) for name, x in row.items() if isinstance(x, int | float)}
        self.history.add(step, numbers)
        return [self._found(name, sign) for name in CHECKS if (sign := self._sign(name))]

    def _sign(self, name: str) -> Sign | None:
        kind = FINDINGS[name]
        needed = kind.metrics[:1] if name == "grad_spike" else kind.metrics
        if not self.history.has(*needed) or any(self.history.count(metric) < kind.after for metric in needed):
            return None
        return CHECKS[name](self.history, kind, kind.bound(bf16=self.bf16))

    def _found(self, name: str, sign: Sign) -> StepFinding:
        kind, record = FINDINGS[name], self.records.get(name)
        seen = record.last.seen + 1 if record else 1
        metrics = sign.metrics or kind.metrics
        step = self.history.step
        finding = step_finding(name, kind.cause, sign.evidence, kind.action, step=step, metrics=metrics, seen=seen)
        self.records.setdefault(name, Record(finding, finding)).last = finding
        return finding

    def due(self, finding: StepFinding) -> bool:
        """Whether it deserves a line: the first, and then each time that the count has doubled."""
        record = self.records[finding.name]
        if finding.seen < 2 * record.written:
            return False
        record.written = finding.seen
        return True

    def unwritten(self) -> list[StepFinding]:
        """The newest of each name whose count has grown since its last line."""
        return [record.last for record in self.records.values() if record.last.seen > record.written]

    def summary(self) -> str:
        """One line on all of them; empty without any."""
        said = [
            f"{name} (step {record.first.step}" + (f", {record.last.seen} times)" if record.last.seen > 1 else ")")
            for name, record in self.records.items()
        ]
        return f"findings: {', '.join(said)}; findings.jsonl and docs/diagnosis.md say more" if said else ""


def stops(finding: StepFinding, stop_on: tuple[str, ...]) -> bool:
    return finding.name in stop_on or ANY in stop_on
