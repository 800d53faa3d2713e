"""The numbers of a profile: rows of time and memory that add up, and what they say to change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kinkajou.train.profile_memory import Standing
from kinkajou.train.profile_trace import Scope, Traced

ORDER = ["data", "rollout", "prefill", "decode", "sample", "judge", "score", "update", "forward", "trunk", "attention"]
ORDER += ["head", "backward", "clip", "optimizer"]
SPEEDS = {"rollout", "decode", "score", "update", "forward", "backward"}
"""Rows whose tokens/s mean something."""


@dataclass(frozen=True)
class Measured:
    """One of the steps that ran without the profiler, and what lay in memory in all of them."""

    step_s: float
    all_s: Sequence[float]
    """All of them, the shortest first."""
    phase_s: Mapping[str, float]
    phase_tokens: Mapping[str, float]
    peaks: Mapping[str, int]
    """Most bytes of the process, or of the GPU's allocator, in each phase; "" is outside of all."""
    standing: Standing
    device: str
    threads: int


@dataclass(frozen=True)
class Row:
    path: tuple[str, ...]
    seconds: float  # a step
    share: float  # of the step
    tokens_per_s: float | None = None
    is_leaf: bool = False

    @property
    def name(self) -> str:
        return self.path[-1]


def time_rows(measured: Measured, traced: Traced) -> list[Row]:
    """Where a step's seconds went.  The rows of the first level add up to the step, those below a row to it."""
    whole, rows = measured.step_s, list[Row]()
    known = sorted(measured.phase_s, key=place)
    for phase in known:
        scope = traced.step.inner.get(phase)
        rows += phase_rows(measured, traced, scope or Scope(phase))
    left = max(0.0, whole - sum(measured.phase_s.values()))
    return [*rows, Row(("rest",), left, left / whole, is_leaf=True)]


def phase_rows(measured: Measured, traced: Traced, phase: Scope) -> Iterator[Row]:
    """A phase as it was timed, divided as in the traced step.

    Times of a CPU are scaled, since the profiler slows every operator; a GPU's are taken as they are, and what is left
    of the phase is the GPU's waiting.
    """
    took, tokens = measured.phase_s[phase.name], measured.phase_tokens.get(phase.name)
    scale = took / phase.seconds if phase.seconds else 0.0
    if traced.device:
        scale = min(1.0, scale)

    def walk(scope: Scope, path: tuple[str, ...], seconds: float) -> Iterator[Row]:
        inner = sorted((x for x in scope.inner.values() if x.seconds > 0), key=lambda x: place(x.name))
        # Scoring without a pass, by the engine's own log-probabilities, has no speed.
        says = scope.name in SPEEDS and (scope.name != "score" or bool(inner))
        speed = tokens / seconds if tokens and seconds and says else None
        yield Row(path, seconds, seconds / measured.step_s, speed, is_leaf=not inner)
        for below in inner:
            yield from walk(below, (*path, below.name), below.seconds * scale)
        if not inner:
            return
        left = max(0.0, seconds - scale * sum(x.seconds for x in inner))
        if traced.device and scope is phase:
            busy = scale * max(0.0, scope.seconds - sum(x.seconds for x in inner))
            yield Row((*path, "other kernels"), busy, busy / measured.step_s, is_leaf=True)
            left = max(0.0, left - busy)
        name = "GPU waits" if traced.device and scope is phase else "rest"
        yield Row((*path, name), left, left / measured.step_s, is_leaf=True)

    yield from walk(phase, (phase.name,), took)


def place(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def share_of(rows: list[Row], *names: str, below: str | None = None) -> float:
    """Share of the step of the outermost rows of these names, within a phase if one is named."""
    found = [row for row in rows if row.name in names and not set(row.path[:-1]) & set(names)]
    return sum(row.share for row in found if below is None or below in row.path)


@dataclass(frozen=True)
class Held:
    name: str
    size: int
    share: float | None
    """Of the peak; None for what was gone by then."""


@dataclass(frozen=True)
class Memory:
    rows: list[Held]
    peak: int
    path: tuple[str, ...]
    """Scopes that were open when most tensors were alive."""

    def size(self, name: str) -> int:
        return sum(row.size for row in self.rows if row.name == name)


PASSING, OTHER = "activations, logits, batches", "Python, libraries, data"


def memory_rows(measured: Measured, traced: Traced) -> Memory:
    """What lies in memory at the peak.  Rows with a share add up to it."""
    lies, top = measured.standing, traced.peak
    gradients = min(lies.gradients, top.made) if top.has_gradients else 0
    cache = min(top.cache, top.made - gradients)
    at_peak = {**lies.parts, "gradients": gradients}
    at_peak["KV cache"] = at_peak.get("KV cache", 0) + cache
    at_peak[PASSING] = top.made - gradients - cache
    known = sum(at_peak.values())
    peak = max([known, *measured.peaks.values()])
    at_peak["the allocator's rest" if traced.device else OTHER] = peak - known
    rows = [Held(name, size, size / peak) for name, size in at_peak.items() if size]
    if not gradients and lies.gradients:
        rows.append(Held("gradients, later", lies.gradients, None))
    if not at_peak["KV cache"] and traced.cache:
        rows.append(Held("KV cache, in rollouts", traced.cache, None))
    return Memory(rows, peak, top.path)
