"""A reward model's health on the terminal."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kinkajou.evals.reward_findings import told, told_r
from kinkajou.evals.reward_health import Calibration, Feature, Health, Length, Subset
from kinkajou.evals.reward_scores import Stability
from kinkajou.evals.statistics import Correlation, Share
from kinkajou.findings import Finding

SUBSETS_SHOWN = 20
BAR = 20


def page(health: Health, stability: Stability, found: Sequence[Finding]) -> Iterator[RenderableType]:
    """What is printed, one block after another."""
    yield headline(health)
    yield calibration_block(health.calibration)
    yield length_block(health.length)
    yield feature_block(health.features)
    if health.subsets:
        yield subset_block(health.subsets)
    yield stability_block(stability)
    yield from finding_blocks(found)


def block(title: str, rows: Iterable[Sequence[str | Text]], *columns: str, note: str = "") -> RenderableType:
    """A title over a table: the first column is words, the others are numbers.  80 columns are enough."""
    made = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(columns), header_style="underline")
    for number in range(max(len(columns), 2)):
        name = columns[number] if columns else ""
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return Group(Text(title, style="bold"), made, Text(f"{note}\n" if note else "", style="dim"))


def headline(health: Health) -> RenderableType:
    found = health.calibration
    rows = [("accuracy", told(health.accuracy))]
    if health.ties:
        rows.append(("ties, which count half", f"{health.ties:,}"))
    rows += [
        ("margin, mean and standard deviation", f"{health.margin:.3f}, {health.margin_deviation:.3f}"),
        ("score, mean and standard deviation", f"{health.score:.3f}, {health.score_deviation:.3f}"),
        ("log-loss in nats a pair (a coin: 0.693)", f"{found.log_loss:.3f}"),
        ("Brier score (a coin: 0.25)", f"{found.brier:.3f}"),
        (f"calibration error (a calibrated model: {found.noise:.3f})", f"{found.error:.3f}"),
    ]
    if found.temperature is not None:
        rows.append(("temperature with the least log-loss", f"{found.temperature:.3g}"))
    return block(f"{health.accuracy.count:,} held-out pairs", rows)


def calibration_block(found: Calibration) -> RenderableType:
    rows = [
        (
            f"{row.low:.2f} to {row.high:.2f}",
            f"{row.observed.count:,}",
            f"{row.confidence:.3f}",
            f"{row.observed.value:.3f}",
            interval(row.observed),
            bar(row.confidence, row.observed.value),
        )
        for row in found.bins
        if row.confidence is not None and row.observed.value is not None
    ]
    title = "Calibration: how often people prefer the answer that the model prefers"
    return block(title, rows, "confidence", "pairs", "mean", "observed", "95 %", "# observed, | predicted")


def bar(predicted: float, observed: float) -> str:
    """Observed as a bar over [0, 1], with a mark where it was predicted."""
    filled, mark = round(observed * BAR), min(BAR - 1, round(predicted * BAR))
    cells = ["#" if i < filled else " " for i in range(BAR)]
    cells[mark] = "|"
    return "".join(cells)


def interval(share: Share) -> str:
    return f"{share.low:.2f} to {share.high:.2f}"


def length_block(found: Length) -> RenderableType:
    correlations = {
        "score and tokens, over all answers": found.answers,
        "score and tokens, within pairs": found.within,
        "people's choice and tokens, within pairs": found.people,
    }
    shares = {
        'accuracy of "the longer is better"': found.longer_wins,
        "model prefers the longer": found.model_prefers_longer,
        "people prefer the longer": found.people_prefer_longer,
        "accuracy where the chosen is longer": found.accuracy_if_chosen_longer,
        "accuracy where the chosen is shorter": found.accuracy_if_chosen_shorter,
    }
    rows = [(name, told_r(r), f"{r.count:,}") for name, r in correlations.items()]
    rows += [(name, told(part), f"{part.count:,}") for name, part in shares.items()]
    title = f"Length: {found.mean_chosen:.0f} tokens chosen, {found.mean_rejected:.0f} rejected"
    return block(title, rows, "correlation or share", "value", "pairs")


def feature_block(features: Sequence[Feature]) -> RenderableType:
    def value(r: Correlation) -> str:
        return "-" if r.value is None or r.count < 4 else f"{r.value:+.2f}"

    rows = [
        (
            found.name,
            f"{found.model.count:,}",
            value(found.model),
            f"{found.model.low:+.2f} to {found.model.high:+.2f}" if found.model.count > 3 else "-",
            value(found.beyond_length),
            value(found.people),
        )
        for found in features
    ]
    title = "Format: correlation with what the two answers differ in"
    return block(title, rows, "feature", "pairs", "score", "95 %", "at equal length", "people's choice")


def subset_block(subsets: Sequence[Subset]) -> RenderableType:
    most = sorted(subsets, key=lambda part: -part.accuracy.count)
    left = len(most) - SUBSETS_SHOWN
    rows = [
        (
            Text(part.name[:24]),
            f"{part.accuracy.count:,}",
            "-" if part.accuracy.value is None else f"{part.accuracy.value:.3f}",
            interval(part.accuracy),
            f"{part.margin:.3f}",
            f"{part.log_loss:.3f}",
            "-" if part.longer_wins.value is None else f"{part.longer_wins.value:.3f}",
        )
        for part in most[:SUBSETS_SHOWN]
    ]
    columns = ("subset", "pairs", "accuracy", "95 %", "margin", "log-loss", "longer wins")
    return block("Subsets", rows, *columns, note=f"{left} smaller ones: see --output" if left > 0 else "")


def stability_block(found: Stability) -> RenderableType:
    rows = [
        ("with extra padding", f"{found.padded:.2g}"),
        ("together in one batch", f"{found.together:.2g}"),
        ("together in reversed order", f"{found.reversed:.2g}"),
    ]
    return block(f"Largest change of a score, {found.count} answers, against each alone", rows)


def finding_blocks(found: Sequence[Finding]) -> Iterator[RenderableType]:
    """Sentences as they are: what users wrote may stand in them."""
    if not found:
        yield Text("No findings.", style="green")
    for item in found:
        yield Text(item.heading, style="yellow")
        yield Padding(Text(item.details), (0, 0, 0, 2), expand=False)
