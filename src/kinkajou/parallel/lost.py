"""Which rank was lost, when a collective fails because a process or a machine has gone or hangs."""

import json
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch.distributed as dist

from kinkajou.errors import UserError
from kinkajou.parallel.nodes import is_stopped, numbered, own_name, started
from kinkajou.parallel.rollcall import ROLL, Hello, Roll
from kinkajou.parallel.store import POLL_S
from kinkajou.parallel.watch import ASKED, PEER_LOST, alive, ended, last_words, leave_soon, tell
from kinkajou.parallel.whereabouts import LONGEST, Where, dump, place_of

SEARCH_S = 3.0
"""How long the survivors wait for a sign of each other."""
LEAVE_S = 1.5
"""Then the process is gone, whatever still holds it."""


@dataclass
class Found:
    """What a search has seen."""

    ended: list[int] = field(default_factory=list)
    """Ranks of this machine whose process has gone: that is certain."""
    silent: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    """Of these, the ones of this machine that a signal or a debugger has stopped."""
    answers: dict[int, Where] = field(default_factory=dict)
    words: dict[int, str] = field(default_factory=dict)
    """What ranks that have ended had to say."""

    @property
    def late(self) -> list[int]:
        """Ranks that live, and are elsewhere than at something that all do together."""
        return [rank for rank, where in self.answers.items() if not where.waits]


def named(fault: Exception) -> UserError | None:
    """What a user should read of a fault in a collective; None for any other."""
    roll, words = ROLL.get(), str(fault).partition("\n")[0]
    if roll is None or not (isinstance(fault, dist.DistError) or "/gloo/" in words or different(fault)):
        return None
    if threading.current_thread() is threading.main_thread():
        # torchrun ends all ranks when one has failed, often before the others have said what they saw.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    where = place_of([(f.filename, f.name, f.lineno or 0) for f in reversed(traceback.extract_tb(fault.__traceback__))])
    dump(roll.place.rank)
    if different(fault):
        return unequal(fault, where)
    said = re.sub(r"^\[[^\]]*\] *", "", words).partition(". This is typically")[0]
    found = search(roll, said)
    end_silent(roll, found.silent)
    end = told(roll, found, where, said)
    leave_soon(LEAVE_S, end)
    return end


def unequal(fault: Exception, where: Where) -> UserError:
    return UserError(
        f"the processes do not call the same collective, at {where.words()}",
        evidence=different(fault),
        fix="a fault of Kinkajou, or different code or data on the machines",
        exit_code=PEER_LOST,
    )


def told(roll: Roll, found: Found, where: Where, said: str) -> UserError:
    gone = found.ended or found.silent or found.late
    who = "; ".join(f"{numbered(ranks)} on {host}" for host, ranks in by_host(roll, gone).items()) or "another rank"
    verb = "lost" if found.ended else "no sign of" if found.silent or not found.late else "waited in vain for"
    evidence = [f"rank {roll.place.rank} on {own_name()}, {where.words()}: {said}"]
    evidence += [f"the process of rank {rank} is stopped" for rank in found.stopped if rank in gone]
    evidence += [f"rank {rank} was at {found.answers[rank].words()}" for rank in gone if rank in found.answers]
    evidence += [f"rank {rank} said: {found.words[rank]}" for rank in gone if rank in found.words]
    fix = "its own output says why (none: often killed for want of memory); "
    if not found.ended:
        fix = "if it is only slow, raise --collective_timeout_s; stacks-rank-*.txt in the output show who was where; "
    return UserError(
        f"{verb} {who} at {where.words()}",
        evidence="; ".join(evidence),
        fix=fix + "torchrun --max_restarts=3 starts all ranks again by itself, from the last checkpoint",
        exit_code=PEER_LOST,
    )


def different(fault: Exception) -> str:
    """What PyTorch says where TORCH_DISTRIBUTED_DEBUG=DETAIL has found ranks at different collectives."""
    return " ".join(str(fault).split())[:600] if "mismatch between collectives" in str(fault) else ""


def search(roll: Roll, said: str) -> Found:
    """Asks all ranks for a sign; only processes of this machine can be seen to end."""
    others = [one for rank, one in roll.ranks.items() if rank != roll.place.rank]
    here, deadline, found = own_name(), time.monotonic() + SEARCH_S, Found()
    silent: list[Hello] = others
    try:
        roll.store.set(ASKED, "")
        tell(roll.store, roll.place.rank, waits=True)
        while time.monotonic() < deadline:
            silent = [one for one in silent if not roll.store.check([alive(one.rank)])]
            found.ended = [one.rank for one in others if one.host == here and ended(one)]
            if found.ended or all(one.host == here and is_stopped(one.pid) for one in silent):
                break
            time.sleep(POLL_S)
        there = [one.rank for one in others if one not in silent and one.rank not in found.ended]
        found.answers = {rank: parsed(roll.store.get(alive(rank))) for rank in there}
        found.words = heard(roll, found.ended)
    except dist.DistError:  # the table has gone with its machine
        return Found(ended=[0])
    peer = re.search(r"\[([\d.a-f:]+)\]:\d+", said)
    near = [one.rank for one in silent if peer and one.address == peer[1] and one.host != here]
    found.silent = near or [one.rank for one in silent]
    found.stopped = [one.rank for one in silent if one.host == here and is_stopped(one.pid)]
    return found


def heard(roll: Roll, ended: Collection[int]) -> dict[int, str]:
    keys = {rank: last_words(rank) for rank in ended}
    said = {rank: roll.store.get(key) for rank, key in keys.items() if roll.store.check([key])}
    return {rank: words[:LONGEST].decode("utf-8", "replace") for rank, words in said.items() if words}


def parsed(words: bytes) -> Where:
    """Another process's answer, as it came over the network."""
    try:
        found = json.loads(words[: 4 * LONGEST])
        return Where(str(found["step"])[:LONGEST], str(found["call"])[:LONGEST], bool(found["waits"]))
    except (ValueError, TypeError, KeyError):
        return Where("a place it did not name", "an answer that cannot be read", True)


def end_silent(roll: Roll, ranks: Collection[int]) -> None:
    """Kills processes of this machine that hang or are stopped: torchrun would wait half a minute for them."""
    for one in (roll.ranks[rank] for rank in ranks):
        if one.host == own_name() and one.started and one.started == started(one.pid):
            with suppress(ProcessLookupError, PermissionError):  # it has gone, or another has its number: nothing to do
                os.kill(one.pid, signal.SIGKILL)


def by_host(roll: Roll, ranks: Collection[int]) -> Mapping[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank in ranks:
        found.setdefault(roll.ranks[rank].host, []).append(rank)
    return found


def said_last(fault: Exception) -> None:
    """Leaves word of why this process ends, for those who will miss it."""
    if roll := ROLL.get():
        with suppress(dist.DistError):  # the table has gone: nobody is left to read it
            roll.store.set(last_words(roll.place.rank), str(getattr(fault, "problem", repr(fault)))[:LONGEST])
