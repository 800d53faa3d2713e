"""The table of keys and values through which ranks find each other: torch's TCPStore, with bounded waits."""

import errno
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from kinkajou.errors import UserError
from kinkajou.parallel import interfaces
from kinkajou.parallel.nodes import own_name

POLL_S = 0.05


def host_store(address: str, port: int, timeout_s: float) -> Store:
    """Rank 0's table, which listens at this address alone; torch's own choice would be every interface."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        # A restarted run takes the port that its predecessor has just left.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, port))
            sock.listen()
        except OSError as fault:
            raise not_bound(address, port, fault) from None
        store: Store = TCPStore(
            address,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=sock.detach(),
        )
        return store


def not_bound(address: str, port: int, fault: OSError) -> UserError:
    where = f"{address}:{port} on {own_name()}"
    if fault.errno == errno.EADDRINUSE:
        owner = interfaces.holder(port) or "a process that this user may not see"
        return UserError(
            f"port {port}, where the processes should meet, is taken",
            evidence=f"{where} belongs to {owner}",
            fix="another run may use it: give torchrun another --master_port (or --rdzv_endpoint HOST:PORT)",
        )
    return UserError(
        f"rank 0 cannot listen at {where}",
        evidence=fault.strerror or str(fault),
        fix="--master_addr must name the machine of rank 0, and a port from 1024 to 65535",
    )


def join_store(host: str, port: int, timeout_s: float) -> Store:
    """The table that another process hosts, once it answers."""
    deadline = time.monotonic() + timeout_s
    await_listener(host, port, timeout_s)
    made: list[Store] = []
    refused: list[dist.DistError] = []

    def connect() -> None:
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        try:
            made.append(TCPStore(host, port, is_master=False, timeout=left, wait_for_workers=False))
        except dist.DistError as fault:
            refused.append(fault)

    # torch waits without end for a listener that takes the connection and says nothing.
    thread = threading.Thread(target=connect, name="join_store", daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if not made:
        raise UserError(
            f"what listens at {host}:{port} is not rank 0 of this run",
            evidence=str(refused[0]).splitlines()[0]
            if refused
            else f"it took the connection and was silent {timeout_s:g} s",
            fix="another program may have the port: give torchrun another --master_port (or --rdzv_endpoint HOST:PORT)",
        )
    return made[0]


def await_listener(host: str, port: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            socket.create_connection((host, port), timeout=min(left, 5.0)).close()
            return
        except OSError as fault:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"rank 0 does not answer: {host}, port {port}",
                    evidence=f"{own_name()} tried for {timeout_s:g} s: {fault}",
                    fix=f"is {host} up, has its process started, and does a firewall let port {port} through?",
                ) from None
        time.sleep(POLL_S)
