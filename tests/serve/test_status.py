"""/health, /ready and /metrics as the state changes; the schema."""

import asyncio
import re

import pytest
from benchmarks.serving.stub import Stub, StubScorer
from place import Place, make_house, served

from kinkajou.serve.app import make_app


@pytest.mark.parametrize(("state", "status"), [("ready", 200), ("starting", 503), ("broken", 503), ("closed", 503)])
def test_ready_is_the_worst_of_all_models(state: str, status: int) -> None:
    async def ask() -> None:
        first, second = Stub("first"), Stub("second")
        async with served(make_house({"first": first, "second": second})) as place:
            second.state = state  # type: ignore[assignment]
            answer = await place.client.get("/ready")
            assert answer.status_code == status
            assert answer.json() == {"status": state, "models": {"first": "ready", "second": state}}
            assert (await place.client.get("/health")).status_code == 200

    asyncio.run(ask())


def test_the_reward_model_counts() -> None:
    async def ask() -> None:
        judge = StubScorer()
        async with served(make_house(scorer=judge)) as place:
            judge.state = "broken"
            answer = await place.client.get("/ready")
            assert (answer.status_code, answer.json()["models"][judge.name]) == (503, "broken")

    asyncio.run(ask())


SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+(Inf)?')


def test_metrics_are_what_prometheus_reads() -> None:
    async def ask(place: Place) -> str:
        answer = await place.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return answer.text

    async def run() -> str:
        async with served() as place:
            await asyncio.sleep(0.25)  # two ticks, so that the loop's lag is known
            return await ask(place)

    text = asyncio.run(run())
    for line in text.splitlines():
        assert line.startswith("# ") or SAMPLE.fullmatch(line.replace('le="+Inf"', 'le="inf"')), line
    gauges = ("waiting", "running", "slots", "batch_fill", "cache_used_tokens", "cache_room_tokens", "ready", "tasks")
    for name in gauges:
        assert re.search(rf"^kinkajou_{name}[ {{]", text, re.MULTILINE), name
    lag = re.search(r"^kinkajou_event_loop_lag_seconds_count ([0-9.]+)", text, re.MULTILINE)
    assert lag
    assert float(lag[1]) >= 1


def test_the_schema_tells_errors_and_has_no_other_pages() -> None:
    schema = make_app(make_house()).openapi()
    assert schema["info"]["title"] == "Kinkajou"
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            told = operation["responses"]
            assert {"default", "4XX"} & set(told), f"{method} {path} does not document its errors"
            assert "HTTPValidationError" not in str(told), f"{method} {path}"
