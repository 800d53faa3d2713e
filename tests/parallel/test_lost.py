"""A rank that dies, is stopped, is late or gives up: what the others say of it, and when they are gone."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from kinkajou.parallel import lost, watch
from kinkajou.parallel.nodes import Place, has_ended, is_stopped, started
from kinkajou.parallel.rollcall import Hello, Roll, hello
from kinkajou.parallel.watch import Watch
from kinkajou.parallel.whereabouts import HOUSE, NOW, Where, place_of
from rank_processes import Ended, run_ranks

HOST = socket.gethostname()
LOSE = """
from kinkajou.parallel import watch
from kinkajou.parallel.ranks import Replicated
from kinkajou.parallel.whereabouts import NOW
from kinkajou.train import naming_lost_ranks
watch.GRACE_S = 1.0
s = Replicated(start_timeout_s=20, collective_timeout_s={bound})
s.barrier()
NOW.step, NOW.phase = 3, "train"
before = time.monotonic()
try:
    with naming_lost_ranks():
        if rank == 1:
            {what}
        {own}
        s.all_sum(torch.ones(1))
except UserError as fault:
    print(fault, flush=True)
    print(time.monotonic() - before, flush=True)
    sys.exit(fault.exit_code)
"""


def lose(what: str, *, own: str = "pass", bound: float = 20.0, **env: str) -> dict[int, Ended]:
    return run_ranks(LOSE.format(what=what, own=own, bound=bound), env=env)


def said(one: Ended) -> tuple[str, float]:
    assert one.code == 5, one.err
    words, seconds = one.out.rstrip("\n").rsplit("\n", 1)
    return words, float(seconds)


def test_one_that_dies() -> None:
    words, seconds = said(lose("os.kill(os.getpid(), signal.SIGKILL)")[0])
    assert words.startswith(f"error: lost rank 1 on {HOST} at step 3, train, in all_sum, ")
    assert f"seen: rank 0 on {HOST}, step 3, train, in all_sum" in words
    assert "gloo" not in words
    assert "--max_restarts" in words
    assert seconds < 5


def test_one_that_is_stopped_is_named_and_ended() -> None:
    ended = lose("os.kill(os.getpid(), signal.SIGSTOP)", bound=1.0)
    words, seconds = said(ended[0])
    assert words.startswith(f"error: no sign of rank 1 on {HOST} at step 3, train, in all_sum")
    assert "the process of rank 1 is stopped" in words
    assert "--collective_timeout_s" in words
    assert seconds < 1 + 5
    assert ended[1].code == -signal.SIGKILL
    assert "Current thread" in ended[0].err  # where each thread was
    assert "most recent call first" in ended[0].err


@pytest.mark.slow
def test_one_that_is_busy_elsewhere_is_not_called_lost() -> None:
    words, _ = said(lose("time.sleep(6)", bound=1.0)[0])
    assert words.startswith(f"error: waited in vain for rank 1 on {HOST} at step 3, train, in all_sum")
    assert "rank 1 was at step 3, train, in what is not ours" in words
    assert "--collective_timeout_s" in words


@pytest.mark.slow
def test_a_rank_that_computes_does_not_go_on_alone() -> None:
    ended = lose("os.kill(os.getpid(), signal.SIGKILL)", own="time.sleep(40)")
    assert ended[0].code == 5
    assert f"error: lost rank 1 on {HOST}\n" in ended[0].err
    assert "rank 0 had not come to a collective since; it was at step 3, train" in ended[0].err


@pytest.mark.slow
def test_the_last_words_of_one_that_gives_up_are_passed_on() -> None:
    ended = lose("raise UserError('the dog ate the data', exit_code=3)")
    assert ended[1].code == 3
    words, _ = said(ended[0])
    assert f"lost rank 1 on {HOST}" in words
    assert "rank 1 said: the dog ate the data" in words


@pytest.mark.slow
def test_ranks_at_different_collectives_are_told_in_a_debug_mode() -> None:
    ended = lose("s.all_sum(torch.ones(2))", TORCH_DISTRIBUTED_DEBUG="DETAIL")
    for rank in (0, 1):
        words, _ = said(ended[rank])
        assert "error: the processes do not call the same collective, at step 3, train, in all_sum" in words
        assert "ALLREDUCE" in words


def test_where_a_process_is() -> None:
    NOW.step, NOW.phase = 12, "update"
    inner, outer = (f"{HOUSE}/parallel/ranks.py", "all_sum", 52), (f"{HOUSE}/train/update.py", "update", 71)
    library = ("/x/torch/distributed/distributed_c10d.py", "all_reduce", 1)
    try:
        found = place_of([library, inner, outer, ("/y/main.py", "main", 3)])
        assert found == Where("step 12, update", "all_sum, asked for in train/update.py:71", True)
        assert place_of([("/z/torch/nn.py", "f", 1), outer]) == Where(
            "step 12, update", "update (train/update.py:71)", False
        )
        assert place_of([library, outer]).waits
        NOW.step = 0
        assert place_of([]) == Where("before the first step", "what is not ours", False)
    finally:
        NOW.step, NOW.phase = 0, ""


@pytest.mark.parametrize("words", [b"", b"[]", b"{}", b"\xff", b'{"step": 1}', b"9" * 100_000])
def test_an_answer_that_is_none_is_borne(words: bytes) -> None:
    assert lost.parsed(words).waits


def one(rank: int, *, pid: int, began: str) -> Hello:
    own = hello(Place(rank=rank, world=2, group=0, local=2))
    return Hello(**{**own.__dict__, "pid": pid, "started": began})


def test_another_process_with_the_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    own, parent = os.getpid(), os.getppid()
    ranks = {0: one(0, pid=own, began=started(own)), 1: one(1, pid=parent, began="7")}
    roll = Roll(torch.distributed.HashStore(), Place(rank=0, world=2, group=0, local=2), ranks)
    lost.end_silent(roll, [1])
    assert killed == []
    assert watch.ended(ranks[1])
    assert not watch.ended(ranks[0])
    assert not has_ended(own)
    assert not is_stopped(own)


def test_an_orphan_of_torchrun_asks_itself_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    own = one(0, pid=os.getpid(), began=started(os.getpid()))
    store = torch.distributed.HashStore()
    found = Watch(Roll(store, Place(rank=0, world=1, group=0, local=1), {0: own}))
    found.look_up()
    assert sent == []
    monkeypatch.setattr(os, "getppid", lambda: 1)
    found.look_up()
    found.look_up()
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_stacks_lie_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinkajou.parallel import whereabouts

    monkeypatch.setattr(NOW, "folder", tmp_path)
    whereabouts.dump(2)
    assert "test_stacks_lie_beside_the_run" in (tmp_path / "stacks-rank-2.txt").read_text()
