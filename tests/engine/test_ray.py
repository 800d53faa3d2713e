"""Real Ray actors on the loopback: the local engine's text, killed workers, and faults of the cluster."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_pool import generate, local, model_of, move, same

from kinkajou.engine import ray_engine
from kinkajou.engine.worker import Plan
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel
from kinkajou.models.replica import shape_of
from tiny import PAD

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'kinkajou[ray]'"
)


def engine_of(model: LanguageModel, workers: int, address: str | None = None) -> Any:
    def plan(device: str) -> Plan:
        return Plan(shape_of(model), end_ids=[2], pad_id=PAD, max_rows=64, device=device)

    return ray_engine.make_ray_engine(model, plan, workers=workers, address=address, say=lambda text: None)


@pytest.fixture
def one() -> Iterator[tuple[Any, LanguageModel]]:
    model = model_of("llama")
    engine = engine_of(model, 1)
    engine.load(model.named_parameters())
    yield engine, model
    engine.close()


def process_of(engine: Any, seat: int) -> int:
    import ray

    found: int = ray.get(engine.pool._hands[seat].actor.__ray_call__.remote(lambda self: os.getpid()))
    return found


def descendants(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(words[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pid: int) -> list[str]:
    """Addresses, in hexadecimal, at which a process and its descendants wait for TCP connections."""
    sockets = set()
    for process in descendants(pid):
        for handle in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets.add(os.readlink(handle))
            except FileNotFoundError:
                continue
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.append(words[1].partition(":")[0])
    return found


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_actor_says_what_the_local_engine_says(one: tuple[Any, LanguageModel]) -> None:
    """With new weights too, and after its process was killed; nobody beyond this machine is listened to."""
    engine, model = one
    same(generate(engine), local(model))
    move(model, 1)
    engine.load(model.named_parameters())
    same(generate(engine), local(model))
    os.kill(process_of(engine, 0), signal.SIGKILL)
    same(generate(engine), local(model))
    assert engine.pool.lost == 1
    at = listening(os.getpid())
    assert len(at) >= 3
    assert set(at) <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same in IPv6


def test_ray_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="Ray, which is not installed") as caught:
        engine_of(model_of("llama"), 1)
    assert caught.value.fix == "pip install 'kinkajou[ray]'"


@needs_ray
@pytest.mark.parametrize(
    ("address", "problem"), [("127.0.0.1:9", "no Ray cluster could be joined"), ("nowhere", "no address")]
)
def test_no_cluster_at_the_address(address: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        engine_of(model_of("llama"), 1, address)
    assert address in caught.value.problem
