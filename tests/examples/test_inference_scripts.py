"""The scripts of examples/inference by the flags of 2023, as they are run: by path, in a process of their own."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kinkajou.serve.limits import Limits
from kinkajou.serve.openai_jobs import generate_job
from kinkajou.serve.schema import GenerateRequest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "inference"


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FOLDER / f"{script}.py", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("server", "", "--pretrained is missing"),
        ("server", "BASE --quant 3bit", "choose from"),
        ("server", "BASE --http_hots x", "did you mean '--http_host'"),
        (
            "server",
            "BASE --http_host 0.0.0.0",
            "--key_file key.txt (or the environment's KINKAJOU_API_KEY); or leave --http_h",
        ),
        ("server", "BASE --key_file /no/such/file", "the key file /no/such/file cannot be read"),
        ("server", "BASE --gptq_checkpoint x.pt", "--gptq_checkpoint is for --quant 4bit"),
        ("server", "BASE --profanity_file /no/such/file", "cannot be read"),
        ("server", "BASE --http_port 70000", "--http_port"),
        ("server", "/no/such/folder", "does not exist"),
        ("server", "BASE --pretrained other", "two models"),
        ("benchmark", "BASE --instructions /no/such/file", "cannot be read"),
        ("benchmark", "BASE --max_new_tokens 0", "--max_new_tokens must be at least 1"),
    ],
)
def test_refusals(script: str, words: str, said: str, base: str) -> None:
    done = run(script, *(base if word == "BASE" else word for word in words.split()))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


def test_the_benchmark(base: str) -> None:
    done = run("benchmark", base, "--max_new_tokens", "4")
    assert done.returncode == 0, done.stderr
    *each, total, memory = done.stdout.splitlines()
    assert len(each) == 8
    assert all("tokens/s" in line for line in [*each, total])
    assert memory.startswith("peak memory of the ")


def test_the_server(base: str, tmp_path: Path) -> None:
    """Starts, answers as in 2023, filters, ends by a signal."""
    words = tmp_path / "words.txt"
    words.write_text("".join(f"w{i}\n" for i in range(95)))
    flags = ["--quant", "4bit", "--gptq_checkpoint", "x.pt", "--http_port", "0", "--profanity_file", str(words)]
    command = [sys.executable, str(FOLDER / "server.py"), base, *flags]
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        address = address_in(log, process)
        body = {"max_new_tokens": 8, "history": [{"instruction": "w3 w4", "response": ""}]}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{address}/generate", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            answer = json.load(reply)
        assert isinstance(answer, str)
        # All of the model's words are on the list; an answer of none is its end token alone.
        assert answer in ("", "I'm sorry, but I can't help with that.")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert "--gptq_checkpoint x.pt is not read" in log.read_text()


def address_in(log: Path, process: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


class Client:
    """Takes what a user of locust posts."""

    def __init__(self) -> None:
        self.headers, self.sent = dict[str, str](), list[tuple[str, dict[str, object]]]()

    @contextmanager
    def post(self, path: str, *, json: dict[str, object], catch_response: bool, stream: bool = False) -> Iterator[Any]:
        self.sent.append((path, json))
        lines = [b"event: generate", b"data: x", b"", b"event: end"]
        yield SimpleNamespace(status_code=200, json=lambda: "x", iter_lines=lambda: lines, failure=pytest.fail)


def test_the_load_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """locust is no dependency: a stand-in of what the file takes of it, and the bodies against the schema."""
    stand_in = SimpleNamespace(HttpUser=object, between=lambda *_: None, task=lambda _: lambda method: method)
    monkeypatch.setitem(sys.modules, "locust", stand_in)  # type: ignore[arg-type]
    monkeypatch.setenv("KINKAJOU_API_KEY", "secret")
    user = runpy.run_path(str(FOLDER / "locustfile.py"))["Talker"]()
    user.client = Client()
    user.on_start()
    user.whole()
    user.stream()
    assert user.client.headers == {"authorization": "Bearer secret"}
    assert [path for path, _ in user.client.sent] == ["/generate", "/generate/stream"]
    for _, sent in user.client.sent:
        generate_job(GenerateRequest.model_validate(sent), Limits())
