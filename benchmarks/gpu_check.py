"""Whether what runs on the GPU is right: engine against trainer, fused attention against one sequence at a time,
recorded steps against eager ones, pages against slots, and the GPU against the CPU."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_limits import SHAPES, Shape
from benchmarks.gpu_models import PAD, Setting, random_model, random_rows
from kinkajou.batch import Sampling
from kinkajou.engine.cache import Cache, Slots
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.paged import Pages, can_page
from kinkajou.engine.scheduler import Sample
from kinkajou.engine.session import Session
from kinkajou.models.attention import Packed, varlen
from kinkajou.models.attention import Shape as Asked
from kinkajou.models.forward import Dtype, LanguageModel

CHECKED = Shape(512, 1376, 4, 8, 2, 64, 8192, tied=True)
LENGTHS = (1, 200, 37, 64, 5, 129)
BOUNDS = tuple(sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1))
FP32, BF16 = 1e-4, 0.06
"""Nats that log-probabilities may be apart: by the order of sums, by bfloat16's rounding."""
FP32_SHARE, BF16_SHARE = 1e-4, 0.03
"""Of the largest number: how far attention's outputs and gradients may be apart."""
KINDS = {
    "plain": Asked(0, 0.125),
    "window": Asked(0, 0.125, window=33),
    "alibi": Asked(0, 0.125, slopes=torch.tensor([2.0 ** -(i + 1) for i in range(8)])),
}


class Absent(Exception):
    """The device or torch's version has not got what would be checked."""


@dataclass(frozen=True)
class Finding:
    figure: float
    bound: float
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.figure <= self.bound


@torch.no_grad()
def checked_model(here: Setting, dtype: Dtype) -> LanguageModel:
    """With weights large enough that its distributions are not flat."""
    model = random_model(SHAPES["small"] if here.small else CHECKED, here, dtype)
    for param in model.parameters():
        if param.ndim == 2:
            param.mul_(3)
    return model


def prompts_of(model: LanguageModel, count: int = 16) -> list[list[int]]:
    """Of 1 to 61 tokens; every other one twice."""
    vocabulary = int(model.inner.config.vocab_size)
    return [random_rows(1, 1 + 4 * (i // 2), vocabulary, seed=i // 2)[0] for i in range(count)]


def engine_is_trainer(here: Setting, dtype: Dtype, bound: float) -> Finding:
    model = checked_model(here, dtype)
    prompts = prompts_of(model)
    engine = LocalEngine(model, end_ids=[5, 6, 7], pad_id=PAD, max_rows=8)
    rollout = engine.generate(prompts, Sampling(), max_new_tokens=48, seeds=range(len(prompts)))
    with torch.no_grad():
        logp = model(rollout.tokens, rollout.mask).logp
    gap = (rollout.sampler_logp - logp).abs()[rollout.mask]
    return Finding(float(gap.max()), bound, f"mean {float(gap.mean()):.1e} nats over {len(gap)} tokens")


def heads(here: Setting, dtype: torch.dtype, *, backward: bool) -> tuple[Tensor, ...]:
    """Query of 8 heads, key and value of 2."""
    dice = torch.Generator().manual_seed(3)
    made = [torch.randn(1, n, BOUNDS[-1], 64, generator=dice).to(here.device, dtype) for n in (8, 2, 2)]
    return tuple(x.requires_grad_(backward) for x in made)


def packed_attention(here: Setting, how: str, kind: str) -> Finding:
    """Outputs and gradients, against float32 one sequence at a time of the same numbers."""
    flash, packed, asked = how == "flash", Packed(BOUNDS), KINDS[kind]
    if flash and (here.device == "cpu" or varlen() is None):
        raise Absent("flash attention over packed sequences needs CUDA and torch 2.10")
    if asked.slopes is not None:
        asked = Asked(asked.layer, asked.scale, asked.window, asked.slopes.to(here.device))
    backward = here.device != "cpu"  # torch's flex attention has no gradient on a CPU
    given = heads(here, torch.bfloat16 if flash else torch.float32, backward=backward)
    exact = tuple(x.detach().float().requires_grad_(backward) for x in given)
    got, want = getattr(packed, how)(*given, asked), packed.one_by_one(*exact, asked)
    pairs = [(got, want)]
    if backward:
        slope = torch.randn(want.shape, generator=torch.Generator().manual_seed(4)).to(here.device)
        pairs += zip(
            torch.autograd.grad(got, given, slope.to(got.dtype)), torch.autograd.grad(want, exact, slope), strict=True
        )
    shares = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs]
    return Finding(max(shares), BF16_SHARE if flash else FP32_SHARE, "output" + ", gradients" * backward)


def said(model: LanguageModel, cache: Cache, samples: Sequence[Sample], *, room: int, graphs: bool) -> None:
    """Lets all samples run in a session of their own."""
    session = Session(model, cache, rows=8, room=room, end_ids=[])
    if not graphs:
        session.graphs = None
    session.renew(None)
    for sample in samples:
        session.add(sample)
    while session.busy:
        session.step()


def same_answers(here: Setting, dtype: Dtype, first: Callable[..., None], second: Callable[..., None]) -> Finding:
    """Worst gap of log-probabilities where both say the same so far; they must do so for nine tokens of ten."""
    model = checked_model(here, dtype)
    prompts, room = prompts_of(model), 128
    runs = []
    for run in (first, second):
        runs.append([Sample(i, tuple(prompt), i, 48) for i, prompt in enumerate(prompts)])
        run(model, runs[-1], room)
    gaps: list[float] = []
    for a, b in zip(*runs, strict=True):
        for x, y, p, q in zip(a.tokens, b.tokens, a.logps, b.logps, strict=True):
            if x != y:
                break
            gaps.append(abs(p - q))
    share = len(gaps) / sum(len(sample.tokens) for sample in runs[0])
    bound = FP32 if dtype == "fp32" else BF16
    return Finding(
        max(gaps) if share > 0.9 else float("inf"), bound, f"{share:.1%} of tokens before the first other one"
    )


def graphs_are_eager(here: Setting, dtype: Dtype) -> Finding:
    if here.device != "cuda":
        raise Absent("CUDA graphs need CUDA")

    def run(graphs: bool) -> Callable[..., None]:
        return lambda model, samples, room: said(model, Slots(8, room), samples, room=room, graphs=graphs)

    return same_answers(here, dtype, run(True), run(False))


def pages_are_slots(here: Setting) -> Finding:
    if not can_page(torch.device(here.device), torch.bfloat16, alibi=False):
        raise Absent(f"torch {torch.__version__} on {here.device} has no block tables (2.12 and CUDA have)")

    def pages(model: LanguageModel, samples: Sequence[Sample], room: int) -> None:
        said(model, Pages(8, room, model.device), samples, room=room, graphs=True)

    def slots(model: LanguageModel, samples: Sequence[Sample], room: int) -> None:
        said(model, Slots(8, room), samples, room=room, graphs=True)

    return same_answers(here, "bf16", pages, slots)


def gpu_is_cpu(here: Setting) -> Finding:
    """Log-probabilities and the gradient's norm of one packed batch."""
    if here.device != "cuda":
        raise Absent("there is no GPU to compare")
    model = checked_model(here, "fp32")
    other = copy.deepcopy(model).cpu()
    rows = torch.tensor(random_rows(4, 65, int(model.inner.config.vocab_size)))
    mask = torch.arange(64)[None] < torch.tensor([[64], [13], [40], [1]])
    found = []
    for each, device in ((model, here.device), (other, "cpu")):
        logp = each(rows.to(device), mask.to(device)).logp
        logp.sum().backward()
        norms = [p.grad.norm() for p in each.parameters() if p.grad is not None]
        found.append((logp.detach().cpu(), float(torch.stack(norms).norm())))
    (a, norm), (b, want) = found
    return Finding(max(float((a - b).abs().max()), abs(norm / want - 1)), FP32, "log-probabilities and gradient norm")


def checks(here: Setting) -> dict[str, Callable[[], Finding]]:
    found: dict[str, Callable[[], Finding]] = {
        "engine = trainer, fp32": lambda: engine_is_trainer(here, "fp32", FP32),
        "engine = trainer, bf16": lambda: engine_is_trainer(here, "bf16", BF16),
        "GPU = CPU, fp32": lambda: gpu_is_cpu(here),
    }
    for how, kinds in {"flash": ("plain", "window"), "flex": tuple(KINDS)}.items():
        for kind in kinds:
            found[f"{how} = one sequence at a time, {kind}"] = lambda how=how, kind=kind: packed_attention(
                here, how, kind
            )  # type: ignore[misc]
    for dtype in ("fp32", "bf16"):
        found[f"graphs = eager, {dtype}"] = lambda dtype=dtype: graphs_are_eager(here, dtype)  # type: ignore[misc]
    found["pages = slots, bf16"] = lambda: pages_are_slots(here)
    return found
