"""docs/growth.md and its pictures, from saved figures; every sentence is read off them."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.drawing import Line, Panel, figure
from benchmarks.growth_points import ADAM_BYTES, Measured, Point, from_row

DOCS = Path(__file__).resolve().parents[1] / "docs"
MB = 2**20
Pair = tuple[Point, Measured]
COMMAND = """    setsid --wait bash -c 'echo -20 > /proc/self/autogroup; exec nice -n -20 "$@"' _ \\
        python -m benchmarks.growth --out benchmarks/results/growth.json --write"""


@dataclass(frozen=True)
class Straight:
    """y = start + slope x, by least squares of relative errors."""

    start: float
    slope: float
    worst: float
    """Largest relative distance of a point."""

    def at(self, x: float) -> float:
        return self.start + self.slope * x


def straight(points: Sequence[tuple[float, float]]) -> Straight:
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    both = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True))
    slope = both / spread
    start = y_mean - slope * x_mean
    return Straight(start, slope, max(abs(start + slope * x - y) / y for x, y in points))


def times(pairs: Sequence[Pair], dtype: str = "fp32") -> list[tuple[float, float]]:
    """Microseconds per token by x."""
    return [(point.x, measured.us_per_token) for point, measured in pairs if point.dtype == dtype]


def memory(pairs: Sequence[Pair], dtype: str = "fp32") -> list[tuple[float, float]]:
    """MB beyond the libraries by x."""
    return [(point.x, measured.own_bytes / MB) for point, measured in pairs if point.dtype == dtype]


def state(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """MB of weights, gradients and AdamW's moments by x."""
    return [(p.x, ADAM_BYTES * m.parameters / MB) for p, m in pairs if p.dtype == "fp32"]


def with_logits(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """MB of the state and, as float32, of one copy of all logits."""
    known = [p for p, _ in pairs if p.dtype == "fp32"]
    logits = [p.rows * p.length * p.vocabulary * 4 / MB for p in known]
    return [(x, held + extra) for (x, held), extra in zip(state(pairs), logits, strict=True)]


def change(points: Sequence[tuple[float, float]], unit: str) -> str:
    """From the first to the last point, in words."""
    (_, first), (_, last) = points[0], points[-1]
    if abs(last / first - 1) < 0.1:
        return f"stays within 10 % ({first:,.0f} and {last:,.0f} {unit})"
    return f"goes from {first:,.0f} to {last:,.0f} {unit} ({last / first:.2g}-fold)"


def about_length(pairs: Sequence[Pair]) -> str:
    line, peaks = straight(times(pairs)), [y for _, y in memory(pairs)]
    tokens = pairs[0][0].rows * pairs[0][0].length
    equal = f"{line.start / line.slope:,.0f}" if line.slope > 0 else "more than were measured"
    return (
        f"In fp32 time per token {change(times(pairs), 'us')}; it is a + b x length with a = {line.start:,.0f} us and "
        f"b = {1000 * line.slope:,.1f} ns (worst point {line.worst:.0%} off), so attention's quadratic part costs as "
        f"much as all the rest at {equal} tokens. The memory of {tokens:,} packed tokens lies between "
        f"{min(peaks):,.0f} and {max(peaks):,.0f} MB, however they are cut into sequences."
    )


def about_vocabulary(pairs: Sequence[Pair]) -> str:
    line, held = straight(times(pairs)), state(pairs)
    beyond = [own - kept for (_, own), (_, kept) in zip(memory(pairs), held, strict=True)]
    logits = with_logits(pairs)[-1][1] - held[-1][1]
    return (
        f"In fp32 time per token {change(times(pairs), 'us')}, a straight line to within {line.worst:.0%}: "
        f"{10000 * line.slope:,.0f} us for each 10,000 entries, which is the head's products. Beyond weights, "
        f"gradients and AdamW's moments a step needs {beyond[0]:,.0f} MB at the smallest and {beyond[-1]:,.0f} MB at "
        f"the largest vocabulary; one copy of all its logits alone would be {logits:,.0f} MB there."
    )


def about_batch(pairs: Sequence[Pair]) -> str:
    line, found = straight(memory(pairs)), times(pairs)
    best = min(y for _, y in found)
    enough = next(x for x, y in found if y < 1.1 * best)
    return (
        f"Time per token {change(found, 'us')}, and from {enough:,.0f} tokens on it is within 10 % of the best; "
        f"memory is a straight line to within {line.worst:.0%}: {line.start:,.0f} MB and "
        f"{1000 * line.slope:,.0f} MB for every 1,000 tokens of a micro-batch."
    )


def about_group(pairs: Sequence[Pair]) -> str:
    length, new = pairs[0][0].length, pairs[0][0].new
    return (
        f"With a prompt of {length} tokens and answers of {new}, time per new token {change(times(pairs), 'us')}: the "
        f"prompt is run once for its group, and what remains is decoding. Memory {change(memory(pairs), 'MB')}."
    )


def about_slots(pairs: Sequence[Pair]) -> str:
    found = times(pairs)
    rate = 1e6 / found[-1][1]
    half = next(x for x, y in found if y <= 2 * found[-1][1])
    return (
        f"Time per token {change(found, 'us')}, which is {rate:,.0f} tokens/s at the end: a step reads all weights "
        f"once for all its rows, and from {half:g} slots on it is within twice the best. Memory "
        f"{change(memory(pairs), 'MB')}."
    )


@dataclass(frozen=True)
class Curve:
    title: str
    x_name: str
    work: str
    sentence: Callable[[Sequence[Pair]], str]
    log_x: bool = True


CURVES = {
    "length": Curve(
        "Sequence length",
        "tokens of a sequence",
        "One SFT step over {step:,} tokens, in one micro-batch.",
        about_length,
    ),
    "vocabulary": Curve(
        "Vocabulary",
        "entries of the vocabulary",
        "One SFT step over {step:,} tokens, all of them targets; head and embedding are tied.",
        about_vocabulary,
        log_x=False,
    ),
    "batch": Curve(
        "Batch", "tokens of a micro-batch", "One SFT step over {step:,} tokens in sequences of {length}.", about_batch
    ),
    "group": Curve("Group size", "samples of a prompt", "{rows} samples at once.", about_group),
    "slots": Curve(
        "Slots", "samples that run at once", "Twice as many samples as slots, {new} tokens each.", about_slots
    ),
}


def picture(name: str, pairs: Sequence[Pair]) -> str:
    curve = CURVES[name]
    dtypes = list(dict.fromkeys(point.dtype for point, _ in pairs))
    time_lines = [Line(dtype, times(pairs, dtype)) for dtype in dtypes]
    memory_lines = [Line(dtype, memory(pairs, dtype)) for dtype in dtypes]
    if name == "length":
        line, xs = straight(times(pairs)), [x for x, _ in times(pairs)]
        steps = [xs[0] * (xs[-1] / xs[0]) ** (i / 40) for i in range(41)]
        time_lines.append(Line("a + b x", [(x, line.at(x)) for x in steps], computed=True))
    if name == "vocabulary":
        memory_lines.append(Line("state", state(pairs), computed=True))
        memory_lines.append(Line("+ logits", with_logits(pairs), computed=True))
    what = "new token" if pairs[0][0].new else "token"
    return figure(
        [
            Panel(f"Time, us per {what}", curve.x_name, time_lines, curve.log_x),
            Panel("Memory beyond the libraries, MB", curve.x_name, memory_lines, curve.log_x),
        ]
    )


def table(name: str, pairs: Sequence[Pair]) -> str:
    dtypes = list(dict.fromkeys(point.dtype for point, _ in pairs))
    head = [CURVES[name].x_name, *(f"{dtype}, us" for dtype in dtypes), *(f"{dtype}, MB" for dtype in dtypes)]
    rows = [head, ["---:"] * len(head)]
    columns = [times(pairs, dtype) for dtype in dtypes] + [memory(pairs, dtype) for dtype in dtypes]
    for i, (x, _) in enumerate(columns[0]):
        rows.append([f"{x:,.0f}", *(f"{column[i][1]:,.0f}" for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def section(name: str, pairs: Sequence[Pair]) -> str:
    curve, first = CURVES[name], pairs[0][0]
    work = curve.work.format(step=first.rows * first.length, rows=first.rows, length=first.length, new=first.new)
    image = f"![{curve.title}: time and memory](images/growth-{name}.svg)"
    return f"## {curve.title}\n\n{filled(f'{work} {curve.sentence(pairs)}')}\n\n{image}\n\n{table(name, pairs)}"


def filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 118)


def page(found: dict[str, Any], curves: dict[str, list[Pair]]) -> str:
    m, settings = found["machine"], found["settings"]
    libraries = fmean(measured.start_bytes for pairs in curves.values() for _, measured in pairs) / MB
    shown = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if name != "kinkajou")
    about = (
        f"Ours alone, on a LLaMA of 4 layers of 256 (vocabulary 8,192 unless said), {settings['threads']} CPU cores. "
        f"Each point is a process of its own: one step that is not timed, then the median of {settings['repetitions']} "
        f"(or fewer, where they are long). Memory is the peak of the resident set, less the {libraries:,.0f} MB that "
        "the process holds once its libraries are imported."
    )
    measured = (
        f"Measured {found['when'][:10]} at commit {found['commit']} on {m['cpu']} ({m['memory_gb']:.0f} GB), {shown}; "
        f"scheduling priority {settings['priority']}. Run it on a quiet machine, with raised priority:"
    )
    parts = ["# How time and memory grow", filled(about), filled(measured), COMMAND]
    return "\n\n".join([*parts, *(section(name, pairs) for name, pairs in curves.items())]) + "\n"


def write(found: dict[str, Any], docs: Path = DOCS) -> None:
    pairs = [from_row(row) for row in found["points"]]
    curves = {name: [pair for pair in pairs if pair[0].curve == name] for name in CURVES}
    (docs / "images").mkdir(parents=True, exist_ok=True)
    for name, points in curves.items():
        (docs / "images" / f"growth-{name}.svg").write_text(picture(name, points), encoding="utf-8")
    (docs / "growth.md").write_text(page(found, curves), encoding="utf-8")
