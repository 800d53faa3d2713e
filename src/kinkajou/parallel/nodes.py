"""Which machines a run should have, and which ranks are on them."""

import os
import re
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def own_name() -> str:
    """As Slurm calls this machine, for its list has those names; else as it calls itself."""
    return (os.environ.get("SLURMD_NODENAME") or socket.gethostname())[:255]


def fields_of(pid: int) -> list[str]:
    """The kernel's line on a process, from its state on; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def started(pid: int) -> str:
    """When a process began, in the kernel's ticks: numbers of processes are used again.  Empty where nobody tells."""
    return (fields_of(pid)[19:20] or [""])[0]


def has_ended(pid: int) -> bool:
    """Also one whose parent has not yet asked for its exit code.  Without /proc nothing is known."""
    if not Path("/proc/self/stat").exists():
        return False
    return (fields_of(pid) or ["X"])[0] in "ZX"


def is_stopped(pid: int) -> bool:
    """By a signal or a debugger."""
    return (fields_of(pid) or ["?"])[0] in "Tt"


def short(host: str) -> str:
    """A name without its domain; an address stays whole."""
    return host if re.fullmatch(r"[\d.]+|.*:.*", host) else host.partition(".")[0].lower()


def missing(place: Place, hosts: Mapping[int, str], groups: Mapping[int, int], nodes: Sequence[str]) -> str:
    """Ranks that have not said hello, with the names of their nodes as far as they can be known.

    `hosts` and `groups` hold the host name and node number of each rank that did.
    """
    absent = [rank for rank in range(place.world) if rank not in hosts]
    if place.world % place.local:
        return numbered(absent)
    seen = {groups[rank]: host for rank, host in hosts.items()}
    partly = {group: [rank for rank in absent if rank // place.local == group] for group in sorted(seen)}
    said = [f"{numbered(ranks)} on {seen[group]}" for group, ranks in partly.items() if ranks]
    unseen = [rank for rank in absent if rank // place.local not in seen]
    if unseen:
        silent = not_among(hosts.values(), nodes)
        if len(silent) == len(nodes) and len(nodes) * place.local == place.world:
            # No machine calls itself as the list does: then the order of the list is all there is.
            silent = [nodes[group] for group in sorted({rank // place.local for rank in unseen})]
        said.append(f"{numbered(unseen)} on {', '.join(silent)}" if silent else numbered(unseen))
    return "; ".join(said)


def not_among(hosts: Iterable[str], nodes: Sequence[str]) -> list[str]:
    there = {short(host) for host in hosts}
    return [node for node in nodes if short(node) not in there]


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
