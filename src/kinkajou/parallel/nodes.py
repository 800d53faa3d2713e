"""Which machines a run should have, and which ranks are on them."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MOST_NODES = 100_000


@dataclass(frozen=True)
class Place:
    """Where a rank is: `group` is the number of its node, `local` the number of ranks there."""

    rank: int
    world: int
    group: int
    local: int


def expected() -> list[str]:
    """Names of the nodes, from KINKAJOU_HOSTS (comma list) or Slurm; empty where nobody has told."""
    return expand(os.environ.get("KINKAJOU_HOSTS") or os.environ.get("SLURM_JOB_NODELIST") or "")


def expand(words: str) -> list[str]:
    """`a,node[01-03,07]` -> a, node01, node02, node03, node07."""
    found: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", words):
        found += expand_one(word.strip())[: MOST_NODES - len(found)]
    return found


def expand_one(word: str) -> list[str]:
    inner = re.match(r"([^\[]*)\[([^\]]*)\](.*)", word)
    if inner is None:
        return [word] if word else []
    head, ranges, tail = inner.groups()
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            numbers.append(part.strip())
            continue
        end = min(int(last or first), int(first) + MOST_NODES)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), end + 1)]
    return [f"{head}{number}{rest}" for number in numbers for rest in (expand_one(tail) or [""])]


def short(host: str) -> str:
    """A name without its domain; an address stays whole."""
    return host if re.fullmatch(r"[\d.]+|.*:.*", host) else host.partition(".")[0].lower()


def missing(place: Place, hosts: Mapping[int, str], groups: Mapping[int, int], nodes: Sequence[str]) -> str:
    """Ranks that have not said hello, with the names of their nodes as far as they can be known.

    `hosts` and `groups` hold the host name and node number of each rank that did.
    """
    absent = [rank for rank in range(place.world) if rank not in hosts]
    name_of = {groups[rank]: host for rank, host in hosts.items()}
    even = place.world % place.local == 0
    by_group: dict[int | None, list[int]] = {}
    for rank in absent:
        by_group.setdefault(rank // place.local if even else None, []).append(rank)
    there = {short(host) for host in hosts.values()}
    silent = [node for node in nodes if short(node) not in there]
    said: list[str] = []
    for group, ranks in by_group.items():
        if group is not None and group in name_of:
            said.append(f"{numbered(ranks)} on {name_of[group]}")
    unknown = [rank for group, ranks in by_group.items() if group not in name_of for rank in ranks]
    if unknown:
        where = f" on {', '.join(silent)}" if silent else ""
        said.append(f"{numbered(unknown)}{where}")
    return "; ".join(said)


def numbered(ranks: Collection[int]) -> str:
    """`rank 3`, `ranks 0, 2, 4-7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"
