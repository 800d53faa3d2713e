"""Rollout workers on Ray: the only module that imports it."""

import importlib
import os
import secrets
import socket
from collections.abc import Callable
from typing import Any, cast

from kinkajou.engine.pool import Crew, Held, Pool, WorkerLost
from kinkajou.engine.pool_engine import PoolEngine
from kinkajou.engine.worker import Block, Chunk, Plan, Reply, Worker
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel

START_S = 60.0
"""Longest wait for a worker to come up."""
CONNECT_S = 10.0
"""Longest wait for a connection to a cluster."""
LOOPBACK = "127.0.0.1"


class RayHand:
    """An actor, as the trainer reaches it."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor

    def about(self) -> dict[str, str]:
        try:
            return cast(dict[str, str], self._ask(self.actor.about.remote(), timeout=START_S))
        except self.ray.exceptions.GetTimeoutError:
            raise UserError(
                f"no rollout worker came up within {START_S:.0f} s",
                evidence=f"the cluster has {resources(self.ray.cluster_resources())}, "
                f"of which are free {resources(self.ray.available_resources())}",
                fix="ask for fewer --workers, or add machines to the cluster",
            ) from None

    def build(self, plan: Plan) -> None:
        self._ask(self.actor.build.remote(plan))

    def take(self, version: int, index: int, last: bool, block: Held) -> int:
        return int(self._ask(self.actor.take.remote(version, index, last, block)))

    def sample(self, chunk: Chunk) -> Reply:
        return cast(Reply, self._ask(self.actor.sample.remote(chunk)))

    def end(self) -> None:
        self.ray.kill(self.actor)

    def _ask(self, answer: Any, timeout: float | None = None) -> Any:
        try:
            return self.ray.get(answer, timeout=timeout)
        except self.ray.exceptions.RayActorError as fault:
            raise WorkerLost(str(fault).splitlines()[0]) from None


class RayCrew:
    """Actors of one Ray cluster: a running one, or one of this process's own on the loopback."""

    def __init__(self, ray: Any, *, cpus: int, gpus: int) -> None:
        self.ray = ray
        self.make = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Worker)

    def hire(self) -> RayHand:
        return RayHand(self.ray, self.make.remote())

    def hold(self, block: Block) -> Held:
        return self.ray.put(block)

    def close(self) -> None:
        self.ray.shutdown()


def import_ray() -> Any:
    # Read when Ray is imported: nobody is told that it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UserError("--rollout ray needs Ray, which is not installed", fix="pip install 'kinkajou[ray]'") from None


def start_ray(workers: int, weight_bytes: int) -> Any:
    """A cluster of this machine that listens on the loopback alone and knows a token of this run alone."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the loopback as the machine's address; read at import
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = import_ray()
    ray.init(
        address="local",
        num_cpus=workers * threads_of(workers),
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=max(2**28, 2 * weight_bytes + 2**27),
        log_to_driver=False,
        logging_level="error",
        configure_logging=False,
        _node_ip_address=LOOPBACK,
    )
    at = str(ray.get_runtime_context().gcs_address)
    if not at.startswith(LOOPBACK):
        ray.shutdown()
        raise UserError(
            "Ray was imported before and would listen beyond the loopback",
            evidence=f"it listens at {at}",
            fix="start the run in a process of its own, or start Ray yourself and give --ray_address",
        )
    return ray


def join_ray(address: str) -> Any:
    """A cluster that somebody runs."""
    ray = import_ray()
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{address!r} is no address of a Ray cluster", fix="--ray_address HOST:PORT, often port 6379")
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(
            address=address,
            namespace="kinkajou",
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
    except (OSError, RuntimeError, ValueError, OverflowError, ray.exceptions.RayError) as fault:
        raise UserError(
            f"no Ray cluster could be joined at {address}",
            evidence=str(fault).strip().splitlines()[0][:300],
            fix="start it with the versions of Ray and Python that are here: ray start --head --node-ip-address=HOST",
        ) from None
    return ray


def threads_of(workers: int) -> int:
    """Cores of this machine for each worker."""
    return max(1, (os.cpu_count() or 1) // workers)


def resources(found: dict[str, float]) -> str:
    return f"{found.get('CPU', 0):g} CPU and {found.get('GPU', 0):g} GPU"


def ray_crew(workers: int, address: str | None, weight_bytes: int) -> tuple[Crew, str]:
    """The crew, and the device that its workers compute on: a GPU each where the cluster has as many."""
    if address is None:
        return RayCrew(start_ray(workers, weight_bytes), cpus=threads_of(workers), gpus=0), "cpu"
    ray = join_ray(address)
    enough = ray.cluster_resources().get("GPU", 0) >= workers
    return RayCrew(ray, cpus=1, gpus=int(enough)), "cuda" if enough else "cpu"


def make_ray_engine(
    model: LanguageModel, plan: Callable[[str], Plan], *, workers: int, address: str | None, say: Callable[[str], None]
) -> PoolEngine:
    """An engine whose workers come up with the first weights that it is given."""
    size = sum(param.numel() * param.element_size() for param in model.parameters())
    crew, device = ray_crew(workers, address, size)
    say(f"rollouts: {workers} workers on Ray, {'a GPU each' if device == 'cuda' else 'on CPU'}")
    return PoolEngine(Pool(crew, plan(device), workers=workers, say=say), model)
