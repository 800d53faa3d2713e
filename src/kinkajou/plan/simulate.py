"""What a simulated step told: memory of one rank by kind at its fullest, traffic, and whether a setting fits."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kinkajou.plan.architecture import GATED, Architecture

KINDS = ("parameters", "gathered", "gradients", "optimizer", "activations", "temporaries")
"""gathered: whole weights for the time of their use, and the buffers of gathering; gradients: with their buffers."""


@dataclass(frozen=True)
class Standing:
    """What a model keeps between passes."""

    device: Mapping[str, int]
    host: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.device.values())


@dataclass(frozen=True)
class Passed:
    """One rank in one pass of the trainer's code: a model's optimiser step, or its scoring."""

    name: str
    model: str
    device: Mapping[str, int]
    """Bytes by kind at the fullest moment, of the model at work."""
    host: int
    calls: Mapping[str, int]
    """Collectives by kind."""
    sent: Mapping[str, int]
    """Bytes that the rank sends in them, as rings send."""
    times: int = 1
    """How often a step of training makes this pass."""


@dataclass(frozen=True)
class Simulation:
    """`setting`: what was simulated, by name.  `standing`: of each model."""

    setting: Mapping[str, Any]
    ranks: int
    standing: Mapping[str, Standing]
    passes: tuple[Passed, ...] = ()
    engine: int = 0
    """Bytes of a copy of the policy that answers are sampled from."""
    seconds: float = 0.0

    def during(self, one: Passed) -> Counter[str]:
        """The device's bytes by kind while that pass is at its fullest, other models and the engine's copy included."""
        found = Counter(one.device)
        for name, model in self.standing.items():
            if name != one.model:
                found.update(model.device)
        found["engine"] += self.engine
        return found

    @property
    def fullest(self) -> Passed | None:
        return max(self.passes, key=lambda one: self.during(one).total(), default=None)

    @property
    def split(self) -> Counter[str]:
        """Bytes by kind at the fullest moment of a step."""
        if one := self.fullest:
            return self.during(one)
        found = Counter({"engine": self.engine})
        for model in self.standing.values():
            found.update(model.device)
        return found

    @property
    def peak(self) -> int:
        return self.split.total()

    @property
    def host(self) -> int:
        """Bytes of this rank on the host."""
        apart = {name: model.host for name, model in self.standing.items()}
        passing = (one.host - apart[one.model] for one in self.passes)
        return sum(apart.values()) + max(passing, default=0)

    @property
    def calls(self) -> Counter[str]:
        """Collectives of a step of training."""
        return summed((one.calls, one.times) for one in self.passes)

    @property
    def sent(self) -> Counter[str]:
        return summed((one.sent, one.times) for one in self.passes)

    def fits(self, memory: float) -> bool:
        return self.peak <= memory


def summed(rows: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for row, times in rows:
        found.update({name: times * x for name, x in row.items()})
    return found


@dataclass(frozen=True)
class Change:
    """A step on the way to a setting that fits: flags and their values."""

    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return " ".join(f"--{name} {str(value).lower()}" for name, value in self.flags.items()) or "as it is"


def ladder(strategy: str, *, checkpointing: bool, lora: bool, ranks: int, tp: int, row: int) -> Iterator[Change]:
    """Changes in the order in which they cost speed or quality, each added to those before."""
    flags: dict[str, Any] = {}
    yield Change()
    if not checkpointing:
        flags["gradient_checkpointing"] = True
        yield Change(dict(flags))
    if strategy != "zero3" and ranks > 1:
        flags["strategy"] = "zero3"
        yield Change(dict(flags))
    flags["tokens_per_microbatch"] = row
    yield Change(dict(flags))
    if ranks > 1:
        yield Change(flags | {"strategy": "gemini", "device_share": 0.0})
    if tp == 1 and ranks % 8 == 0:
        yield Change(flags | {"tp": 8})
    if not lora:
        yield Change(flags | {"lora_rank": 16})


def settings_of(shape: Architecture) -> dict[str, Any]:
    """The entries of a config.json, from sizes."""
    common = {"model_type": shape.family, "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied}
    if shape.family in ("gpt2", "bloom"):
        width = "n_embd" if shape.family == "gpt2" else "hidden_size"
        common |= {width: shape.width, "n_layer": shape.layers, "n_head": shape.heads}
        return common | ({"n_inner": shape.inner, "n_positions": shape.positions} if shape.family == "gpt2" else {})
    common |= {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
    }
    if shape.family in GATED:
        return common | {
            "intermediate_size": shape.inner,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_size,
        }
    return common | {
        "ffn_dim": shape.inner,
        "max_position_embeddings": shape.positions - 2,
        "word_embed_proj_dim": shape.embedded or shape.width,
        "do_layer_norm_before": not shape.embedded,
    }


def as_row(change: Change, found: Simulation) -> dict[str, Any]:
    """The report, for programs; sizes in bytes."""
    return {
        "change": change.text,
        "setting": dict(found.setting),
        "ranks": found.ranks,
        "peak": found.peak,
        "in": found.fullest.name if found.fullest else None,
        "split": dict(found.split),
        "host": found.host,
        "calls": dict(found.calls),
        "sent": dict(found.sent),
        "seconds": round(found.seconds, 1),
    }


def lines(change: Change, found: Simulation, memory: float | None) -> Iterator[str]:
    """The report, for people."""
    names = ", ".join(f"{name} {value}" for name, value in found.setting.items())
    yield f"simulated {change.text}: {found.ranks} ranks; {names}; {found.seconds:.0f} s"
    where = f", in {found.fullest.name}" if found.fullest else ", before any pass"
    verdict = "" if memory is None else ": it fits" if found.fits(memory) else ": it does not fit"
    limit = "" if memory is None else f" of {memory / 2**30:.0f} GB"
    yield f"  device  {found.peak / 2**30:.2f} GB{limit} a rank at the fullest moment{where}{verdict}"
    yield "          " + ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in found.split.items() if size)
    if found.host:
        yield f"  host    {found.host / 2**30:.2f} GB a rank"
    if found.calls:
        said = ", ".join(f"{found.calls[k]} {k} ({found.sent[k] / 2**30:.2f} GB)" for k in sorted(found.calls))
        yield f"  traffic of a step, sent by a rank: {found.sent.total() / 2**30:.2f} GB in {said}"
