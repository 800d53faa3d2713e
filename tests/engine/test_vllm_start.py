"""Servers that a run starts itself: an environment with a stand-in for vLLM in it."""

import os
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from kinkajou.engine.vllm_start import Started
from kinkajou.errors import UserError

SERVES = """
import http.server, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str((os.getpid(), options)).encode())
    def log_message(self, *args): pass
http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""
FAILS = "raise ValueError('no such architecture')"
HANGS = "import time; time.sleep(60)"


def environment(folder: Path, body: str) -> str:
    package = folder / "lib" / "python3.11" / "site-packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(body)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parents[2]} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def started(folder: Path, body: str) -> Started:
    return Started(environment(folder / "env", body), folder / "log", ["--dtype", "float32"], cpu=True)


def seen(url: str) -> str:
    with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
        return str(reply.read().decode())


def ended(pid: int) -> bool:
    for _ in range(100):
        path = Path(f"/proc/{pid}/stat")
        if not path.exists() or path.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_server_is_started_and_ended(tmp_path: Path) -> None:
    server = started(tmp_path, SERVES)
    try:
        first = seen(server.start(tmp_path / "weights-1", "run-1"))
        assert str(tmp_path / "weights-1") in first
        for word in ("'run-1'", "'127.0.0.1'", "'--dtype': 'float32'"):
            assert word in first
        second = seen(server.start(tmp_path / "weights-2", "run-2"))
        assert "'run-2'" in second
        assert ended(int(first[1:].split(",")[0]))
    finally:
        server.stop()
    assert ended(int(second[1:].split(",")[0]))


def test_a_server_ends_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    place = environment(tmp_path / "env", SERVES)
    code = f"""
import os, signal
from pathlib import Path
from kinkajou.engine.vllm_start import Started
server = Started({place!r}, Path({str(tmp_path / "log")!r}), [], cpu=True)
server.start(Path("weights"), "run")
print(server.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert ended(int(done.stdout))


def test_vllm_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="vLLM is not installed there") as fault:
            Started(str(folder), tmp_path / "log", [], cpu=True)
        assert f"python -m venv {folder} && {folder}/bin/pip install vllm" in fault.value.fix


def test_a_server_that_does_not_come_up(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be started") as fault:
        started(tmp_path / "a", FAILS).start(tmp_path, "run")
    assert "it ended with code 1; it said: ValueError: no such architecture" in fault.value.evidence
    assert str(tmp_path / "a" / "log") in fault.value.fix
    slow = started(tmp_path / "b", HANGS)
    with pytest.raises(UserError, match=r"not ready after 0\.5 s"):
        slow.start(tmp_path, "run", timeout_s=0.5)
    assert slow.process is None


def test_the_environment_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set goes before; our own packages stay out of it."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    shows = SERVES.replace("options)).encode()", "dict(os.environ))).encode()")
    server = started(tmp_path, shows)
    try:
        said = seen(server.start(tmp_path, "run"))
    finally:
        server.stop()
    for word in ("'VLLM_CPU_KVCACHE_SPACE': '7'", "'VLLM_SERVER_DEV_MODE': '1'", "'VLLM_NO_USAGE_STATS': '1'"):
        assert word in said
    assert "/ours" not in said
    assert os.environ["PYTHONPATH"] == "/ours"
