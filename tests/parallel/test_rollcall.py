"""The roll call, in threads of one process: who is missing, broken, foreign or of another version is named."""

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from kinkajou.errors import UserError
from kinkajou.parallel import rollcall
from kinkajou.parallel.nodes import Place
from kinkajou.parallel.rollcall import Hello, Roll
from kinkajou.parallel.store import host_store, join_store

Outcome = Roll | UserError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "GRACE_S", 1.0)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.setenv("KINKAJOU_HOSTS", "n0,n1")


@pytest.fixture
def port() -> Iterator[int]:
    """Where a table listens that outlives its runs, as torchrun's does."""
    number = free_port()
    table = host_store("127.0.0.1", number, 5.0)
    yield number
    del table


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def a_hello(rank: int, **changes: object) -> Hello:
    """Two ranks on each machine, n0 and n1."""
    place = Place(rank=rank, world=4, group=rank // 2, local=2)
    plain = dataclasses.replace(rollcall.hello(place), host=f"n{rank // 2}")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def start(port: int, one: Hello, found: dict[int, Outcome], timeout_s: float) -> threading.Thread:
    def run() -> None:
        place = Place(rank=one.rank, world=4, group=one.group, local=2)
        try:
            store = join_store("127.0.0.1", port, timeout_s)
            found[one.rank] = rollcall.meet(store, place, one, main="n0", timeout_s=timeout_s)
        except UserError as fault:
            found[one.rank] = fault

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def meeting(port: int, hellos: Sequence[Hello], timeout_s: float = 5.0) -> dict[int, Outcome]:
    found: dict[int, Outcome] = {}
    for thread in [start(port, one, found, timeout_s) for one in hellos]:
        thread.join(30)
    return found


def said(outcome: Outcome) -> str:
    assert isinstance(outcome, UserError)
    return str(outcome)


def test_all_know_all(port: int) -> None:
    hellos = [a_hello(rank) for rank in (2, 0, 3, 1)]
    found = meeting(port, hellos)
    for outcome in found.values():
        assert isinstance(outcome, Roll)
        assert dict(outcome.ranks) == {one.rank: one for one in hellos}
    assert len(found) == 4


def test_a_missing_node_is_named_in_time(port: int) -> None:
    before = time.monotonic()
    found = meeting(port, [a_hello(0), a_hello(1)], timeout_s=1.0)
    assert time.monotonic() - before < 3
    for rank in (0, 1):
        assert "no word from ranks 2-3 on n1" in said(found[rank])
        assert "2 of 4 within 1 s" in said(found[rank])
        assert "firewall" in said(found[rank]) or "--interface" in said(found[rank])


def test_a_missing_rank_0_is_named(port: int) -> None:
    assert "no word from rank 0 on n0" in said(meeting(port, [a_hello(1), a_hello(2)], timeout_s=0.5)[2])


def test_other_versions_are_named(port: int) -> None:
    found = meeting(port, [a_hello(0), a_hello(1), a_hello(2, torch="2.11.0"), a_hello(3)])
    for outcome in found.values():
        assert "different versions" in said(outcome)
        assert "rank 2 on n1" in said(outcome)
        assert "torch 2.11.0" in said(outcome)
    assert len(found) == 4


def test_a_rank_that_cannot_start_ends_the_wait_of_all(port: int) -> None:
    before = time.monotonic()
    found = meeting(port, [a_hello(0), a_hello(1), a_hello(2), a_hello(3, fault="there is no GPU 1")], timeout_s=20.0)
    assert time.monotonic() - before < 5
    for outcome in found.values():
        assert "rank 3 on n1 cannot start" in said(outcome)
        assert "no GPU 1" in said(outcome)
    assert len(found) == 4


def test_rank_0_that_cannot_start_says_so_to_all(port: int) -> None:
    found = meeting(port, [a_hello(0, fault="busy"), a_hello(1), a_hello(2), a_hello(3)], timeout_s=20.0)
    assert all("rank 0 on n0 cannot start" in said(outcome) for outcome in found.values())


def test_two_processes_with_one_rank_are_refused(port: int) -> None:
    found: dict[int, Outcome] = {}
    hellos = [a_hello(0), a_hello(2), a_hello(2, host="n5", pid=77)]
    for thread in [start(port, one, found, 5.0) for one in hellos]:
        thread.join(30)
    assert "two processes say that they are rank 2" in said(found[0])
    assert "n5 (pid 77)" in said(found[0])
    assert "--node_rank" in said(found[0])


def test_a_run_that_starts_again_meets_in_the_same_table(port: int) -> None:
    """torchrun's table outlives the processes: words of the try before must not count."""
    first = meeting(port, [a_hello(rank) for rank in range(4)])
    found: dict[int, Outcome] = {}
    again = [a_hello(rank) for rank in range(4)]
    early = [start(port, one, found, 5.0) for one in again[1:]]
    time.sleep(0.4)  # they find the round of the try before, whose rank 0 no longer answers
    assert not found
    for thread in [*early, start(port, again[0], found, 5.0)]:
        thread.join(30)
    assert len(found) == 4
    for rank, outcome in found.items():
        assert isinstance(outcome, Roll)
        assert dict(outcome.ranks) == {one.rank: one for one in again}
        outcome.store.set("key", "new")
        before = first[rank]
        assert isinstance(before, Roll)
        assert not before.store.check(["key"])


def test_a_stranger_at_the_meeting_point_is_refused(port: int) -> None:
    found: dict[int, Outcome] = {}
    waiting = start(port, a_hello(0), found, 5.0)
    store = join_store("127.0.0.1", port, 5.0)
    while not store.add(rollcall.ROUNDS, 0):
        time.sleep(0.02)
    store.add("kinkajou/1/said", 1)
    store.set("kinkajou/1/hello/1", "x" * 100_000)
    waiting.join(30)
    assert "not a rank of this run" in said(found[0])


def test_a_taken_port_is_named_with_its_holder() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        number = sock.getsockname()[1]
        with pytest.raises(UserError, match=f"port {number}.*is taken") as refused:
            host_store("127.0.0.1", number, 1.0)
    assert f"(pid {os.getpid()})" in refused.value.evidence
    assert "--master_port" in refused.value.fix


def test_an_address_of_another_machine_cannot_be_listened_at() -> None:
    with pytest.raises(UserError, match="rank 0 cannot listen at 192"):
        host_store("192.0.2.1", 29500, 1.0)


def test_nobody_at_the_port_is_said_in_time() -> None:
    number, before = free_port(), time.monotonic()
    with pytest.raises(UserError, match=f"rank 0 does not answer: 127.0.0.1, port {number}"):
        join_store("127.0.0.1", number, 0.5)
    assert time.monotonic() - before < 2


def test_another_program_at_the_port_is_said_in_time() -> None:
    """It takes connections and says nothing, for which torch alone would wait without end."""
    before = time.monotonic()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(UserError, match="is not rank 0 of this run"):
            join_store("127.0.0.1", sock.getsockname()[1], 0.5)
    assert time.monotonic() - before < 4
    for thread in threading.enumerate():  # now that the listener is closed, torch says so on stderr
        if thread.name == "join_store":
            thread.join(10)
