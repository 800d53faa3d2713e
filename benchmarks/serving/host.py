"""The server in front of the stub: `python -m benchmarks.serving.host --port 7070 --pause 0.01`."""

import argparse
import asyncio
import os
import sys

from benchmarks.serving.client import HOST
from benchmarks.serving.stub import Stub, StubScorer
from kinkajou.serve.app import make_app
from kinkajou.serve.bind import taken
from kinkajou.serve.desk import Desk
from kinkajou.serve.house import House
from kinkajou.serve.limits import Limits
from kinkajou.serve.metrics import Metrics
from kinkajou.serve.server import Server, make_server


def house(backend: Stub, *, queue: int = 64, key: bytes | None = None, limits: Limits | None = None) -> House:
    backends = {backend.name: backend}
    desk = Desk(limits or Limits(), Metrics(backends), queue=queue)
    return House(backends=backends, desk=desk, scorer=StubScorer(), key=key)


def server(home: House, drain_s: float) -> Server:
    return make_server(make_app(home), home, drain_s=drain_s)


async def host(given: argparse.Namespace) -> int:
    key = os.environ.get("KINKAJOU_API_KEY", "").encode() or None
    backend = Stub(pause_s=given.pause, slots=given.slots)
    await backend.start()
    home = house(backend, queue=given.queue, key=key)
    assert home.scorer is not None
    await home.scorer.start()
    made = server(home, given.drain_s)
    with taken(HOST, given.port, has_key=key is not None, send_buffer_bytes=home.limits.send_buffer_bytes) as place:
        await made.announced(place, f"http://{HOST}:{place.getsockname()[1]}")
    await backend.close()
    return made.exit_code


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--pause", type=float, default=0.0, help="seconds before each token")
    flags.add_argument("--slots", type=int, default=16)
    flags.add_argument("--queue", type=int, default=64)
    flags.add_argument("--drain_s", type=float, default=30.0)
    return asyncio.run(host(flags.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
