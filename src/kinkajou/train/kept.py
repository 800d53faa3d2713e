"""What decides the future of a run besides its settings: copied into checkpoints, put back when the run goes on."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from kinkajou import faults
from kinkajou.data.chat import ChatFormat
from kinkajou.engine.engine import AheadEngine, Answered, Begun
from kinkajou.errors import UserError
from kinkajou.models.adapters import Save
from kinkajou.models.folder import save_shared_critic
from kinkajou.models.forward import PackedModel
from kinkajou.models.load import model_files
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.averages import MovingAverage

STATE = Path("state")
EXACT = "exact weights"


@dataclass(frozen=True)
class Copied:
    """Something as it was: `write` puts it into a folder, on any thread; about how many bytes that takes."""

    write: Callable[[Path], None]
    size: int


class Item(Protocol):
    name: str

    def copied(self, s: Strategy) -> Copied:
        """By all ranks together.  What training does afterwards does not change the copy."""
        ...

    def restore(self, s: Strategy, folder: Path) -> None:
        """By all ranks together."""
        ...


@dataclass
class Kept:
    """Everything that a run has of this kind."""

    items: list[Item] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    """Dataclasses of plain numbers and texts, by name."""
    made_from: dict[str, str] = field(default_factory=dict)
    """Digests of what must be the same when the run goes on: records, tokenizer, models."""

    def copied(self, s: Strategy, *, state: bool) -> list[Copied]:
        """All items, or the models alone."""
        if not state:
            return [item.folder_copied(s) for item in self.items if isinstance(item, ModelFolder)]
        return [item.copied(s) for item in self.items]

    def plain(self) -> dict[str, dict[str, Any]]:
        return {name: asdict(value) for name, value in self.numbers.items()}

    def restore(self, s: Strategy, folder: Path, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        for item in self.items:
            item.restore(s, folder)
        for name, value in self.numbers.items():
            for part in fields(value):
                setattr(value, part.name, numbers[name][part.name])


class ModelFolder:
    """A Hugging Face folder, and the trained weights to the bit where that does not have them (adapters merged in)."""

    def __init__(
        self,
        name: str,
        place: str,
        model: PackedModel,
        form: ChatFormat,
        *,
        lora: Save = "merged",
        average: MovingAverage | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        self.name, self.place, self.model, self.form, self.lora, self.average = name, place, model, form, lora, average
        self.head = head
        """A critic's on the same trunk."""

    @property
    def trained(self) -> dict[str, Tensor]:
        """By the names that the folder has too."""
        if self.average:
            return self.average.weights
        return {name: x for name, x in self.model.module.named_parameters() if x.requires_grad}

    @property
    def adapted(self) -> bool:
        return self.model.module is not self.model.inner

    def copied(self, s: Strategy) -> Copied:
        folder = self.folder_copied(s)
        if not self.adapted:
            return folder
        exact = saved(s, self.name, self.trained)

        def write(path: Path) -> None:
            folder.write(path)
            exact.write(path)

        return Copied(write, folder.size + exact.size)

    def folder_copied(self, s: Strategy) -> Copied:
        """Without what only a run that goes on needs."""
        with self.average.in_place() if self.average else nullcontext():
            weights = s.full_state(self.model.module)
        tokenizer, apart = self.form.tokenizer, self.head is not None
        files = model_files(
            self.model, tokenizer, end_ids=self.form.end_ids, lora=self.lora, weights=weights, apart=apart
        )
        head = s.full(self.head.weight.detach()).clone() if self.head else None

        def write(folder: Path) -> None:
            if weights is not None:
                files(folder / self.place)
                if head is not None:
                    save_shared_critic(self.model.inner.config, head, tokenizer, folder)
            faults.reached("save.model")

        stored = self.trained if self.lora == "adapter" and self.adapted else weights or {}
        return Copied(write, sum(x.nbytes for x in stored.values()))

    def restore(self, s: Strategy, folder: Path) -> None:
        files = (
            state_files(folder, self.name) if self.adapted else sorted((folder / self.place).glob("model*.safetensors"))
        )
        s.fill({name: x.detach() for name, x in self.trained.items()}, files)


class OptimizerState:
    """Adam's moments and step counts by the parameters' names: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""

    def __init__(self, name: str, optimizer: Optimizer, model: nn.Module) -> None:
        self.name, self.optimizer = name, optimizer
        names = {param: name for name, param in model.named_parameters()}
        self.params = {names[param]: param for group in optimizer.param_groups for param in group["params"]}

    def copied(self, s: Strategy) -> Copied:
        state = self.optimizer.state
        tensors = {f"{name}.{key}": x for name, param in self.params.items() for key, x in state[param].items()}
        return saved(s, self.name, tensors)

    def restore(self, s: Strategy, folder: Path) -> None:
        files = state_files(folder, self.name)
        wanted: dict[str, Tensor] = {}
        held = names_in(files)
        for name, param in self.params.items():
            entry = self.optimizer.state[param]
            entry.clear()
            if f"{name}.step" in held:  # a parameter without a gradient so far has none
                entry["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                entry |= {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                wanted |= {f"{name}.{key}": x for key, x in entry.items()}
        s.fill(wanted, files)


class Weights:
    """Tensors of a module that no folder has: a critic's head on the policy's trunk."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name, self.tensors = name, tensors

    def copied(self, s: Strategy) -> Copied:
        return saved(s, self.name, {name: s.full(x.detach()) for name, x in self.tensors.items()})

    def restore(self, s: Strategy, folder: Path) -> None:
        s.fill({name: x.detach() for name, x in self.tensors.items()}, state_files(folder, self.name))


class RandomState:
    """The global generators of python, numpy and torch, those of the GPU included, of every process."""

    name = "random"

    def copied(self, s: Strategy) -> Copied:
        kind, keys, place, has_gauss, gauss = cast(Any, np.random.get_state(legacy=True))
        state = {
            "python": random.getstate(),
            "numpy": [kind, keys.tolist(), place, has_gauss, gauss],
            "torch": torch.get_rng_state().numpy().tobytes().hex(),
            "cuda": [x.numpy().tobytes().hex() for x in torch.cuda.get_rng_state_all()],
        }
        text = json.dumps(s.gather([state]))

        def write(folder: Path) -> None:
            if s.main:
                write_state(folder, "random.json", text)

        return Copied(write, len(text))

    def restore(self, s: Strategy, folder: Path) -> None:
        states = read_state(folder, "random.json")
        if s.rank >= len(states):
            return
        state = states[s.rank]
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        drawn = bytes_of(state["torch"])
        if drawn.numel() != torch.get_rng_state().numel():
            raise ValueError(f"a state of torch's generator of {drawn.numel()} bytes")
        torch.set_rng_state(drawn)
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([bytes_of(x) for x in state["cuda"]])


def seed_generators(seed: int) -> None:
    """Every run begins with the same: what a library draws unasked is a function of the seed too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class BegunAhead:
    """Answers of steps to come, which were begun with weights that are gone by then."""

    name = "ahead"

    def __init__(self, engine: AheadEngine) -> None:
        self.engine = engine

    def copied(self, s: Strategy) -> Copied:
        text = json.dumps([[x.seeds, x.answers, x.behind] for x in self.engine.begun()])

        def write(folder: Path) -> None:
            if s.main:
                write_state(folder, "ahead.json", text)

        return Copied(write, len(text))

    def restore(self, s: Strategy, folder: Path) -> None:
        held = read_state(folder, "ahead.json")
        self.engine.take_up(
            [Begun(tuple(seeds), [Answered(*x) for x in answers], behind) for seeds, answers, behind in held]
        )


def digest_of_format(form: ChatFormat) -> str:
    known = sorted(form.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([known, form.tokenizer.chat_template]).encode()).hexdigest()


def bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def saved(s: Strategy, name: str, tensors: Mapping[str, Tensor]) -> Copied:
    """Tensors as `state/NAME.safetensors`, or as one part of each process where they are shards."""
    writer = s.saver(tensors)

    def write(folder: Path) -> None:
        (folder / STATE).mkdir(exist_ok=True)
        writer(folder / STATE / name)
        faults.reached("save.state")

    return Copied(write, sum(x.nbytes for x in tensors.values()))


def state_files(folder: Path, name: str) -> list[Path]:
    """What `saved` has written."""
    whole = folder / STATE / f"{name}.safetensors"
    found = [whole] if whole.is_file() else sorted((folder / STATE).glob(f"{name}-?????-of-?????.safetensors"))
    if not found:
        raise KeyError(f"no {STATE / name}")  # `reading` says it
    return found


def names_in(files: Iterable[Path]) -> set[str]:
    found: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


def write_state(folder: Path, name: str, text: str) -> None:
    (folder / STATE).mkdir(exist_ok=True)
    (folder / STATE / name).write_text(text, encoding="utf-8")
    faults.reached("save.state")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside, what a whole checkpoint lacks or has otherwise than it was written here is a sentence.

    A manifest proves that files are what somebody sealed, not that this version of kinkajou did.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, SafetensorError) as fault:
        raise UserError(
            f"{folder} holds no state that this run can go on from",
            evidence=f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}",
            fix="take a checkpoint of this version of kinkajou; --from_step names an earlier one",
            exit_code=4,
        ) from fault


def read_state(folder: Path, name: str) -> Any:
    path = folder / STATE / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is a model alone, no run can go on from it",
            evidence=f"there is no {STATE / name}; it was written with --save_state false, or by an older version",
            fix="start from it: --model FOLDER, in another --output",
            exit_code=4,
        ) from None
