"""`python -m kinkajou.parallel.check_nodes`: one process on each node, before torchrun, whose own wait has no names.

Says which node does not answer, whether a port is taken, which interface is wrong, whether versions differ.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist

from kinkajou.errors import UserError
from kinkajou.parallel.launch import join
from kinkajou.parallel.nodes import own_name


def main(words: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="python -m kinkajou.parallel.check_nodes", description=__doc__)
    flags.add_argument("--nodes", type=int, required=True, help="how many there should be")
    flags.add_argument("--node_rank", type=int, required=True, help="this one's number, from 0")
    flags.add_argument("--master_addr", required=True, help="name or address of node 0")
    flags.add_argument("--master_port", type=int, required=True, help="a free port there")
    flags.add_argument("--interface", help="network interface; the one that leads to node 0 if omitted")
    flags.add_argument("--start_timeout_s", type=float, default=60.0)
    given = flags.parse_args(words)
    os.environ |= {"RANK": str(given.node_rank), "WORLD_SIZE": str(given.nodes), "GROUP_RANK": str(given.node_rank)}
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": given.master_addr, "MASTER_PORT": str(given.master_port)}
    try:
        device = join(interface=given.interface or None, start_timeout_s=given.start_timeout_s)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    dist.barrier()
    if given.node_rank == 0:
        over = os.environ.get("GLOO_SOCKET_IFNAME", "the interface of the environment")
        gpus = f"{torch.cuda.device_count()} GPU(s)" if device.type == "cuda" else "no GPU"
        print(f"{given.nodes} node(s) answer over {over}; {gpus} on {own_name()}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
