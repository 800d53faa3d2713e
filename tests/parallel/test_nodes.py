"""Names of machines: lists as Slurm writes them, and whose ranks have not come."""

import socket

import pytest

from kinkajou.errors import UserError
from kinkajou.parallel import interfaces
from kinkajou.parallel.nodes import Place, expand, expected, missing, numbered


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("node[9-11]", ["node9", "node10", "node11"]),
        ("login,gpu-[1,3]-x,r[1-2]n[1-2]", ["login", "gpu-1-x", "gpu-3-x", "r1n1", "r1n2", "r2n1", "r2n2"]),
        ("10.0.0.1,10.0.0.2", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_lists_of_nodes(words: str, want: list[str]) -> None:
    assert expand(words) == want


def test_a_range_without_end_does_not_fill_memory() -> None:
    assert len(expand("n[0-999999999999]")) <= 100_000


def test_a_users_list_goes_before_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.delenv("KINKAJOU_HOSTS", raising=False)
    assert expected() == ["node1", "node2"]
    monkeypatch.setenv("KINKAJOU_HOSTS", "x,y")
    assert expected() == ["x", "y"]


@pytest.mark.parametrize(("ranks", "want"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 2, 3, 4], "ranks 0, 2-5")])
def test_numbers_of_ranks(ranks: list[int], want: str) -> None:
    assert numbered(ranks) == want


FOUR = Place(rank=0, world=8, group=0, local=2)
NODES = ["a1", "a2", "a3", "a4"]


@pytest.mark.parametrize(
    ("heard", "nodes", "want"),
    [
        # Whole nodes are silent: those of the list that nobody comes from.
        ({0: ("a1", 0), 1: ("a1", 0), 6: ("a4", 3), 7: ("a4", 3)}, NODES, "ranks 2-5 on a2, a3"),
        # Groups in another order than the list.
        ({0: ("a3", 0), 1: ("a3", 0), 2: ("a4.site", 1), 3: ("a4.site", 1)}, NODES, "ranks 4-7 on a1, a2"),
        # One process of a node that has spoken.
        ({rank: (f"a{rank // 2 + 1}", rank // 2) for rank in range(8) if rank != 5}, NODES, "rank 5 on a3"),
        ({rank: (f"a{rank // 2 + 1}", rank // 2) for rank in range(5)}, NODES, "rank 5 on a3; ranks 6-7 on a4"),
        # Nobody has told the names, or the machines call themselves by others.
        ({0: ("a1", 0), 1: ("a1", 0)}, [], "ranks 2-7"),
        ({rank: (f"pod{rank // 2}", rank // 2) for rank in (0, 1, 4, 5, 6, 7)}, NODES, "ranks 2-3 on a2"),
    ],
)
def test_who_is_missing(heard: dict[int, tuple[str, int]], nodes: list[str], want: str) -> None:
    hosts = {rank: host for rank, (host, _) in heard.items()}
    groups = {rank: group for rank, (_, group) in heard.items()}
    assert missing(FOUR, hosts, groups, nodes) == want


def test_the_loopback_is_an_interface_with_an_address() -> None:
    assert interfaces.address_of(interfaces.loopback()) == "127.0.0.1"
    assert interfaces.leads_to("127.0.0.1", 1) == interfaces.loopback()
    assert interfaces.leads_to("no-such-host.invalid", 1) is None


def test_an_unknown_interface_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match="no network interface 'ib7'") as refused:
        interfaces.address_of("ib7")
    for _, name in socket.if_nameindex():
        assert name in refused.value.evidence
