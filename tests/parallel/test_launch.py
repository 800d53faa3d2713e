"""From torchrun's environment to a process group: what is open, and what is said when it cannot be made."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from kinkajou.cli import main
from kinkajou.errors import UserError
from kinkajou.parallel import check_nodes, launch, lost, rollcall
from kinkajou.parallel.nodes import Place
from kinkajou.parallel.rollcall import Roll
from rank_processes import free_port, run_ranks

GOOD = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
GOOD |= {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}

SUM = """
device = join(interface=None, start_timeout_s=20)
x = torch.tensor([1.0 + rank]); dist.all_reduce(x)
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
mine = {os.readlink(link) for link in links if os.path.islink(link)}
rows = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}").readlines()[1:]]
listening = sorted({row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine})
print(float(x), device, os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"], *listening)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="open ports are read from Linux's /proc")
def test_two_ranks_on_one_machine_open_no_port_to_the_outside() -> None:
    ended = run_ranks(SUM)
    loopback = "0100007F"  # 127.0.0.1 as the kernel's tables write it
    for rank in (0, 1):
        assert ended[rank].code == 0, ended[rank].err
        assert ended[rank].out.split() == ["3.0", "cpu", "lo", "=lo", loopback]


REFUSED = """
before = time.monotonic()
try:
    join(interface=sys.argv[1] if len(sys.argv) > 1 else None, start_timeout_s=1.5)
except UserError as fault:
    print(round(time.monotonic() - before, 1), flush=True); print(fault, flush=True)
"""


def test_a_rank_that_never_comes_is_named_in_time() -> None:
    ended = run_ranks(REFUSED, ranks=(0, 1), world=4, env={"KINKAJOU_HOSTS": "n0,n1", "LOCAL_WORLD_SIZE": "2"})
    for rank in (0, 1):
        seconds, words = ended[rank].out.split("\n", 1)
        assert "no word from ranks 2-3 on n1" in words
        assert float(seconds) < 6


def test_a_taken_port_is_said_by_the_rank_that_needs_it() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        ended = run_ranks(REFUSED, ranks=(0,), port=port)
    assert f"port {port}, where the processes should meet, is taken" in ended[0].out
    assert f"(pid {os.getpid()})" in ended[0].out


@pytest.mark.parametrize("name", sorted(launch.NEEDED))
def test_without_torchrun_the_line_to_type_is_said(name: str) -> None:
    with pytest.raises(UserError, match="torchrun --standalone") as refused:
        launch.read({key: value for key, value in GOOD.items() if key != name})
    assert name in refused.value.evidence


def test_the_environment_is_read() -> None:
    assert launch.read(GOOD) == (1, Place(rank=3, world=8, group=1, local=2), "a")
    by_hand = {key: value for key, value in GOOD.items() if key not in ("LOCAL_WORLD_SIZE", "GROUP_RANK")}
    assert launch.read(by_hand) == (1, Place(rank=3, world=8, group=0, local=8), "a")


@pytest.mark.parametrize(("name", "value"), [("RANK", "8"), ("LOCAL_RANK", "2"), ("MASTER_PORT", "0"), ("RANK", "x")])
def test_an_environment_that_does_not_fit_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match="torchrun's environment"):
        launch.read(GOOD | {name: value})


@pytest.fixture
def _no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


ONE, TWO = Place(rank=0, world=2, group=0, local=2), Place(rank=0, world=4, group=0, local=2)


@pytest.mark.usefixtures("_no_interface")
def test_the_stated_interface_is_used_and_a_users_own_setting_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert launch.bind(None, TWO, "somewhere") is None
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    assert launch.bind("lo", TWO, "somewhere") == "lo"
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")


@pytest.mark.usefixtures("_no_interface")
def test_a_wrong_interface_is_refused_and_nothing_is_set() -> None:
    with pytest.raises(UserError, match="no network interface 'eth9'"):
        launch.bind("eth9", ONE, "localhost")
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.usefixtures("_no_interface")
def test_over_machines_the_way_to_rank_0_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.bind(None, TWO, "127.0.0.1") == "lo"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    with pytest.raises(UserError, match="interface leads to the other machines is not clear"):
        launch.bind(None, TWO, "no-such-host.invalid")
    # A machine whose own name leads to its loopback, as some systems write into /etc/hosts.
    monkeypatch.setattr(launch.interfaces, "leads_to", lambda host, port: "lo")
    with pytest.raises(UserError, match="not clear") as refused:
        launch.bind(None, TWO, "node1")
    assert "--interface NAME, one of: " in refused.value.fix


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="no GPU 2 for process 2") as refused:
        launch.take_device(2)
    assert "2 GPU(s), CUDA_VISIBLE_DEVICES=0,1" in refused.value.evidence
    assert "--nproc_per_node=2" in refused.value.fix


def test_a_busy_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(UserError, match="GPU 1 cannot be used") as refused:
        launch.take_device(1)
    assert "busy or unavailable;" in refused.value.evidence


NO_GPU = """
from kinkajou.parallel import launch
torch.cuda.is_available = lambda: rank == 1
torch.cuda.device_count = lambda: 1
try:
    join(interface=None, start_timeout_s=20)
except UserError as fault:
    print(fault)
"""


def test_the_others_hear_of_a_missing_gpu() -> None:
    ended = run_ranks(NO_GPU)
    assert "there is no GPU 1 for process 1" in ended[1].out
    assert "rank 1 on" in ended[0].out
    assert "there is no GPU 1 for process 1" in ended[0].out


def test_other_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = RuntimeError("[/x/gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]:5. This is typically")
    assert lost.named(gloo) is None  # without a group it is no peer of ours
    token = rollcall.ROLL.set(Roll(torch.distributed.HashStore(), ONE, {}))
    try:
        assert lost.named(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    finally:
        rollcall.ROLL.reset(token)


def test_a_lost_rank_ends_a_command_in_its_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("gloo")

    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    monkeypatch.setattr("kinkajou.train.sft.train_sft", broken)
    words = [
        "sft",
        "--model",
        "llama-nano",
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--batch_size",
        "1",
    ]
    monkeypatch.setattr("kinkajou.parallel.lost.named", lambda fault: None)
    with pytest.raises(RuntimeError, match="gloo"):
        main(words)
    monkeypatch.setattr("kinkajou.parallel.lost.named", lambda fault: UserError("lost rank 1", exit_code=5))
    assert main(words) == 5
    assert capsys.readouterr().err.strip() == "error: lost rank 1"


@pytest.mark.usefixtures("_no_interface")
def test_the_check_of_nodes_names_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"KINKAJOU_HOSTS": "n0,n1"})
    words = ["--nodes", "2", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    assert check_nodes.main([*words, "--start_timeout_s", "0.3"]) == 2
    assert "no word from rank 1 on n1" in capsys.readouterr().err
    assert check_nodes.main([*words, "--interface", "eth9"]) == 2
    assert "no network interface 'eth9'" in capsys.readouterr().err
