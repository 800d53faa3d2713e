"""Curves as inline SVG that stretches to any width while its text keeps its size.

A chart is three drawings side by side: y labels, plot, x labels. Only the plot is stretched, and nothing
needs a style attribute, so the page can forbid them.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kinkajou.report.folder import Points
from kinkajou.report.scale import log_ticks, nice_ticks, robust, tick_labels, value_range

WIDTH = 2000  # of the plot, in drawing units; enough for half a pixel on a wide screen
UNITS_PER_PIXEL = 4  # in height
MAX_POINTS = 400
SMOOTH_POINTS = 150
MAX_DOTS = 60
LABEL_WIDTH = 46


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series as it is drawn. `role` is a class of the style sheet: train, held, second or third."""

    name: str
    role: str
    points: Points
    low: Points = field(default_factory=list)
    high: Points = field(default_factory=list)
    dotted: bool = False

    @property
    def values(self) -> list[float]:
        """All finite values, in order."""
        return [value for _, value in self.points if value is not None]

    @property
    def num_gaps(self) -> int:
        """At how many steps the run wrote null."""
        return len(self.points) - len(self.values)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The coordinate system of one chart: steps to drawing units, values to drawing units."""

    first: int
    last: int
    low: float
    high: float
    height: int  # in pixels
    log: bool = False

    def x(self, step: float) -> int:
        """Drawing units from the left edge; a single step sits in the middle."""
        if self.last == self.first:
            return WIDTH // 2
        return round(WIDTH * (step - self.first) / (self.last - self.first))

    def y(self, value: float) -> int:
        """Drawing units from the top, held inside the plot."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = math.log(max(value, self.low))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.height * UNITS_PER_PIXEL * (1 - share))

    @property
    def y_ticks(self) -> list[float]:
        """Four or so round values inside the axis."""
        if self.log:
            return log_ticks(self.low, self.high)
        return nice_ticks(self.low, self.high, most=max(3, self.height // 22))

    @property
    def x_ticks(self) -> list[int]:
        """Whole steps only."""
        ticks = nice_ticks(self.first, self.last, most=5)
        return [int(tick) for tick in ticks if tick == int(tick)]


def frame(
    lines: Sequence[Line],
    steps: tuple[int, int],
    *,
    height: int,
    include: Sequence[float] = (),
    min_span: float = 0.0,
    may_be_log: bool = False,
) -> Frame | None:
    """The axes that hold these lines and their bands, or None where no line has a finite value."""
    sets = [values for line in lines if (values := line.values)]
    if not sets:
        return None
    every = [value for values in sets for value in values]
    edges = [value for line in lines for _, value in [*line.low, *line.high] if value is not None]
    medians = [sorted(values)[len(values) // 2] for values in sets]
    if may_be_log and min(every) > 0 and max(medians) > 8 * min(medians):
        low, high = value_range([math.log(value) for value in every])
        return Frame(first=steps[0], last=steps[1], low=math.exp(low), high=math.exp(high), height=height, log=True)
    low, high = value_range(every, include=[*include, *edges], min_span=min_span)
    return Frame(first=steps[0], last=steps[1], low=low, high=high, height=height)


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` finite points: both ends, and the lowest and highest of each bucket between."""
    if len(points) <= most:
        return list(points)
    inner, buckets = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for index in range(buckets):
        bucket = inner[index * len(inner) // buckets : (index + 1) * len(inner) // buckets]
        finite = [(value, step) for step, value in bucket if value is not None]
        chosen = {(step, value) for value, step in (min(finite), max(finite))} if finite else set[tuple[int, float]]()
        gap = next((step for step, value in bucket if value is None), None)
        kept += sorted(chosen, key=lambda point: point[0])
        if gap is not None:
            kept.append((gap, None))
    return sorted([*kept, points[-1]], key=lambda point: point[0])


def is_noisy(points: Points) -> bool:
    """Whether the eye needs a smoothed line: steps up and down add up to many times the range."""
    values = [value for _, value in points if value is not None]
    if len(values) < 24:
        return False
    low, high = robust(values)
    values = [min(high, max(low, value)) for value in values]
    travel = sum(abs(b - a) for a, b in itertools.pairwise(values))
    return high - low > 1e-9 * max(abs(low), abs(high)) and travel > 4 * (high - low)


def smooth(points: Points) -> Points:
    """A straight line fitted around each step, over a tenth of the run, twice (Cleveland 1979).

    A plain moving average would start below a falling curve. Far outliers count as the edge of the rest.
    """
    finite = [(step, value) for step, value in points if value is not None]
    low, high = robust([value for _, value in finite])
    values = [min(high, max(low, value)) for _, value in finite]
    values = _fitted(_fitted(values))
    stride = max(1, len(values) // SMOOTH_POINTS)
    kept = {
        step: value
        for index, ((step, _), value) in enumerate(zip(finite, values, strict=True))
        if index % stride == 0 or index == len(values) - 1
    }
    return [(step, kept.get(step)) for step, value in points if value is None or step in kept]


def _fitted(values: list[float]) -> list[float]:
    count = len(values)
    width = min(count, 2 * max(2, count // 20) + 1)
    sums, moments = [0.0], [0.0]
    for index, value in enumerate(values):
        sums.append(sums[-1] + value)
        moments.append(moments[-1] + index * value)
    fitted = []
    for index in range(count):
        # At the ends the window stays full and looks to one side, or the line would follow the last noise.
        start = min(max(0, index - width // 2), count - width)
        stop, centre = start + width, start + (width - 1) / 2
        mean = (sums[stop] - sums[start]) / width
        spread = (width * width - 1) / 12
        slope = ((moments[stop] - moments[start]) / width - centre * mean) / spread if spread else 0.0
        fitted.append(mean + slope * (index - centre))
    return fitted


def path(points: Points, on: Frame) -> str:
    """Path data in whole relative units, the shortest form; a gap (None) lifts the pen."""
    parts: list[str] = []
    pen: tuple[int, int] | None = None
    for step, value in points:
        if value is None:
            pen = None
            continue
        x, y = on.x(step), on.y(value)
        if pen is None:
            # The line of no length shows a point between two gaps as a dot.
            parts.append(f"M{x} {y}h0")
        else:
            dx, dy = x - pen[0], y - pen[1]
            parts.append(f"l{dx}{'' if dy < 0 else ' '}{dy}")
        pen = (x, y)
    return "".join(parts)


def chart(
    lines: Sequence[Line],
    on: Frame,
    *,
    label: str,
    reference: tuple[float, str] | None = None,
    mark: int | None = None,
    said: str = "",
    found: Sequence[int] = (),
) -> str:
    """The drawings of one chart. `label` (for those who hear it) and other texts must be escaped.

    `reference` is a value to compare with and its name; `mark` a step with a vertical line, `said` its name;
    `found` are steps with a red one.
    """
    bottom = on.height * UNITS_PER_PIXEL
    drawn = [_rule(on, tick, "zero" if tick == 0 else "grid") for tick in on.y_ticks]
    notes = ""
    if mark is not None:
        x = on.x(mark)
        if said:
            drawn.insert(0, f'<path class="after" d="M{x} 0H{WIDTH}V{bottom}H{x}z"/>')
            side = ' class="right" dx="-6"' if x > WIDTH * 0.8 else ' dx="6"'
            notes += f'<text x="{100 * x / WIDTH:.4g}%" y="11"{side}>{said}</text>'
        drawn.append(_stroke("mark", f"M{x} 0v{bottom}"))
    if reference is not None and on.low <= reference[0] <= on.high:
        drawn.append(_rule(on, reference[0], "reference"))
        y = on.y(reference[0]) / UNITS_PER_PIXEL
        notes += f'<text class="right" x="100%" y="{y - 4 if y > 16 else y + 12:g}">{reference[1]}</text>'
    drawn += [_stroke("found", f"M{on.x(step)} 0v{bottom}") for step in found]
    for line in lines:
        drawn += _drawn(line, on)
    plot = (
        f'<svg class="plot" role="img" aria-label="{label}" preserveAspectRatio="none" height="{on.height}" '
        f'viewBox="0 0 {WIDTH} {bottom}">{"".join(drawn)}</svg>'
    )
    over = f'<svg class="notes" height="{on.height}" aria-hidden="true">{notes}</svg>' if notes else ""
    return f'<div class="chart">{_y_labels(on)}<div class="area">{plot}{over}</div>{_x_labels(on)}</div>'


def _drawn(line: Line, on: Frame) -> list[str]:
    raw = thin(line.points)
    drawn = []
    if line.low and line.high:
        edge = [*thin(line.high), *reversed(thin(line.low))]
        drawn.append(f'<path class="band {line.role}" d="{path([p for p in edge if p[1] is not None], on)}z"/>')
    if is_noisy(line.points) and not line.dotted:
        drawn.append(_stroke(f"raw {line.role}", path(raw, on)))
        drawn.append(_stroke(f"line {line.role}", path(smooth(line.points), on)))
    else:
        drawn.append(_stroke(f"line {line.role}", path(raw, on)))
    if len(line.values) == 1 or (line.dotted and len(raw) <= MAX_DOTS):
        dots = [f"M{on.x(step)} {on.y(value)}h0" for step, value in raw if value is not None]
        drawn.append(_stroke(f"dots {line.role}", "".join(dots)))
    lost = [f"M{on.x(step)} {on.height * UNITS_PER_PIXEL}v-{7 * UNITS_PER_PIXEL}" for step, v in raw if v is None]
    if lost:
        drawn.append(_stroke("lost", "".join(lost)))
    return drawn


def _stroke(role: str, data: str) -> str:
    return f'<path class="{role}" d="{data}"/>'


def _rule(on: Frame, value: float, role: str) -> str:
    return _stroke(role, f"M0 {on.y(value)}h{WIDTH}")


def _y_labels(on: Frame) -> str:
    ticks = on.y_ticks
    texts = [
        f'<text x="{LABEL_WIDTH - 6}" y="{on.y(tick) / UNITS_PER_PIXEL + 3.5:g}">{text}</text>'
        for tick, text in zip(ticks, tick_labels(ticks, log=on.log), strict=True)
    ]
    return f'<svg class="ylabels" width="{LABEL_WIDTH}" height="{on.height}">{"".join(texts)}</svg>'


def _x_labels(on: Frame) -> str:
    alone = on.first == on.last
    texts = [f'<text x="{50 if alone else 0}%" y="12" class="{"" if alone else "left"}">step {on.first:,}</text>']
    ticks = on.x_ticks
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        share = 100 * on.x(tick) / WIDTH
        # The first label needs its room; the last is pulled inside, or it would leave a phone's screen.
        if share > 24 and not alone:
            texts.append(f'<text x="{share:.4g}%" y="12"{" class=right" if share > 95 else ""}>{text}</text>')
    return f'<svg class="xlabels" height="16">{"".join(texts)}</svg>'
