"""Axis ranges, ticks at nice numbers, and numbers in readable form."""

import itertools
import math
from collections.abc import Sequence


def nice_ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    if not high > low:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    for power in (exponent, exponent + 1):
        for factor in (1, 2, 5):
            # Whole numbers are divided at the end, so that 3 * 0.1 prints as 0.3.
            unit, divisor = (factor * 10**power, 1) if power >= 0 else (factor, 10**-power)
            start, stop = math.ceil(low * divisor / unit - 1e-9), math.floor(high * divisor / unit + 1e-9)
            if stop - start < most:
                return [index * unit / divisor for index in range(start, stop + 1)]
    return [low, high]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high] > 0, joined by 2 and 5 times those where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: max(1, len(ticks) // 4)]
    return ticks or [low]


def tick_labels(ticks: Sequence[float], *, log: bool = False) -> list[str]:
    """The ticks of one axis, all with the same number of decimals and the same unit (k, M, G)."""
    if log:
        return [f"{tick:g}" if 1e-3 <= tick < 1 else readable(tick) for tick in ticks]
    biggest = max((abs(tick) for tick in ticks), default=0.0)
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    gap = min(gaps, default=biggest) or 1.0
    if 0 < biggest < 1e-3 or biggest >= 1e12:
        return [_scientific(tick) for tick in ticks]
    unit, suffix = next(
        ((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if biggest >= 10 * u or biggest >= u > 1e3),
        (1.0, ""),
    )
    decimals = min(6, max(0, -math.floor(math.log10(gap / unit) + 1e-9)))
    return [_minus(f"{tick / unit:,.{decimals}f}{suffix}") if tick else "0" for tick in ticks]


def readable(value: float) -> str:
    """Four significant digits, three decimals, thousands apart, powers of ten only where needed."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        return _scientific(value)
    if size >= 1e6:
        return _minus(f"{value / 1e6:.4g}M")
    if size >= 1e3:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.4g}" if size >= 1 or size < 0.01 else f"{value:.3f}")


def column(values: Sequence[float]) -> list[str]:
    """The numbers of one table column, with equal decimals where their sizes allow."""
    if any(value and not 1e-3 <= abs(value) < 1e4 for value in values):
        return [readable(value) for value in values]
    decimals = max(len(f"{value:.4g}".partition(".")[2]) for value in values) if values else 0
    most = 3 if any(abs(value) >= 0.01 for value in values) else 5
    return [_minus(f"{value:,.{min(decimals, most)}f}") for value in values]


def duration(seconds: float) -> str:
    """38 s, 4 min 12 s, 2 h 05 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 or whole == seconds else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def value_range(
    values: Sequence[float], *, include: Sequence[float] = (), min_span: float = 0.0
) -> tuple[float, float]:
    """The range of an axis: the values with some air, but never a noise of 1e-6 blown up to full height.

    Far outliers are left outside (see `robust`); `include` are numbers that must be on the axis.
    """
    low, high = robust(values)
    floor, ceiling = min([low, *include]), max([high, *include])
    middle, span = (floor + ceiling) / 2, ceiling - floor
    if span == 0 and middle == 0 and not min_span:
        return (0.0, 1.0) if include else (-0.5, 0.5)
    least = max(min_span, abs(middle) * (0.1 if span == 0 and not min_span else 1e-5), 1e-30)
    if span <= least:
        return middle - least / 2, middle + least / 2
    air = 0.07 * span
    return (floor if floor < low else floor - air), (ceiling if ceiling > high else ceiling + air)


def robust(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, without the few that lie more than four spreads outside the rest."""
    ordered = sorted(values)
    if len(ordered) < 20:
        return ordered[0], ordered[-1]
    # One value in fifty, but at least one, may be an outlier.
    cut = max(1, len(ordered) // 50)
    low, high = ordered[cut], ordered[-1 - cut]
    reach = 4 * (high - low)
    if reach == 0:
        return ordered[0], ordered[-1]
    inside = [value for value in ordered if low - reach <= value <= high + reach]
    return inside[0], inside[-1]


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return _minus(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
