"""Servers in processes of their own: `kinkajou serve`, and the same app in front of the stub."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.client import HOST

ROOT = Path(__file__).parents[2]
MODEL = ROOT.parent / "shared" / "data" / "models" / "stories260k"
RUNNING, WAITING, TASKS = "kinkajou_running", "kinkajou_waiting", "kinkajou_tasks"
"""Gauges of /metrics."""
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)")


@dataclass
class Server:
    """A process that listens."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    key: str = ""

    @property
    def pids(self) -> list[int]:
        """Its own, then those below it."""
        return [self.process.pid, *below(self.process.pid)]

    def call(self, method: str, path: str, body: Any = None, timeout: float = 30.0) -> tuple[int, bytes]:
        """One request over a connection of its own, waiting for the answer."""
        line = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            line.request(method, path, None if body is None else json.dumps(body), headers)
            answer = line.getresponse()
            return answer.status, answer.read()
        finally:
            line.close()

    def metrics(self) -> dict[str, float]:
        """Prometheus samples by name; those that differ in labels are added up."""
        return samples(self.call("GET", "/metrics")[1].decode())

    def said(self, size: int = 2000) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-size:]


def samples(text: str) -> dict[str, float]:
    """Prometheus samples by name; those that differ in labels are added up."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if match := SAMPLE.match(line):
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def below(pid: int) -> list[int]:
    """Processes that it has started, and those that they have, as long as they live."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, path.read_text().split()):
                found += [child, *below(child)]
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def handles(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def free_port() -> int:
    with socket.socket() as here:
        here.bind((HOST, 0))
        return int(here.getsockname()[1])


@contextmanager
def started(command: Sequence[str], port: int, *, key: str = "", patience_s: float = 180.0) -> Iterator[Server]:
    """The server once it is ready; it is ended afterwards, with what it has started.

    RuntimeError with its last words if it does not become ready.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"KINKAJOU_API_KEY": key} if key else {})
    with tempfile.TemporaryDirectory(prefix="kinkajou-serving-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
        server = Server(process, port, log, key)
        try:
            until_ready(server, time.monotonic() + patience_s)
            yield server
        finally:
            end(server)


def until_ready(server: Server, deadline: float) -> None:
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.process.returncode}:\n{server.said()}")
        try:
            if server.call("GET", "/ready")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready in time:\n{server.said()}")


def end(server: Server, patience_s: float = 15.0) -> None:
    children = server.pids[1:]
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(patience_s)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    for pid in filter(alive, children):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def kinkajou(model: Path, *flags: str, key: str = "") -> Iterator[Server]:
    """`kinkajou serve MODEL`, without the limit on requests of one client."""
    port = free_port()
    command = [sys.executable, "-m", "kinkajou", "serve", str(model), "--port", str(port), "--rate", "0", *flags]
    with started(command, port, key=key) as server:
        yield server


@contextmanager
def stub(*flags: str, key: str = "") -> Iterator[Server]:
    """The server in front of a backend without a model: `python -m benchmarks.serving.host`."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serving.host", "--port", str(port), *flags]
    with started(command, port, key=key) as server:
        yield server
