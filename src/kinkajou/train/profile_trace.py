"""What torch's trace of one step says: time and memory of each scope, and the operators.

A scope is a `record_function("kinkajou/NAME")` of ours.  The trace is Chrome's format: microseconds; `cat` is
user_annotation for scopes, cpu_op for operators, kernel and gpu_* for what ran on a GPU.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Event = Mapping[str, Any]
PREFIX, STEP, CACHE = "kinkajou/", "step", "cache"
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
WHOLE = {"judge", "backward", "clip", "optimizer", "sample"}
"""Scopes that are shown as one: what recomputation or another model opens inside them is theirs."""
ENGINE = {"prefill", "decode"}
"""Scopes of which the forward pass is nearly all: no row for its trunk and head."""
NAMES = {"train": "update"}


@dataclass
class Scope:
    """All the times one scope was open at its place among the others, together."""

    name: str
    seconds: float = 0.0
    calls: int = 0
    growth: int = 0
    """Bytes of tensors alive at once above what lay there when it was entered: the most of its times."""
    inner: dict[str, "Scope"] = field(default_factory=dict)

    def at(self, *path: str) -> "Scope | None":
        found: Scope | None = self
        for name in path:
            found = found and found.inner.get(name)
        return found

    def walk(self) -> Iterator["Scope"]:
        yield self
        for scope in self.inner.values():
            yield from scope.walk()


@dataclass
class Peak:
    """The moment at which most tensors of the step were alive."""

    made: int = 0  # bytes above the step's start
    path: tuple[str, ...] = ()
    cache: int = 0  # of them keys and values
    has_gradients: bool = False


@dataclass(frozen=True)
class Operator:
    name: str
    seconds: float  # without what it called
    calls: int


@dataclass(frozen=True)
class Traced:
    step: Scope
    device: bool
    """Whether seconds of scopes and operators are a GPU's; the step's own are wall time."""
    wall_s: float
    device_s: float
    operators: list[Operator]  # the most expensive first
    peak: Peak
    cache: int
    """Most bytes of keys and values at once."""

    @property
    def outside_s(self) -> float:
        """Seconds of the step in no operator."""
        return max(0.0, self.wall_s - sum(item.seconds for item in self.operators))


@dataclass
class Open:
    scope: Scope
    end: float
    base: int
    counts: bool  # False: folded into the scope around it
    most: int = 0


def read(events: Sequence[Event]) -> Traced:
    """The step's scopes, operators and memory.  The trace holds one scope `kinkajou/step`."""
    whole = next(e for e in events if is_scope(e) and e["name"] == PREFIX + STEP)
    start, end = whole["ts"], whole["ts"] + whole["dur"]
    own = [e for e in events if ("ts" in e and start <= e["ts"] < end) or e.get("cat") in ON_DEVICE]
    kernels = launched(own)
    device = bool(kernels)
    sweep = Sweep(device)
    for event, kind in moments(own, whole["tid"], kernels):
        sweep.take(event, kind)
    sweep.close(float("inf"))
    wall = whole["dur"] / 1e6
    device_s = sum(seconds for _, seconds in kernels)
    sweep.root.seconds = wall
    found = of_device(own, kernels) if device else of_host(e for e in own if e.get("tid") == whole["tid"])
    return Traced(sweep.root, device, wall, device_s, found, sweep.peak, sweep.cache_most)


def is_scope(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)


def launched(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """What ran on the device, by the call that launched it, and its seconds; overlap counts for the earlier one."""
    calls = {
        e["args"]["correlation"]: e for e in events if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
    }
    found, done = [], 0.0
    for e in sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: float(e["ts"])):
        call, end = calls.get(e.get("args", {}).get("correlation")), e["ts"] + e["dur"]
        if call is not None and end > done:
            found.append((call, (end - max(done, e["ts"])) / 1e6))
        done = max(done, end)
    return found


Kind = Literal["scope", "memory", "kernel"]


def moments(
    events: Iterable[Event], thread: Any, kernels: Sequence[tuple[Event, float]]
) -> Iterator[tuple[dict[str, Any], Kind]]:
    """Scopes of the step's thread, allocations and launches, in the order of time; outer scopes before inner ones."""
    found: list[tuple[tuple[float, float], dict[str, Any], Kind]] = []
    for e in events:
        if is_scope(e) and e["tid"] == thread and e["name"] != PREFIX + STEP:
            found.append(((e["ts"], -e["dur"]), dict(e), "scope"))
        elif e.get("name") == "[memory]" and bool(e["args"]["Device Type"]) == bool(kernels):
            found.append(((e["ts"], 0.0), dict(e["args"], ts=e["ts"]), "memory"))
    for call, seconds in kernels:
        found.append(((call["ts"], 0.0), {"ts": call["ts"], "seconds": seconds}, "kernel"))
    yield from ((event, kind) for _, event, kind in sorted(found, key=lambda item: item[0]))


class Sweep:
    """Goes through the moments with the scopes that are open."""

    def __init__(self, device: bool) -> None:
        self.device, self.root, self.peak = device, Scope(STEP), Peak()
        self.open = [Open(self.root, float("inf"), 0, True)]
        self.alive = 0
        self.gradients = False
        self.caching: list[float] = []
        self.cached: dict[int, int] = {}
        self.cache_most = 0

    def take(self, event: dict[str, Any], kind: Kind) -> None:
        self.close(event["ts"])
        if kind == "scope":
            self.enter(event)
        elif kind == "kernel":
            for held in self.open[1:]:
                held.scope.seconds += event["seconds"] if held.counts else 0.0
        else:
            self.allocate(event)

    def enter(self, event: dict[str, Any]) -> None:
        name, around = event["name"].removeprefix(PREFIX), self.open[-1]
        name, end = NAMES.get(name, name), min(event["ts"] + event["dur"], around.end)
        if name == CACHE:
            self.caching = [end]
        if folded(name, [held.scope.name for held in self.open]):
            self.open.append(Open(around.scope, end, self.alive, False))
            return
        scope = around.scope.inner.setdefault(name, Scope(name))
        scope.calls += 1
        if not self.device:
            scope.seconds += (end - event["ts"]) / 1e6
        self.open.append(Open(scope, end, self.alive, True))

    def close(self, now: float) -> None:
        """Closes what has ended."""
        self.caching = [end for end in self.caching if end > now]
        while len(self.open) > (1 if now < float("inf") else 0) and self.open[-1].end <= now:
            held = self.open.pop()
            held.scope.growth = max(held.scope.growth, held.most)
            if held.counts and held.scope.name == "backward":
                self.gradients = True
            if held.counts and held.scope.name == "optimizer":
                self.gradients = False

    def allocate(self, event: dict[str, Any]) -> None:
        size, place = event["Bytes"], event["Addr"]
        self.alive += size
        if size > 0 and self.caching:
            self.cached[place] = size
        elif size < 0:
            self.cached.pop(place, None)
        cache = sum(self.cached.values()) if self.cached else 0
        self.cache_most = max(self.cache_most, cache)
        for held in self.open:
            held.most = max(held.most, self.alive - held.base)
        if self.alive > self.peak.made:
            path = tuple(dict.fromkeys(held.scope.name for held in self.open[1:]))
            late = self.gradients or bool({"backward", "clip", "optimizer"} & set(path))
            self.peak = Peak(self.alive, path, cache, late)


def folded(name: str, around: Sequence[str]) -> bool:
    """Whether a scope has no row of its own."""
    inside = set(around)
    return (
        name == CACHE
        or name == around[-1]
        or bool(WHOLE & inside)
        or (name in ("trunk", "head") and bool(ENGINE & inside))
    )


# --- operators --------------------------------------------------------------------------------------------


def of_host(events: Iterable[Event]) -> list[Operator]:
    """Time of each operator without the operators it calls, on one thread."""
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    stack: list[tuple[str, float]] = []  # name, end
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    for e in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        while stack and stack[-1][1] <= e["ts"]:
            stack.pop()
        end = min(e["ts"] + e["dur"], stack[-1][1]) if stack else e["ts"] + e["dur"]
        name, took = e["name"], (end - e["ts"]) / 1e6
        seconds[name] = seconds.get(name, 0.0) + took
        calls[name] = calls.get(name, 0) + 1
        if stack:
            seconds[stack[-1][0]] -= took
        stack.append((name, end))
    return ordered(seconds, calls)


def of_device(events: Iterable[Event], kernels: Sequence[tuple[Event, float]]) -> list[Operator]:
    """Device time by the innermost operator that launched it."""
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    stacks: dict[Any, list[tuple[str, float]]] = {}
    ops = [((e["ts"], -e["dur"]), e, None) for e in events if e.get("cat") == "cpu_op"]
    runs = [((call["ts"], 0.0), call, took) for call, took in kernels]
    for _, e, took in sorted([*ops, *runs], key=lambda item: item[0]):
        stack = stacks.setdefault(e["tid"], [])
        while stack and stack[-1][1] <= e["ts"]:
            stack.pop()
        if took is None:
            stack.append((e["name"], e["ts"] + e["dur"]))
            continue
        name = stack[-1][0] if stack else e["name"]  # a graph is launched by no operator
        seconds[name] = seconds.get(name, 0.0) + took
        calls[name] = calls.get(name, 0) + 1
    return ordered(seconds, calls)


def ordered(seconds: dict[str, float], calls: dict[str, int]) -> list[Operator]:
    names = sorted(seconds, key=lambda name: -seconds[name])
    return [Operator(name, seconds[name], calls[name]) for name in names]
