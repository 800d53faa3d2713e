"""Ranks in processes of their own, with torchrun's environment set by hand."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BEGIN = """
import os, signal, sys, time
import torch, torch.distributed as dist
from kinkajou.errors import UserError
from kinkajou.parallel.launch import join
rank = int(os.environ["RANK"])
"""
CLEARED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "SLURM_JOB_NODELIST", "SLURMD_NODENAME", "KINKAJOU_HOSTS")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def run_ranks(
    body: str, ranks: Sequence[int] = (0, 1), *, world: int = 2, port: int | None = None, env: Mapping[str, str] = {}
) -> dict[int, Ended]:
    """`body` in one process for each rank of `ranks`, which may be fewer than `world`."""
    base = {name: value for name, value in os.environ.items() if name not in CLEARED}
    base |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port or free_port())}
    base |= {"OMP_NUM_THREADS": "1", **env}
    running = {
        rank: subprocess.Popen(
            [sys.executable, "-c", BEGIN + body],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    }
    ended = {}
    try:
        for rank, process in running.items():
            out, err = process.communicate(timeout=60)
            ended[rank] = Ended(process.returncode, out, err)
    finally:
        for process in running.values():
            process.kill()
    return ended
