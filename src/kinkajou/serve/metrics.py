"""What Prometheus reads: counted where it happens, in a registry of this server's own."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kinkajou.serve.backend import Backend, Load

QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LOADS: dict[str, tuple[str, Callable[[Load], float]]] = {
    "waiting": ("Answers that wait for a slot", lambda load: load.waiting),
    "running": ("Answers that are decoded now", lambda load: load.running),
    "slots": ("Answers that can be decoded at once", lambda load: load.slots),
    "batch_fill": ("Share of the slots in use", lambda load: load.running / load.slots if load.slots else 0.0),
    "cache_used_tokens": ("Tokens whose keys and values are kept", lambda load: load.used_tokens),
    "cache_room_tokens": ("Tokens that fit", lambda load: load.room_tokens),
}


class Loads(Collector):
    """What the backends are doing at the time of the scrape."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self.backends = backends

    def collect(self) -> Iterable[Metric]:
        found = {name: backend.load for name, backend in self.backends.items()}
        for measure, (words, value) in LOADS.items():
            family = GaugeMetricFamily(f"kinkajou_{measure}", words, labels=["model"])
            for name, load in found.items():
                family.add_metric([name], value(load))
            yield family
        ready = GaugeMetricFamily("kinkajou_ready", "1 if the model answers", labels=["model"])
        for name, backend in self.backends.items():
            ready.add_metric([name], float(backend.state == "ready"))
        yield ready
        yield GaugeMetricFamily("kinkajou_tasks", "Tasks of the event loop", value=len(asyncio.all_tasks()))


class Metrics:
    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(Loads(backends))

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"kinkajou_{name}", words, labels, registry=registry)

        def histogram(name: str, words: str, *labels: str) -> Histogram:
            return Histogram(f"kinkajou_{name}_seconds", words, labels, buckets=QUICK, registry=registry)

        self.requests = counter("requests", "HTTP requests that were answered", "route", "method", "status")
        self.disconnects = counter("disconnects", "Requests whose client left before the answer's end")
        self.jobs = counter("jobs", "Requests to a model by how they ended", "model", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read", "model")
        self.tokens = counter("tokens", "Tokens that were said; its rate is tokens/s", "model")
        self.first_token = histogram("time_to_first_token", "From the request to its first token", "model")
        self.queue_time = histogram("queue_time", "From the request until its prompt has been read", "model")
        self.token_time = histogram("time_per_token", "Between two tokens of an answer", "model")
        self.duration = histogram("job", "From the request to the end of its last answer", "model")
        self.lag = histogram("event_loop_lag", "By how much a timer of the server is late")

    def text(self) -> bytes:
        return generate_latest(self.registry)
