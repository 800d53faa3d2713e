"""Before a process group is made all ranks say that they are there and what they are, so that faults have names.

A restarted run meets in the same table as the one before it, whose words still stand there.  So rank 0 opens a
numbered round, and a rank counts as heard only when rank 0 has answered its own nonce.
"""

import json
import os
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from kinkajou import __version__
from kinkajou.errors import UserError
from kinkajou.parallel import nodes
from kinkajou.parallel.nodes import Place
from kinkajou.parallel.store import POLL_S

LONGEST = 4096
"""Bytes of a rank's hello."""
GRACE_S = 5.0
"""How long rank 0 stays to say why there is no run."""
ROUNDS = "kinkajou/rounds"


@dataclass(frozen=True)
class Hello:
    rank: int
    group: int
    host: str
    address: str
    """Of the interface that it uses; empty where a user's own setting stands."""
    pid: int
    started: str
    """When its process began: with the number, which process it is."""
    kinkajou: str
    torch: str
    fault: str
    """Why this rank cannot take part, for the others to say; empty where it can."""
    nonce: str


@dataclass(frozen=True)
class Roll:
    """Who takes part in this round, by rank, and the table that is theirs."""

    store: Store
    place: Place
    ranks: Mapping[int, Hello]


ROLL: ContextVar[Roll | None] = ContextVar("ROLL", default=None)
"""Who takes part in this process's run."""


def hello(place: Place, *, address: str = "", fault: str = "") -> Hello:
    return Hello(
        rank=place.rank,
        group=place.group,
        host=nodes.own_name(),
        address=address,
        pid=os.getpid(),
        started=nodes.started(os.getpid()),
        kinkajou=__version__,
        torch=str(torch.__version__),
        fault=fault[:1024],
        nonce=secrets.token_hex(8),
    )


def meet(store: Store, place: Place, own: Hello, *, main: str, timeout_s: float) -> Roll:
    """Waits until every rank has said hello, or says which has not.  `main` names the machine of rank 0."""
    try:
        if place.rank == 0:
            return call(store, place, own, timeout_s=timeout_s)
        return answer(store, place, own, main=main, timeout_s=timeout_s)
    except dist.DistError as fault:
        raise UserError(
            f"the machine of rank 0 ended during the start: {main}",
            evidence=str(fault).splitlines()[0],
            fix="its own output says why",
        ) from None


def call(store: Store, place: Place, own: Hello, *, timeout_s: float) -> Roll:
    """Rank 0: a new round, whose ranks are heard one after the other, and the verdict for all."""
    desk = Desk(PrefixStore(f"kinkajou/{store.add(ROUNDS, 1)}", store), own)
    deadline, fault, awaited = time.monotonic() + timeout_s, stopped(own), place.world
    while fault is None and len(desk.heard) < place.world:
        fault = desk.hear()
        if fault is None and time.monotonic() > deadline and len(desk.heard) < place.world:
            fault, awaited = absent(place, desk.heard, timeout_s), len(desk.heard)
    desk.tell(fault)
    if fault:
        desk.dismiss(awaited - 1, min(GRACE_S, timeout_s))
        raise fault
    return Roll(desk.table, place, desk.heard)


class Desk:
    """Where rank 0 takes down who has come."""

    def __init__(self, table: Store, own: Hello) -> None:
        self.table, self.own, self.heard, self.read = table, own, {own.rank: own}, 0

    def hear(self) -> UserError | None:
        """The next hello, or a short pause; a fault if that rank cannot take part."""
        if self.read == self.table.add("said", 0):
            time.sleep(POLL_S)
            return None
        self.read += 1
        one = parsed(self.table.get(f"hello/{self.read}"))
        fault = stopped(one) or differs(self.own, one) or twice(self.heard.get(one.rank), one)
        self.heard[one.rank] = one
        self.table.set(f"heard/{one.nonce}", "")
        return fault

    def tell(self, fault: UserError | None) -> None:
        words = {"problem": fault.problem, "evidence": fault.evidence, "fix": fault.fix} if fault else {}
        ranks = [asdict(one) for one in self.heard.values()]
        self.table.set("verdict", json.dumps({"fault": words, "ranks": ranks}))

    def dismiss(self, others: int, grace_s: float) -> None:
        """Stays a little, for the table may end with this process: until the others have read the verdict."""
        deadline = time.monotonic() + grace_s
        while self.table.add("told", 0) < others and time.monotonic() < deadline:
            self.hear()


def answer(store: Store, place: Place, own: Hello, *, main: str, timeout_s: float) -> Roll:
    """Every other rank: says hello in the newest round until rank 0 has heard it, then takes the verdict."""
    deadline, number, table = time.monotonic() + timeout_s, 0, store
    while not (number and table.check([f"heard/{own.nonce}"])):
        newest = store.add(ROUNDS, 0)
        if newest != number:
            number, table = newest, PrefixStore(f"kinkajou/{newest}", store)
            table.set(f"hello/{table.add('said', 1)}", json.dumps(asdict(own)))
        if time.monotonic() > deadline:
            raise silent(main, timeout_s)
        time.sleep(POLL_S)
    # Rank 0 may have begun later than this one, and waits as long.
    deadline = time.monotonic() + timeout_s + GRACE_S
    while not table.check(["verdict"]):
        if time.monotonic() > deadline:
            raise silent(main, timeout_s)
        time.sleep(POLL_S)
    verdict = json.loads(table.get("verdict")[: LONGEST * (place.world + 1)])
    if verdict["fault"]:
        table.add("told", 1)
        raise UserError(**verdict["fault"])
    return Roll(table, place, {one["rank"]: Hello(**one) for one in verdict["ranks"]})


def parsed(words: bytes) -> Hello:
    """A hello as it came over the network."""
    try:
        found = json.loads(words) if len(words) <= LONGEST else {}
        one = Hello(**{field.name: field.type(found[field.name]) for field in fields(Hello)})  # type: ignore[operator]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            "a process that is not a rank of this run spoke at the meeting point",
            evidence=repr(words[:80]),
            fix="another program may use the port: give torchrun another --master_port (or --rdzv_endpoint HOST:PORT)",
        ) from None
    return one


def stopped(one: Hello) -> UserError | None:
    if not one.fault:
        return None
    return UserError(f"rank {one.rank} on {one.host} cannot start", evidence=one.fault, fix="its own output says more")


def differs(own: Hello, one: Hello) -> UserError | None:
    if (own.kinkajou, own.torch) == (one.kinkajou, one.torch):
        return None
    return UserError(
        "the processes run different versions",
        evidence=f"rank {own.rank} on {own.host}: kinkajou {own.kinkajou}, torch {own.torch}; "
        f"rank {one.rank} on {one.host}: kinkajou {one.kinkajou}, torch {one.torch}",
        fix="install the same versions on every node",
    )


def twice(before: Hello | None, one: Hello) -> UserError | None:
    if before is None:
        return None
    return UserError(
        f"two processes say that they are rank {one.rank}",
        evidence=f"on {before.host} (pid {before.pid}) and on {one.host} (pid {one.pid})",
        fix="give each node its own --node_rank, or use another port for each run",
    )


def absent(place: Place, heard: Mapping[int, Hello], timeout_s: float) -> UserError:
    hosts = {rank: one.host for rank, one in heard.items()}
    groups = {rank: one.group for rank, one in heard.items()}
    who = nodes.missing(place, hosts, groups, nodes.expected())
    return UserError(
        f"not all processes have come up: no word from {who}",
        evidence=f"{len(heard)} of {place.world} within {timeout_s:g} s; "
        f"{len(set(hosts.values()))} machine(s) answered: {', '.join(sorted(set(hosts.values()))[:8])}",
        fix="on the missing machine: is torchrun started with this run's address and port, can it reach this machine "
        "over --interface, is something else on its GPU? A slow disk may need a longer --start_timeout_s",
    )


def silent(main: str, timeout_s: float) -> UserError:
    return UserError(
        f"no word from rank 0 on {main}",
        evidence=f"{nodes.own_name()} waited {timeout_s:g} s",
        fix=f"its output on {main} says why; a slow disk may need a longer --start_timeout_s",
    )
