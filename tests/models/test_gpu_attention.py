"""The GPU's ways through attention, on a CPU: what is handed to torch's kernels, against one sequence at a time.

The kernels themselves are stood in for by their definition; `benchmarks/gpu.py` runs the real ones.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kinkajou.batch import Sampling
from kinkajou.engine import engine as engine_module
from kinkajou.engine import paged
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.paged import Pages
from kinkajou.models import attention
from kinkajou.models.attention import Packed, Shape, flexed
from kinkajou.models.forward import LanguageModel
from tiny import PAD, ours, peer, tiny_config

BOUNDS = (0, 5, 6, 13)
KINDS = {
    "plain": Shape(0, 0.3),
    "window": Shape(0, 0.3, window=3),
    "alibi": Shape(0, 0.3, slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
}


def heads(g: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(1, n, BOUNDS[-1], 16, generator=generator) for n in (4, g, g))  # type: ignore[return-value]


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """varlen_attn as its documentation says it: causal at the end of the keys, a window, pages by a table."""
    assert cu_seq_q.dtype == torch.int32
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[-2])
    out = torch.zeros_like(query)
    for i, (a, b) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        if block_table is None:
            assert cu_seq_k is not None
            keys, values = key[cu_seq_k[i] : cu_seq_k[i + 1]], value[cu_seq_k[i] : cu_seq_k[i + 1]]
        else:
            assert seqused_k is not None
            assert seqused_k.dtype == block_table.dtype == torch.int32
            pages, used = block_table[i].long(), int(seqused_k[i])
            keys, values = (x[pages].flatten(0, 1)[:used] for x in (key, value))
        assert b - a <= max_q
        assert len(keys) <= max_k
        repeat = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(repeat, 1) for x in (keys, values))
        for t in range(a, b):
            at = len(keys) - (b - t)
            low = 0 if window_size[0] < 0 else max(0, at - window_size[0])
            scores = torch.einsum("hd,khd->hk", query[t], keys[low : at + 1]) * scale
            out[t] = torch.einsum("hk,khd->hd", scores.softmax(-1), values[low : at + 1])
    return out


@pytest.mark.parametrize("g", [4, 2])
@pytest.mark.parametrize("kind", ["plain", "window"])
def test_flash_is_handed_what_it_expects(kind: str, g: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen", lambda: by_definition)
    packed, (query, key, value) = Packed(BOUNDS), heads(g)
    got = packed.flash(query, key, value, KINDS[kind])
    torch.testing.assert_close(got, packed.one_by_one(query, key, value, KINDS[kind]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("g", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_flex_is_the_same_attention(kind: str, g: int) -> None:
    packed, (query, key, value) = Packed(BOUNDS), heads(g)
    owners = torch.tensor([0] * 5 + [1] + [2] * 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex attention without torch.compile warns that it is slow
        got = packed.flex(query, key, value, KINDS[kind])
        same = flexed(query, key, value, owners, KINDS[kind])
    torch.testing.assert_close(got, packed.one_by_one(query, key, value, KINDS[kind]), atol=1e-5, rtol=0)
    assert torch.equal(got, same)


def test_pages_are_shared_copied_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PAGE", 4)
    pages = Pages(3, 10, torch.device("cpu"))  # three pages a slot
    rows = torch.arange(10.0).view(10, 1, 1)
    pages.take(0)
    paged.write(
        pages.layer(0, rows), pages.places(torch.zeros(6, dtype=torch.long), torch.arange(6)), rows[:6], rows[:6]
    )
    pages.copy(0, 1, 6)
    assert pages.held[1][0] == pages.held[0][0]
    assert not set(pages.held[1][1:]) & set(pages.held[0])
    for slot in (0, 1):
        at = pages.places(torch.full((6,), slot), torch.arange(6))
        assert pages.keys[0].flatten(0, 1)[at].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    free = len(pages.free)
    pages.release(0)
    assert len(pages.free) == free + 2  # the first page is still read by slot 1
    pages.move(1, 0, 6)
    assert pages.held[1] == []
    assert pages.table[1].tolist() == [0, 0, 0]
    pages.release(0)
    assert sorted(pages.free) == list(range(1, 10))
    assert not any(pages.users)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_paged_decoding_says_what_slots_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole engine over pages: groups that share a prompt, refill, moves."""
    reference = peer(AutoModelForCausalLM, tiny_config(name))
    model = LanguageModel(ours(AutoModelForCausalLM, tiny_config(name), reference))
    prompts = [prompt for prompt in ([5, 6, 7, 8, 9], [11, 12, 13, 14]) for _ in range(6)] + [[20, 21]] * 3

    def answers(**settings: Any) -> Any:
        engine = LocalEngine(model, end_ids=range(2, 12), pad_id=PAD, max_rows=5)
        return engine.generate(prompts, Sampling(0.9, 30), max_new_tokens=14, seeds=range(15))

    want = answers()
    monkeypatch.setattr(paged, "PAGE", 4)
    monkeypatch.setattr(paged, "varlen", lambda: by_definition)
    monkeypatch.setattr(engine_module, "can_page", lambda *args, **settings: True)
    got = answers()
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.sampler_logp, want.sampler_logp, atol=1e-5, rtol=0)


def test_pages_need_a_gpu_half_precision_and_a_plain_model() -> None:
    assert not paged.can_page(torch.device("cpu"), torch.bfloat16, alibi=False)
    assert not paged.can_page(torch.device("cuda"), torch.float32, alibi=False)
    assert not paged.can_page(torch.device("cuda"), torch.bfloat16, alibi=True)
