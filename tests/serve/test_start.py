"""`kinkajou serve`: what is checked before anything is loaded, and the process from its first line to its exit code."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from benchmarks.serving.stub import Stub, StubScorer
from place import make_house

from kinkajou.cli import main
from kinkajou.config import DoorConfig, HostingConfig, ServeConfig
from kinkajou.errors import UserError
from kinkajou.serve.bind import host_names, opened, origin_names, taken
from kinkajou.serve.start import OneLine, named, reward_name, serve, threads_left

KEY = "a-key-of-sixteen-letters"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINKAJOU_API_KEY", raising=False)


def fails(*folders: str, host: dict[str, object] | None = None, door: dict[str, object] | None = None) -> UserError:
    cfg = ServeConfig(hosting=HostingConfig(**(host or {})), door=DoorConfig(**({"port": 0} | (door or {}))))  # type: ignore[arg-type]
    with pytest.raises(UserError) as fault:
        serve(folders, cfg)
    assert fault.value.exit_code == 2
    return fault.value


def test_what_cannot_be_served_is_said_first(tmp_path: Path) -> None:
    assert "no model is named" in str(fails())
    assert "is no address" in str(fails(host={"backend": "localhost:1"}))
    assert "is no name of a host" in str(fails("model", door={"allow_hosts": ("a b",)}))
    assert "is no origin" in str(fails("model", door={"allow_origins": ("chat.example.org",)}))
    assert "cannot be read" in str(fails("model", door={"key_file": str(tmp_path / "none")}))
    assert "cannot be read" in str(fails("model", host={"words": str(tmp_path / "none")}))
    assert "no address is known" in str(fails("model", door={"host": "no such host"}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_another_host_than_this_machine_wants_a_key(host: str) -> None:
    fault = fails("model", door={"host": host})
    assert "no key is asked for" in fault.problem
    assert "--key-file" in fault.fix


def test_everywhere_with_a_key() -> None:
    with taken("0.0.0.0", 0, has_key=True, send_buffer_bytes=8192) as place:
        assert place.getsockname()[0] == "0.0.0.0"


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        fault = fails("model", door={"port": other.getsockname()[1]})
    assert "cannot be listened at" in fault.problem
    assert "Address already in use" in fault.evidence
    assert "--port" in fault.fix


def test_two_servers_that_load_at_once() -> None:
    with taken("127.0.0.1", 0, has_key=False, send_buffer_bytes=8192) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match="cannot be listened at"):
            taken("127.0.0.1", port, has_key=False, send_buffer_bytes=8192)
        opened(first)
        # A server that ends first leaves its connections to the kernel for a minute; the next one starts all the same.
        with socket.create_connection(("127.0.0.1", port)) as caller:
            first.accept()[0].close()
            first.close()
            assert caller.recv(1) == b""
    taken("127.0.0.1", port, has_key=False, send_buffer_bytes=8192).close()


def test_more_connections_than_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fault = fails("model", door={"max_connections": hard})
    assert "--max-connections" in fault.problem
    assert f"--max-connections {hard - 256}" in fault.fix


@pytest.mark.parametrize(("ours", "left"), [(1, 1), (2, 1), (16, 15)])
def test_one_processor_is_left_for_http(ours: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(ours)))
    assert threads_left() == left
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads_left() is None  # torch reads it itself


def test_names_of_models() -> None:
    assert named(["runs/sft", "ppo/"], HostingConfig()) == {"sft": "runs/sft", "ppo": "ppo/"}
    twice = named(["a/step-10", "b/step-10"], HostingConfig())
    assert twice == {"a/step-10": "a/step-10", "b/step-10": "b/step-10"}
    with pytest.raises(UserError, match="two models have the name"):
        named(["x/a/model", "y/a/model"], HostingConfig())


def test_the_reward_model_has_a_name_of_its_own() -> None:
    assert reward_name("judge/final/..", ["final"]) == "judge"
    assert reward_name("judge/final", ["sft"]) == "final"
    assert reward_name("judge/final", ["final"]) == "judge/final"
    with pytest.raises(UserError, match="the reward model has the name of a model"):
        reward_name("x/a/final", ["final", "a/final"])
    judge = StubScorer()
    with pytest.raises(ValueError, match="one name"):
        make_house({judge.name: Stub(judge.name)}, scorer=judge)


def test_names_of_hosts_and_origins() -> None:
    names = host_names("0.0.0.0", ("Chat.Example.org", "b:99"))
    assert {"chat.example.org", "b:99", socket.gethostname().lower()} <= names
    assert "0.0.0.0" not in names
    assert "[fe80::1]" in host_names("fe80::1", ())
    assert "c.example.org" in host_names("127.0.0.1", ("c.example.org.",))
    assert origin_names(("https://Chat.example.org/",)) == {"https://chat.example.org"}
    assert origin_names(("https://a.example:443", "http://b.example:80")) == {"https://a.example", "http://b.example"}
    assert origin_names(("https://a.example:8443",)) == {"https://a.example:8443"}
    for wrong in ("*", "https://", "https://a/b", "ftp://a", "null"):
        with pytest.raises(UserError):
            origin_names((wrong,))


def test_a_line_of_the_log_is_one_line() -> None:
    import logging

    record = logging.LogRecord("x", logging.INFO, "", 0, "a\n%s", ("\x1b[31m\u202e",), None)
    assert OneLine("%(message)s").format(record) == "a\\n\\x1b[31m\\u202e"
    try:
        raise ValueError("no\n2026-01-01T00:00:00 INFO 127.0.0.1 GET /\x1b[2J")
    except ValueError as fault:
        record.exc_info = (type(fault), fault, fault.__traceback__)
    _, *lines = OneLine("%(message)s").format(record).split("\n")
    assert all(line.startswith("    ") for line in lines)
    assert lines[-1].endswith("\\x1b[2J")


SCRIPT = """
import asyncio, sys
from pathlib import Path
from benchmarks.serving.stub import Stub
from kinkajou.errors import UserError
from kinkajou.serve import start
from kinkajou.cli import main

class Loading(Stub):
    async def start(self):
        while not Path(sys.argv[1]).exists():
            await asyncio.sleep(0.01)
        if Path(sys.argv[1]).read_text():
            raise UserError("the weights are damaged", exit_code=4)
        await super().start()

    async def close(self):
        print("closed", flush=True)
        await super().close()

async def parts_of(sources, cfg):
    return {name: Loading(name, pause_s=0.01) for name in sources}, None

start.parts_of = parts_of
sys.exit(main(["serve", "some/model", *sys.argv[2:]]))
"""


@contextmanager
def process(gate: Path, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    root = Path(__file__).parents[2]
    made = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(gate), *flags],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "KINKAJOU_API_KEY": KEY},
    )
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def test_from_loading_to_the_end(tmp_path: Path) -> None:
    gate, port = tmp_path / "gate", free_port()
    url = f"http://127.0.0.1:{port}"
    with process(gate, "--port", str(port), "--drain-s", "5") as server:
        assert server.stdout
        assert server.stdout.readline() == "loading model\n"
        with pytest.raises(httpx.ConnectError):  # the port is taken, and not open
            httpx.get(f"{url}/health", trust_env=False)
        with pytest.raises(UserError, match="cannot be listened at"):
            taken("127.0.0.1", port, has_key=True, send_buffer_bytes=8192)
        gate.touch()
        assert server.stdout.readline() == f"model at {url} (a key is asked for)\n"
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 401
        ready = httpx.get(f"{url}/ready", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
        assert ready.json() == {"status": "ready", "models": {"model": "ready"}}
        server.send_signal(signal.SIGTERM)
        said, _ = server.communicate(timeout=10)
        assert server.returncode == 0
    assert "closed" in said
    assert "GET /ready 401" in said
    assert KEY not in said


def test_a_model_that_does_not_load_ends_it_before_the_port_opens(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.write_text("damaged")
    with process(gate, "--port", "0") as server:
        said, _ = server.communicate(timeout=20)
        assert server.returncode == 4
    assert "error: the weights are damaged" in said
    assert "closed" in said
    assert " at http" not in said
    assert "Traceback" not in said


def test_ctrl_c_while_loading(tmp_path: Path) -> None:
    with process(tmp_path / "gate", "--port", "0") as server:
        assert server.stdout
        assert server.stdout.readline() == "loading model\n"
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=10)
        assert server.returncode == 130
    assert "closed" in said
    assert "interrupted" in said


def test_checks_are_quick(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    assert main(["serve", "model", "--host", "0.0.0.0"]) == 2
    assert time.process_time() - began < 2
    assert "no key is asked for" in capsys.readouterr().err
