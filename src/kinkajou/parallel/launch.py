"""From torchrun's environment to a process group, with faults named before anything can hang."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from kinkajou.errors import UserError
from kinkajou.parallel import interfaces, rollcall, watch
from kinkajou.parallel.nodes import Place
from kinkajou.parallel.rollcall import ROLL, Roll
from kinkajou.parallel.store import host_store, join_store

COLLECTIVE_S = 600.0
FLIGHT_RECORDER = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""NCCL's last collectives, written down when one takes too long.  Set where a user has not; unmeasured."""
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def join(*, interface: str | None, start_timeout_s: float, collective_timeout_s: float = COLLECTIVE_S) -> torch.device:
    """Meets the other ranks and makes the default process group; returns this rank's device, which is set.

    Traffic goes over `interface`; if omitted over the loopback where all ranks are on this machine, else over the one
    that leads to rank 0.  gloo, and NCCL for tensors on a GPU.
    """
    local_rank, place, main = read(os.environ)
    used = bind(interface, place, main)
    device, fault = torch.device("cpu"), None
    try:
        device = take_device(local_rank)
    except UserError as found:
        fault = found
    store = open_store(used, place, main, start_timeout_s)
    why = f"{fault.problem}; {fault.evidence}" if fault else ""
    own = rollcall.hello(place, address=interfaces.address_of(used) if used else "", fault=why)
    try:
        roll = rollcall.meet(store, place, own, main=main, timeout_s=start_timeout_s)
    except UserError as said:
        raise fault or said from None
    make_group(roll, used, device, start_timeout_s, collective_timeout_s)
    ROLL.set(roll)
    watch.begin(roll)
    return device


def read(env: Mapping[str, str]) -> tuple[int, Place, str]:
    """This rank's number on its machine, its place, and the address of rank 0."""
    if lacking := [name for name in NEEDED if not env.get(name)]:
        raise UserError(
            "a strategy of several processes runs under torchrun",
            evidence=f"not set: {', '.join(lacking)}",
            fix="torchrun --standalone --nproc_per_node=2 -m kinkajou sft ..., or --strategy naive",
        )
    try:
        rank, world, local_rank = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local = int(env.get("LOCAL_WORLD_SIZE", world))
        group = int(env.get("GROUP_RANK", rank // max(1, local)))
        port = int(env["MASTER_PORT"])
    except ValueError as fault:
        raise UserError("torchrun's environment holds something else than a number", evidence=str(fault)) from None
    if not (0 <= rank < world and 0 <= local_rank < local <= world and 0 < port < 2**16):
        raise UserError(
            "torchrun's environment does not fit together",
            evidence=", ".join(f"{name}={env.get(name)}" for name in (*NEEDED, "LOCAL_WORLD_SIZE")),
            fix="let torchrun set it",
        )
    return local_rank, Place(rank=rank, world=world, group=group, local=local), env["MASTER_ADDR"]


def bind(interface: str | None, place: Place, main: str) -> str | None:
    """Sends gloo's and NCCL's traffic over one interface; returns its name, None where a user's setting stands."""
    if interface is None:
        if "GLOO_SOCKET_IFNAME" in os.environ or "NCCL_SOCKET_IFNAME" in os.environ:
            return None
        interface = interfaces.loopback() if place.local == place.world else towards(main)
    else:
        interfaces.address_of(interface)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # NCCL takes a bare name as the beginning of one
    return interface


def towards(main: str) -> str:
    found = interfaces.leads_to(main, 1)
    literal = main == "localhost" or main.startswith("127.") or main == "::1"
    if found is None or (found == interfaces.loopback() and not literal):
        seen = "has no known address" if found is None else f"is {found} here, which other machines cannot reach"
        raise UserError(
            "which network interface leads to the other machines is not clear",
            evidence=f"{main}, the machine of rank 0, {seen}",
            fix=f"--interface NAME, one of: {', '.join(interfaces.names())}",
        )
    return found


def take_device(local_rank: int) -> torch.device:
    """The GPU with this rank's number on its machine; the CPU where there is none at all."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    have = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"{have} GPU(s)" + (f", CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "")
    if local_rank >= have:
        raise UserError(
            f"there is no GPU {local_rank} for process {local_rank} of this machine",
            evidence=seen,
            fix=f"torchrun --nproc_per_node={have}",
        )
    device = torch.device("cuda", local_rank)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as fault:
        raise UserError(
            f"GPU {local_rank} cannot be used",
            evidence=f"{str(fault).splitlines()[0]}; {seen}",
            fix="nvidia-smi shows who holds it; CUDA_VISIBLE_DEVICES chooses others",
        ) from None
    return device


def open_store(used: str | None, place: Place, main: str, timeout_s: float) -> Store:
    """torchrun's own table where it has one; else rank 0's, which listens on the chosen interface alone."""
    port = int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return join_store(main, port, timeout_s)
    # On the machine of rank 0 its name may lead to another interface than the one chosen.
    address = interfaces.address_of(used) if used and place.group == 0 else main
    if place.rank == 0:
        return host_store(address, port, timeout_s)
    return join_store(address, port, timeout_s)


def make_group(roll: Roll, used: str | None, device: torch.device, start_timeout_s: float, timeout_s: float) -> None:
    gpu = device.type == "cuda"
    for name, value in FLIGHT_RECORDER.items() if gpu else ():
        os.environ.setdefault(name, value)
    try:
        # gloo connects every pair here, also where NCCL will carry the weights.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("group", roll.store),
            rank=roll.place.rank,
            world_size=roll.place.world,
            timeout=timedelta(seconds=start_timeout_s),
        )
    except RuntimeError as fault:
        raise UserError(
            "the processes have met but cannot connect to each other",
            evidence=f"over {used or 'the interface of GLOO_SOCKET_IFNAME'}: {str(fault).splitlines()[0]}",
            fix="name the interface that the machines share by --interface, and let its ports through the firewall",
        ) from None
    set_timeout(timeout_s)


def set_timeout(timeout_s: float) -> None:
    """How long a collective may take from now on; the group was made with the bound of the start."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
