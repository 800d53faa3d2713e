"""Where a metric is shown: its panel, its name in a sentence, its band."""

from collections.abc import Iterable
from dataclasses import replace

from kinkajou.report.panels import ANY, GROUPS, Groups, Panel

STAGE_TITLES = {
    "sft": "Supervised tuning",
    "reward": "Reward model",
    "prefer": "Preference tuning",
    "preference": "Preference tuning",
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "ppo": "PPO",
}


def panels_of(kind: str, keys: Iterable[str]) -> Groups:
    """The groups of panels that show every key once; those nobody knows come last, under "Other".

    `eval_x` joins the panel of `x`; `x_low` and `x_high` are the band of `x` and get no panel.
    """
    left = list(keys)
    left = [key for key in left if not _is_band(key, left)]
    groups: Groups = []
    for title, panels in GROUPS.get(kind, ANY):
        shown = [_present(entry, left) for entry in panels]
        shown = [entry for entry in shown if entry.series]
        taken = {key for entry in shown for key in entry.keys}
        left = [key for key in left if key not in taken]
        if shown:
            groups.append((title, shown))
    other = []
    while left:
        key = left[0]
        base = key.removeprefix("eval_")
        entry = _present(Panel(title=base, unit="", read="", series={base: "training"}, known=False), left)
        left = [key for key in left if key not in entry.series]
        other.append(entry)
    return [*groups, ("Other", other)] if other else groups


def title_of(kind: str, key: str) -> str:
    """What a reader calls this metric, in a sentence."""
    if key == "eval_gold":
        return "truth"
    for _, panels in panels_of(kind, [key]):
        for entry in panels:
            held_out = "held-out " if key.startswith("eval_") else ""
            return held_out + entry.title.lower() if entry.known else key
    return key


def band_of(key: str) -> tuple[str, str]:
    """The keys of the band around a metric."""
    return f"{key}_low", f"{key}_high"


def _is_band(key: str, keys: list[str]) -> bool:
    base = key.removesuffix("_low").removesuffix("_high")
    return base != key and base in keys and all(edge in keys for edge in band_of(base))


def _present(entry: Panel, keys: list[str]) -> Panel:
    series: dict[str, str] = {}
    for key, name in entry.series.items():
        if key in keys:
            series[key] = name
        twin = f"eval_{key}"
        if twin in keys and twin not in entry.series:
            series[twin] = "held-out"
    if entry.prefix:
        series |= {key: key.removeprefix(entry.prefix) for key in keys if key.startswith(entry.prefix)}
    return replace(entry, series=series)
