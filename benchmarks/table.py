"""Rows of the parity table, and how far two tensors are apart."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

TOLERANCE, THROUGH_MODELS = 1e-6, 1e-5
"""On the same tensors; and where each side runs its own forward and backward pass, whose rounding differs."""
PASS, FAIL = "equal", "DIFFERS"


@dataclass(frozen=True)
class Row:
    """One comparison: largest relative differences of the value and, where there is one, of the gradient."""

    group: str
    name: str
    ours: str  # the settings or function on our side
    reference: str  # framework and version
    value: float
    gradient: float | None = None
    tolerance: float = TOLERANCE

    @property
    def worst(self) -> float:
        return max(self.value, self.gradient or 0.0)

    @property
    def verdict(self) -> str:
        return PASS if self.worst <= self.tolerance else FAIL


def difference(ours: Tensor, theirs: Tensor, size: Tensor | None = None) -> float:
    """Largest absolute difference over the largest absolute entry of theirs (or over `size`); 0 if both are all 0."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}")
    gap = (ours.detach().double() - theirs.detach().double()).abs().max().item()
    scale = (theirs if size is None else size).detach().double().abs().max().item()
    if gap != gap or scale != scale:
        return float("inf")  # NaN on either side
    return gap / scale if scale else float("inf") if gap else 0.0


def worst(cases: Iterable[tuple[Tensor, ...]]) -> float:
    return max(difference(*case) for case in cases)


def shown(flags: dict[str, Any]) -> str:
    """Settings as they stand on a command line."""

    def word(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return " ".join(f"--{name} {word(value)}" for name, value in flags.items())


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| | what | kinkajou | reference | value | gradient | bound | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gradient = "" if row.gradient is None else f"{row.gradient:.0e}"
        numbers = [f"{row.value:.0e}", gradient, f"{row.tolerance:.0e}"]
        cells = [row.group, row.name, f"`{row.ours}`", row.reference, *numbers, row.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) | {"verdict": row.verdict} for row in rows]
