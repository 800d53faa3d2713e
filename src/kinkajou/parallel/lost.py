"""Which rank was lost, when a collective fails because a process or a machine has gone."""

import re
import signal
import threading
import time
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from kinkajou.errors import UserError
from kinkajou.parallel.nodes import numbered, own_name
from kinkajou.parallel.rollcall import ROLL, Hello, Roll
from kinkajou.parallel.store import POLL_S

SEARCH_S = 5.0
"""How long the survivors wait for a sign of each other."""


def named(fault: RuntimeError) -> UserError | None:
    """What a user should read of a fault in a collective; None for any other."""
    roll, words = ROLL.get(), str(fault).partition("\n")[0]
    if roll is None or not (isinstance(fault, dist.DistError) or "/gloo/" in words):
        return None
    if threading.current_thread() is threading.main_thread():
        # torchrun ends all ranks when one has failed, often before the others have said what they saw.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    said = re.sub(r"^\[[^\]]*\] *", "", words).partition(". This is typically")[0]
    gone, sure = search(roll, said)
    who = "; ".join(f"{numbered(ranks)} on {host}" for host, ranks in by_host(roll, gone).items()) or "another rank"
    return UserError(
        f"lost {who}" if sure else f"no sign of {who}",
        evidence=f"rank {roll.place.rank} on {own_name()}: {said}",
        fix="its own output says why (none: often killed for want of memory); "
        "torchrun --max_restarts=3 starts all ranks again by itself",
        exit_code=1,
    )


def search(roll: Roll, said: str) -> tuple[list[int], bool]:
    """Ranks that are gone, and whether that is certain: only processes of this machine can be seen to end."""
    others = [one for rank, one in roll.ranks.items() if rank != roll.place.rank]
    here, deadline = own_name(), time.monotonic() + SEARCH_S
    silent: list[Hello] = others
    try:
        roll.store.set(f"alive/{roll.place.rank}", "")
        while time.monotonic() < deadline:
            silent = [one for one in silent if not roll.store.check([f"alive/{one.rank}"])]
            if ended := [one.rank for one in silent if one.host == here and has_ended(one.pid)]:
                return ended, True
            if not silent:
                break
            time.sleep(POLL_S)
    except dist.DistError:  # the table has gone with its machine
        return [0], True
    peer = re.search(r"\[([\d.a-f:]+)\]:\d+", said)
    there = [one.rank for one in silent if peer and one.address == peer[1]]
    return there or [one.rank for one in silent], False


def has_ended(pid: int) -> bool:
    """Also one whose parent has not yet asked for its exit code.  Without /proc nothing is known."""
    if not Path("/proc/self/stat").exists():
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def by_host(roll: Roll, ranks: Collection[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank in ranks:
        found.setdefault(roll.ranks[rank].host, []).append(rank)
    return found
