"""Curves for the documents: small SVG files that need nothing beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kinkajou.report.scale import nice_ticks, tick_labels

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 62, 40, 44
COLOURS = {"fp32": "#1d4ed8", "bf16": "#c2410c"}
GREY = "#6b7280"


@dataclass(frozen=True)
class Line:
    """Points from left to right; a `computed` line is dashed and has no dots."""

    name: str
    points: list[tuple[float, float]]
    computed: bool = False

    @property
    def colour(self) -> str:
        return COLOURS.get(self.name, GREY)


@dataclass(frozen=True)
class Panel:
    title: str
    x_name: str
    lines: list[Line]
    log_x: bool = True


@dataclass(frozen=True)
class Axes:
    """Values to places in a panel; y starts at 0."""

    low: float
    high: float
    top: float
    log_x: bool

    @classmethod
    def around(cls, panel: Panel) -> "Axes":
        xs = [x for line in panel.lines for x, _ in line.points]
        top = 1.06 * max(y for line in panel.lines for _, y in line.points)
        return cls(min(xs) if panel.log_x else 0.0, max(xs), top, panel.log_x)

    def x(self, value: float) -> float:
        low, high, at = ((math.log(v) if self.log_x else v) for v in (self.low, self.high, value))
        return LEFT + (WIDTH - LEFT - RIGHT) * ((at - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self.top

    def x_ticks(self, panel: Panel) -> list[float]:
        """The measured places themselves where x is logarithmic, as many as have room."""
        if not self.log_x:
            return nice_ticks(self.low, self.high, most=6)
        places = sorted({x for line in panel.lines if not line.computed for x, _ in line.points})
        return places[:: math.ceil(len(places) / 7)]


def text(x: float, y: float, words: str, *, anchor: str = "middle", colour: str = "#374151", size: int = 11) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-size="{size}">{escape(words)}</text>'


def path(points: Sequence[tuple[float, float]], colour: str, style: str) -> str:
    data = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="{data}" fill="none" stroke="{colour}" {style}/>'


def grid(panel: Panel, axes: Axes) -> list[str]:
    drawn = [text(LEFT - 40, 20, panel.title, anchor="start", colour="#111827", size=13)]
    ticks = nice_ticks(0.0, axes.top, most=6)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        edge = [(float(LEFT), axes.y(tick)), (float(WIDTH - RIGHT), axes.y(tick))]
        drawn.append(path(edge, "#9ca3af" if tick == 0 else "#e5e7eb", 'stroke-width="1"'))
        drawn.append(text(LEFT - 7, axes.y(tick) + 4, label, anchor="end"))
    for tick in axes.x_ticks(panel):
        drawn.append(text(axes.x(tick), HEIGHT - BOTTOM + 16, short(tick)))
    drawn.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, panel.x_name, colour=GREY))
    return drawn


def short(number: float) -> str:
    """512, 8k, 250k."""
    return f"{number:g}" if number < 1000 else f"{number / (1024 if number % 1024 == 0 else 1000):.0f}k"


def end_labels(lines: Sequence[Line], axes: Axes) -> list[str]:
    """Each line's name at its right end, moved apart where two would touch."""
    wanted = sorted(((axes.y(line.points[-1][1]), line) for line in lines), key=lambda pair: pair[0])
    drawn, last = [], -math.inf
    for y, line in wanted:
        last = max(y + 4, last + 13)
        drawn.append(text(WIDTH - RIGHT + 7, last, line.name, anchor="start", colour=line.colour))
    return drawn


def draw(panel: Panel) -> str:
    axes = Axes.around(panel)
    drawn = grid(panel, axes)
    for line in panel.lines:
        points = [(axes.x(x), axes.y(y)) for x, y in line.points]
        style = 'stroke-width="1.5" stroke-dasharray="4 4"' if line.computed else 'stroke-width="2"'
        drawn.append(path(points, line.colour, style))
        if not line.computed:
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in points]
    return "".join([*drawn, *end_labels(panel.lines, axes)])


def figure(panels: Sequence[Panel]) -> str:
    """Panels side by side on white, so that the picture reads the same on a dark page."""
    width = WIDTH * len(panels)
    parts = [f'<g transform="translate({i * WIDTH} 0)">{draw(panel)}</g>' for i, panel in enumerate(panels)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="system-ui, sans-serif"><rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>'
        f"{''.join(parts)}</svg>\n"
    )
