"""The server in front of models that repeat what they are told: `python -m tests.serve.browser_server PORT [KEY]`."""

import asyncio
import sys

import uvicorn
from benchmarks.serving.stub import Stub

from kinkajou.serve.app import make_app
from kinkajou.serve.desk import Desk
from kinkajou.serve.house import House
from kinkajou.serve.limits import Limits
from kinkajou.serve.metrics import Metrics

MODELS = (Stub("quick", context=100_000), Stub("slow", pause_s=0.05), Stub("brief", context=20))


async def main(port: int, key: str) -> None:
    backends = {model.name: model for model in MODELS}
    for model in MODELS:
        await model.start()
    desk = Desk(Limits(), Metrics(backends), queue=64)
    app = make_app(House(backends=backends, desk=desk, key=key.encode() or None))
    await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")).serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), (sys.argv[2:] or [""])[0]))
