"""A thread beside the training of each rank: answers where it is, and ends a process whose peers or parent have gone.

A rank that computes would not see before its next collective that another one was killed; one that waits would see
nothing of a torchrun that was.
"""

import atexit
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from kinkajou.errors import UserError
from kinkajou.parallel.nodes import has_ended, numbered, own_name, started
from kinkajou.parallel.rollcall import Hello, Roll
from kinkajou.parallel.store import POLL_S
from kinkajou.parallel.whereabouts import dump, here

TICK_S = 0.5
GRACE_S = 5.0
"""How long a rank may take to notice by itself that another has gone."""
ASKED = "asked"
PEER_LOST = 5


def ended(one: Hello) -> bool:
    """A process of this machine; another one may have got its number since."""
    return has_ended(one.pid) or started(one.pid) != one.started


def alive(rank: int) -> str:
    return f"alive/{rank}"


def last_words(rank: int) -> str:
    return f"words/{rank}"


def left(rank: int) -> str:
    return f"left/{rank}"


def tell(table: Store, rank: int, *, waits: bool | None = None) -> None:
    where = here() if waits is None else replace(here(), waits=waits)
    table.set(alive(rank), json.dumps(asdict(where)))


class Watch:
    def __init__(self, roll: Roll) -> None:
        self.roll, self.table, self.own = roll, roll.store.clone(), roll.place.rank  # type: ignore[attr-defined]
        self.here = [one for one in roll.ranks.values() if one.rank != self.own and one.host == own_name()]
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.told = False
        self.leavers: set[int] = set()
        self.gone_since: float | None = None
        self.leaving: tuple[float, UserError] | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)

    def start(self) -> None:
        self.thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """At an orderly end, whatever the exit code: from now on nobody need miss this process."""
        self.over.set()
        self.thread.join(GRACE_S)
        until = time.monotonic() + 3 * TICK_S
        with suppress(dist.DistError):  # rank 0 may have gone before, and the table with it
            self.table.set(left(self.own), "")
            # The table may end with rank 0, so the others shall have read of it.
            while self.own == 0 and self.missed_by() and time.monotonic() < until:
                self.see_leavers()
                time.sleep(POLL_S)

    def missed_by(self) -> bool:
        return not self.leaving and any(one.rank not in self.leavers and not ended(one) for one in self.here)

    def run(self) -> None:
        while not self.over.wait(TICK_S):
            self.look_up()
            with suppress(dist.DistError):  # the table has gone: what is known of the others stays as it was
                self.answer()
                self.see_leavers()
            self.look_around()
            if self.leaving and time.monotonic() > self.leaving[0]:
                end_with(self.leaving[1])

    def answer(self) -> None:
        if not self.told and self.table.check([ASKED]):
            self.told = True
            tell(self.table, self.own)
            dump(self.own)

    def see_leavers(self) -> None:
        self.leavers |= {one.rank for one in self.here if self.table.check([left(one.rank)])}

    def look_up(self) -> None:
        """A torchrun that was killed leaves its ranks behind: they save and go, as if it had asked them to."""
        if self.parent is not None and os.getppid() != self.parent:
            self.parent = None
            os.kill(os.getpid(), signal.SIGTERM)

    def look_around(self) -> None:
        """Processes of this machine that were killed while this one computes."""
        gone = [one.rank for one in self.here if one.rank not in self.leavers and ended(one)]
        if not gone or self.leaving:
            return
        self.gone_since = self.gone_since or time.monotonic()
        if time.monotonic() > self.gone_since + GRACE_S:
            dump(self.own)
            busy = f"rank {self.own} had not come to a collective since; it was at {here().words()}"
            said = f"its process has ended; {busy}"
            end_with(UserError(f"lost {numbered(gone)} on {own_name()}", evidence=said, exit_code=PEER_LOST))


def end_with(fault: UserError) -> None:
    print(fault, file=sys.stderr, flush=True)
    os._exit(fault.exit_code)


_watch: Watch | None = None


def begin(roll: Roll) -> None:
    global _watch
    _watch = Watch(roll)
    _watch.start()


def leave_soon(seconds: float, fault: UserError) -> None:
    """The process ends by then, also where a thread or a child still holds it."""
    if _watch:
        _watch.leaving = (time.monotonic() + seconds, fault)
