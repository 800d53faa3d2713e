"""`transformers serve` on a model's folder: started on a free port, asked until it answers, ended.

`python -m benchmarks.serving.transformers_serve FOLDER` measures its settings against each other.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S, ANSWER_S, STOP_S = 180.0, 300.0, 10.0
ONE_BY_ONE: tuple[str, ...] = ("--no-continuous-batching",)
BATCHED = ("--continuous-batching",)
BOUNDED = (*BATCHED, "--cb-num-blocks", "64", "--cb-max-batch-tokens", "512")
"""With a cache of 64 blocks of 256 tokens instead of nine tenths of the memory, which take 15 s to clear."""
FASTEST = BOUNDED
"""Of those with continuous batching; `fastest` measures."""


@dataclass(frozen=True)
class Serving:
    url: str
    model: str
    """What a request must name: the folder as it was given on the command line."""
    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def ask(serving: Serving, message: str, *, tokens: int, timeout_s: float = ANSWER_S) -> tuple[str, int]:
    """A greedy answer, and how many tokens it took."""
    body = {
        "model": serving.model,
        "messages": [{"role": "user", "content": message}],
        "temperature": 0,
        "max_tokens": tokens,
    }
    request = urllib.request.Request(
        f"{serving.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        found = json.load(response)
    return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


@contextmanager
def serving(
    folder: str | Path, options: Sequence[str] = FASTEST, *, threads: int | None = None, python: str = sys.executable
) -> Iterator[Serving]:
    """A server that has answered once: with continuous batching its cache is only made then, and the first request's
    sampling settings (here greedy) hold for all that follow."""
    model = str(Path(folder).absolute())
    port = free_port()
    command = [str(Path(python).parent / "transformers"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory(prefix="transformers-serve-") as room:
        log = Path(room) / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*command, *options],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            started = Serving(f"http://127.0.0.1:{port}", model, process, log)
            wait(started)
            ask(started, "Hello.", tokens=1)
            yield started
        finally:
            end(process)


def wait(started: Serving) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if started.process.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(f"{started.url}/health", timeout=5) as response:
            if response.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"transformers serve did not come up:\n{started.log.read_text(errors='replace')[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


SETTINGS: dict[str, tuple[str, ...]] = {
    "one by one": ONE_BY_ONE,
    "batched": BATCHED,
    "batched, 64 blocks": BOUNDED,
    "batched, 64 blocks, sdpa": (*BOUNDED, "--attn-implementation", "sdpa"),
    "batched, 64 blocks, eager": (*BOUNDED, "--attn-implementation", "eager"),
    "batched, 64 blocks, 2048 tokens": (*BATCHED, "--cb-num-blocks", "64", "--cb-max-batch-tokens", "2048"),
}


def measured(folder: str, options: Sequence[str], *, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """Seconds until the first answer, and tokens a second of `clients` that ask one after the other."""
    begun = time.perf_counter()
    with serving(folder, options) as started:
        ready = time.perf_counter() - begun
        messages = [f"Tell me a story about Tom and {i} birds." for i in range(requests)]
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda m: ask(started, m, tokens=tokens), messages[:clients]))
            begun = time.perf_counter()
            answers = list(pool.map(lambda m: ask(started, m, tokens=tokens), messages))
            spent = time.perf_counter() - begun
    return {"ready_s": round(ready, 1), "tokens_per_s": round(sum(n for _, n in answers) / spent, 1)}


def fastest(folder: str, *, clients: int = 16, requests: int = 32, tokens: int = 32) -> tuple[str, ...]:
    """The settings with most tokens a second on this model and machine: which they are differs."""
    rates = {}
    for options in SETTINGS.values():
        if options != BATCHED:  # clears nine tenths of the memory first, and is the slowest everywhere
            found = measured(folder, options, clients=clients, requests=requests, tokens=tokens)
            rates[options] = found["tokens_per_s"]
    return max(rates, key=lambda options: rates[options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    for name, options in SETTINGS.items():
        try:
            row: object = measured(
                given.folder, options, clients=given.clients, requests=given.requests, tokens=given.tokens
            )
        except (OSError, RuntimeError) as fault:
            row = f"failed: {str(fault)[-300:]}"
        print(f"{name}: {row}", flush=True)


if __name__ == "__main__":
    main()
