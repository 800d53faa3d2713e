"""The GPU benchmark without a GPU: its arithmetic against numbers by hand, its checks and rows on a tiny model."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import ROWS, main, run_check, run_row
from benchmarks.gpu_check import BF16, FP32, Finding, checked_model, engine_is_trainer, said, same_answers
from benchmarks.gpu_limits import (
    PEAKS,
    SHAPES,
    Peak,
    Shape,
    activation_bytes,
    decoding_bytes,
    peak_of,
    plan,
    training_bytes,
    training_flops,
)
from benchmarks.gpu_models import Setting, config_of, end_ids, random_model
from benchmarks.gpu_page import AIMS, UNMEASURED, page, told, wrong
from benchmarks.gpu_peers import lengths_of
from benchmarks.gpu_rows import decode, guarded, rollouts, sft
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from kinkajou.engine.cache import Slots
from kinkajou.errors import UserError

HERE = Setting("cpu", small=True, repetitions=1)
BY_HAND = Shape(hidden=4, intermediate=10, layers=3, heads=2, kv_heads=1, head_size=5, vocabulary=7, tied=False)
"""A layer: query 4 x 10, key and value 4 x 5 each, output 10 x 4, MLP 3 x 40: 240 weights; head 28."""


def test_parameters_by_hand_and_as_transformers_counts_them() -> None:
    assert BY_HAND.layer_products == 240
    assert BY_HAND.parameters == 3 * (240 + 8) + 4 + 2 * 28
    for name, billions in {"1b": 1.236, "7b": 6.738, "small": 0.000125}.items():
        shape = SHAPES[name]
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config_of(shape))
        assert shape.parameters == sum(p.numel() for p in module.parameters())
        assert shape.parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_training_flops_by_hand() -> None:
    """Sequences of 1, 2, 3 tokens see 1 + 3 + 6 = 10 tokens; scores and mixture are 4 x 10 channels each, forward once
    and backward twice."""
    found = training_flops(BY_HAND, [1, 2, 3], targets=4)
    assert found == 6 * 6 * 3 * 240 + 6 * 4 * 28 + 3 * (10 * 3 * (2 * 2 * 10))
    whole = training_flops(SHAPES["7b"], [2048], targets=2048) / 2048
    assert whole == pytest.approx(6 * 6.607e9 + 6 * 32 * 4096 * 2049, rel=1e-3)


def test_decoding_bytes_by_hand() -> None:
    """Two steps of 3 samples with 5 and 6 tokens: weights twice; of a token 2 x 3 layers x 5 numbers."""
    assert decoding_bytes(BY_HAND, 3, [5, 6]) == 2 * 2 * (3 * 240 + 28) + 3 * 11 * (2 * 3 * 5 * 2)
    step = decoding_bytes(SHAPES["7b"], 64, [256])
    assert step == pytest.approx(2 * 6.607e9 + 64 * 256 * 524288, rel=1e-3)
    assert step / PEAKS["H200"].bandwidth == pytest.approx(4.54e-3, rel=0.01)


@pytest.mark.parametrize(
    ("device", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.0e12),
    ],
)
def test_peaks_are_found_by_the_devices_name(device: str, flops: float, bandwidth: float) -> None:
    assert peak_of(device) == Peak(flops, bandwidth)


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_of("cpu") is None


def test_memory_by_hand_and_what_fits() -> None:
    """18 bytes a parameter: 121.3 GB at 7B, so a 139 GiB card holds it with few tokens and a 78 GiB one does not."""
    seven = SHAPES["7b"]
    assert activation_bytes(BY_HAND) == 2 * 8 * 4 + 4 * 5 * 3 + 8 * 10
    state = 18 * 6.738e9 + 4 * 4096 * 32000
    assert training_bytes(seven, 0) == pytest.approx(state + 3e9, rel=1e-3)
    large, small = plan(seven, 139 * 2**30), plan(seven, 78 * 2**30)
    assert large.shape == seven
    assert large.tokens == 2048
    assert small.tokens == 2048
    assert 14 <= small.shape.layers <= 18
    assert training_bytes(small.shape, 2048) <= 0.94 * 78 * 2**30
    one_more = dataclasses.replace(seven, layers=small.shape.layers + 1)
    assert training_bytes(one_more, 2048) > 0.94 * 78 * 2**30
    assert plan(SHAPES["1b"], 78 * 2**30).tokens == 16384


class Bare:
    """One sequence by torch's attention as it is: our own way on a CPU computes in float32, that on a GPU does not."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Any) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=shape.scale, enable_gqa=True)


def test_activations_are_what_autograd_keeps() -> None:
    """Distinct storages that a further layer keeps for the backward pass, of a token; within a tenth."""

    def kept(layers: int, tokens: int = 64) -> float:
        model = random_model(dataclasses.replace(SHAPES["small"], layers=layers), HERE)
        found: dict[int, int] = {}
        alive = []

        def pack(x: torch.Tensor) -> torch.Tensor:
            alive.append(x)
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        at = torch.arange(tokens)[None]
        with model.computing(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            out = model.hidden(at, at, Bare())
        assert out.requires_grad
        return sum(size for place, size in found.items() if place not in weights) / tokens

    assert (kept(6) - kept(2)) / 4 == pytest.approx(activation_bytes(SHAPES["small"]), rel=0.1)


def test_lengths_of_answers() -> None:
    answers = torch.tensor([[4, 9, 4, 4], [4, 4, 4, 8], [4, 4, 4, 4], [9, 8, 0, 0]])
    assert lengths_of(answers, [8, 9]) == [2, 4, 4, 1]
    assert lengths_of(answers, []) == [4, 4, 4, 4]


def test_end_tokens_end_after_the_mean() -> None:
    ends = end_ids(128256, 170)
    assert len(set(ends)) == len(ends)
    assert min(ends) >= 2
    assert len(ends) / 128256 == pytest.approx(1 / 170, rel=0.01)


@pytest.mark.filterwarnings("ignore")  # flex attention without torch.compile warns that it is slow
def test_the_check_runs_without_a_gpu() -> None:
    found = run_check(HERE)
    assert {name for name, seen in found.items() if seen.get("good")} == {
        *("engine = trainer, fp32", "engine = trainer, bf16"),
        *(f"flex = one sequence at a time, {kind}" for kind in ("plain", "window", "alibi")),
    }
    assert all("absent" in seen for seen in found.values() if not seen.get("good"))
    assert wrong(found) == []
    assert "not looked at: CUDA graphs need CUDA" in told("check", found)


def test_the_check_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that attends to one token too many; answers that part early."""
    real = Slots.decode
    monkeypatch.setattr(Slots, "decode", lambda self, at, longest=None: real(self, at - (at > 3).long(), longest))
    assert not engine_is_trainer(HERE, "fp32", FP32).good
    monkeypatch.undo()

    def run(noise: float) -> Any:
        def work(model: Any, samples: Any, room: int) -> None:
            if noise:
                with torch.no_grad():
                    model.module.get_output_embeddings().weight.mul_(1 + noise)
            said(model, Slots(8, room), samples, room=room, graphs=False)

        return work

    assert same_answers(HERE, "fp32", run(0.0), run(0.0)) == Finding(
        0.0, FP32, "100.0% of tokens before the first other one"
    )
    parted = same_answers(HERE, "bf16", run(0.0), run(0.5))
    assert parted.figure > BF16
    assert not parted.good
    assert wrong({"a": {"figure": 1.0, "good": False}, "b": {"absent": "x"}, "c": {"failed": "y"}}) == ["a", "c"]
    assert checked_model(HERE, "fp32").dtype == "fp32"


def test_training_is_measured() -> None:
    row = sft("1b", HERE)
    assert row["first_loss"] == pytest.approx(math.log(512), rel=0.02)  # a random model knows nothing
    assert row["tokens"] >= 8 * 256
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"][0])
    assert row["parameters"] == SHAPES["small"].parameters
    assert "mfu" not in row  # nobody has told a processor's limit
    assert 0 < row["memory_share"] < 1


def test_decoding_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_models.peak_of", lambda _: PEAKS["A100"])
    row = decode("7b", HERE)
    assert row["tokens_per_s"] == pytest.approx(4 * 15 / row["seconds"][0])
    moved = decoding_bytes(SHAPES["small"], 4, range(9, 24))
    assert row["bandwidth_share"] == pytest.approx(moved / row["seconds"][0] / 2.0e12)


def test_rollouts_are_measured_and_a_side_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried much")

    monkeypatch.setitem(rollouts.__globals__["PEERS"], "generate_batch", broken)
    row = rollouts("varying", HERE)
    ours, peer = row["sides"]["ours"], row["sides"]["generate, dynamic cache"]
    assert row["samples"] == 16
    assert 1 <= ours["mean_length"] < 16
    assert 1 <= peer["mean_length"] < 16
    assert row["ratios"] == {"generate, dynamic cache": ours["tokens_per_s"] / peer["tokens_per_s"]}
    assert row["sides"]["generate_batch"] == {"failed": "OutOfMemoryError: CUDA out of memory. Tried much"}
    assert "could not be run: OutOfMemoryError" in told("rollouts-varying", row)


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Setting) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setitem(ROWS, "sft-7b", broken)
    assert run_row("sft-7b", HERE) == {"failed": "OutOfMemoryError: CUDA out of memory."}
    assert guarded(lambda: {}["x"]) == {"failed": "KeyError: 'x'"}


def test_a_missing_peer_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.FOLDER", tmp_path)
    monkeypatch.setitem(run_row.__globals__["gpu_trl"].__dict__, "our_sft", lambda *_: {"tokens_per_s": 5.0})
    row = run_row("trl-sft", HERE)
    assert row["sides"]["ours"] == {"tokens_per_s": 5.0}
    assert "python -m benchmarks.peers install" in row["sides"]["TRL, packed"]["failed"]
    assert row["ratios"] == {}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no CUDA GPU here") as fault:
        main(["--rows", "sft-1b"])
    assert fault.value.exit_code == 2


def test_rows_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def instead(name: str, _: Setting) -> dict[str, Any]:
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        return {"failed": name}

    out = tmp_path / "new" / "gpu.json"
    monkeypatch.setitem(main.__globals__, "in_child", instead)
    assert main(["--device", "cpu", "--small", "--rows", "decode-1b", "sft-1b", "--out", str(out)]) == 0
    assert seen == [0, 1]
    found = json.loads(out.read_text())
    assert found["rows"] == {"decode-1b": {"failed": "decode-1b"}, "sft-1b": {"failed": "sft-1b"}}
    assert found["device"]["small"]
    with pytest.raises(UserError, match="tiny model"):
        main(["--from", str(out), "--write"])


def test_the_page() -> None:
    empty = page({"rows": {}})
    assert empty.count(f"| {UNMEASURED} |") == len(AIMS) == 12
    rows = {
        "sft-1b": {"mfu": 0.512, "tokens_per_s": 50000.0},
        "sft-7b": {"failed": "OutOfMemoryError: x"},
        "rollouts-fixed": {
            "ratios": {"generate, dynamic cache": 6.25},
            "sides": {"generate, static cache": {"failed": "no compiler"}, "ours": {"tokens_per_s": 1.0}},
        },
        "trl-ppo": {"ratios": {}, "sides": {"ours": {"failed": "gone"}, "TRL": {"seconds_per_iteration": 1.0}}},
        "decode-1b": {"tokens_per_s": 1.0},
    }
    about = {"when": "2026-01-02T", "commit": "abc", "versions": {"torch": "2"}}
    text = page({"rows": rows, "device": {"name": "NVIDIA H200", "memory_gib": 139.8}} | about)
    lines = {line.split("`")[-2].split()[-1]: line for line in text.splitlines() if line.startswith("| SFT, ")}
    assert "| 45% | 51% |" in lines["sft-1b"]
    assert "| could not be run: OutOfMemoryError: x |" in lines["sft-7b"]
    assert "| 5.00x | 6.25x |" in text
    assert "| could not be run: no compiler |" in text
    assert "| 3.00x | could not be run: gone |" in text
    assert "| 60% | could not be run: the limit of this device is not known |" in text
    assert "on one NVIDIA H200 (140 GiB)" in text
