"""torchrun that starts its processes again (--max_restarts): the next try may replace what the last one wrote."""

import os
import socket
import tomllib
from pathlib import Path


def launcher() -> str | None:
    """The torchrun on this machine that started this process, and the process; None without one."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    agent = os.getppid()
    return f"{run} {socket.gethostname()} {agent} {started(agent)} {os.getpid()}"


def started(pid: int) -> str:
    """When a process began, in the kernel's ticks: numbers of processes are used again.  `?` where nobody tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "?"


def written_by_last_try(folder: Path) -> bool:
    """Whether the run in the folder is an earlier try of the torchrun that started this process."""
    now = launcher()
    try:
        table = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    then = table.get("environment", {}).get("launcher")
    if now is None or not isinstance(then, str):
        return False
    (torchrun, _, process), (earlier, _, its) = now.rpartition(" "), then.rpartition(" ")
    return torchrun == earlier and process != its
