"""The C kernel of decode attention against its definition; how it is built, and what happens where it cannot be."""

import math
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kinkajou.batch import Sampling
from kinkajou.engine import native
from kinkajou.engine.cache import Slots
from kinkajou.engine.engine import LocalEngine
from kinkajou.models.attention import Shape
from kinkajou.models.forward import LanguageModel
from tiny import FOUR, PAD, ours, peer, tiny_config

KINDS = {
    "plain": Shape(0, 0.25),
    "window": Shape(0, 0.25, window=4),
    "alibi": Shape(0, 0.25, slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.3, 0.2])),
}
POSITIONS = [0, 3, 4, 37, 60]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    native.library.cache_clear()


def need_compiler() -> None:
    """A machine without one has no kernel, as it should; with one, the kernel must be there."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine: the other way of decoding is tested")
    assert native.missing() is None


def by_loops(q: Tensor, keys: Tensor, values: Tensor, at: int, shape: Shape, head: int) -> list[float]:
    """One query over keys 0..at in float64."""
    first = 0 if shape.window is None else max(0, at - shape.window + 1)
    scores = []
    for j in range(first, at + 1):
        score = sum(a * b for a, b in zip(q.tolist(), keys[j].tolist(), strict=True)) * shape.scale
        scores.append(score + (float(shape.slopes[head]) * (j - at) if shape.slopes is not None else 0.0))
    top = max(scores)
    mass = [math.exp(score - top) for score in scores]
    rows = values[first : at + 1].tolist()
    return [sum(m * row[c] for m, row in zip(mass, rows, strict=True)) / sum(mass) for c in range(len(rows[0]))]


@pytest.mark.parametrize("own", [True, False], ids=["kernel", "products"])
@pytest.mark.parametrize("g", [6, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_by_definition(kind: str, g: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways on a CPU; key and value are kept, other slots are not touched, strided inputs are read right."""
    if own:
        need_compiler()
    else:
        monkeypatch.setenv(native.SWITCH, "off")
    native.library.cache_clear()
    generator = torch.Generator().manual_seed(g)
    slots, shape = Slots(7, 64), KINDS[kind]
    slots.layer(0, torch.zeros(1, g, 1, 20))
    for store in (slots.keys, slots.values):
        store[0].copy_(torch.randn(7, g, 64, 20, generator=generator))
    before = slots.keys[0].clone()
    wide = torch.randn(5, 1, (6 + 2 * g) * 20, generator=generator)  # as one product makes them
    query, key, value = (x.view(5, 1, -1, 20).transpose(1, 2) for x in wide.split([6 * 20, g * 20, g * 20], dim=-1))
    layout = slots.decode(torch.tensor(POSITIONS), 61)
    assert (layout.function is not None) == own  # type: ignore[attr-defined]
    got = layout.attend(query, key, value, shape)
    for row, at in enumerate(POSITIONS):
        assert torch.equal(slots.keys[0][row, :, at], key[row, :, 0])
        assert torch.equal(slots.values[0][row, :, at], value[row, :, 0])
        for head in range(6):
            kept = slots.keys[0][row, head * g // 6], slots.values[0][row, head * g // 6]
            want = by_loops(query[row, head, 0], *kept, at, shape, head)
            assert got[row, head, 0].tolist() == pytest.approx(want, abs=2e-6)
    assert torch.equal(slots.keys[0][5:], before[5:])


@pytest.mark.parametrize("name", FOUR)
def test_an_engine_without_the_kernel_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(ours(AutoModelForCausalLM, tiny_config(name), peer(AutoModelForCausalLM, tiny_config(name))))
    prompts = [[5, 6, 7, 8, 9], [11], [20, 21, 22]] * 3

    def rollout(dtype: str) -> tuple[Tensor, Tensor]:
        model.dtype = dtype  # type: ignore[assignment]
        native.library.cache_clear()
        engine = LocalEngine(model, end_ids=range(2, 8), pad_id=PAD, max_rows=4)
        got = engine.generate(prompts, Sampling(0.8, 30), max_new_tokens=12, seeds=range(9))
        return got.tokens, got.sampler_logp

    want = rollout("fp32")
    with_bf16 = rollout("bf16")
    monkeypatch.setenv(native.SWITCH, "off")
    got = rollout("fp32")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=0)
    assert rollout("bf16")[1].shape[0] == with_bf16[1].shape[0]


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    """A single key: attention hands its value through, so it must come out as it went in."""
    need_compiler()
    kernel = native.kernel(torch.bfloat16)
    assert kernel is not None
    values = torch.tensor([0.0, -1.0, 3.140625, 1e-38, 3.0e38, -65504.0, 0.333984375, 7.0]).bfloat16()
    value = values.view(1, 1, 1, 8)
    kept = torch.zeros(1, 1, 2, 8).bfloat16()
    got = kernel(
        torch.zeros_like(value),
        value,
        value,
        kept.clone(),
        kept,
        torch.tensor([0]),
        scale=1.0,
        window=None,
        slopes=None,
    )
    assert torch.equal(got.flatten(), values)


def test_the_library_is_built_once_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    assert native.missing() is None
    (built,) = (tmp_path / "kinkajou").iterdir()
    assert stat.S_IMODE((tmp_path / "kinkajou").stat().st_mode) == 0o700
    made = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.missing() is None
    assert built.stat().st_mtime_ns == made


def test_without_a_compiler_the_reason_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, reason in (("no-such-compiler", "no C compiler"), ("false", "could not build")):
        monkeypatch.setenv("CC", compiler)
        native.library.cache_clear()
        assert reason in str(native.missing())
        assert native.kernel(torch.float32) is None
    monkeypatch.setenv(native.SWITCH, "off")
    native.library.cache_clear()
    assert "off" in str(native.missing())
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_that_computes_wrong_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "attention.c"
    source.write_text(native.SOURCE.read_text().replace("score *= scale;", "score *= 2 * scale;"))
    need_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCE", source)
    native.library.cache_clear()
    assert "differ" in str(native.missing())
    assert native.kernel(torch.float32) is None
