"""Stage 3, PPO on prompts, by the flags of the original system; see README.md."""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import coati_flags as coati

from kinkajou.config import (
    ClipConfig,
    JudgeConfig,
    KLConfig,
    PPOAlgorithm,
    PPOConfig,
    PtxConfig,
    RLOptimConfig,
    RolloutConfig,
)
from kinkajou.data.sources import read_prompts
from kinkajou.errors import UserError
from kinkajou.train import start_ppo

BECAME = {
    **coati.RUN_BECAME,
    "reward": "--rm_path; the critic starts from it",
    "prompts": "--prompt_path",
    "bad_rows": "bad and too long prompts are skipped and counted",
    "ptx_data": "--pretrain_dataset",
    "ptx_coef": "--ptx_coef",
    "ptx_batch_size": "--ptx_batch_size x processes",
    "steps": "--num_episodes x --max_timesteps / --update_timesteps",
    "prompts_per_step": "--experience_batch_size x --update_timesteps x processes",
    "epochs": "--max_epochs",
    "minibatch_size": "--train_batch_size x processes",
    "kl_coef": "--kl_coef",
    "max_len": "--max_seq_len",
    "max_new_tokens": "--max_seq_len - --max_input_len",
    "temperature": "fixed then",
    "top_k": "fixed then",
    "clip": "fixed then",
    "value_clip": "fixed then",
    "schedule": "fixed then",
    "warmup": "fixed then",
}


def flags() -> coati.Flags:
    found = coati.training_flags(
        "train_prompts.py", "PPO on prompts.", save_path="actor_checkpoint_prompts", lr=1e-7, log_interval=1
    )
    found.add_argument("--model", choices=coati.FAMILIES, help="family of --pretrain, checked; detected if omitted")
    found.add_argument("--prompt_path", "--prompt_dataset", help="json, jsonl, csv, parquet or a hub id")
    found.add_argument("--pretrain_dataset", help="chats of the ptx loss, in the same formats")
    found.add_argument("--rm_model", choices=coati.FAMILIES, help="family of the reward model; --model if omitted")
    found.add_argument("--rm_pretrain", help="what the reward model was trained from")
    found.add_argument("--rm_path", help="folder of the trained reward model, or an old .pt file")
    counts = {
        "--num_episodes": (10, "episodes"),
        "--max_timesteps": (10, "rollout batches in an episode"),
        "--update_timesteps": (10, "rollout batches between updates"),
        "--max_epochs": (5, "passes over what was sampled"),
        "--train_batch_size": (8, "samples in a process's minibatch"),
        "--experience_batch_size": (8, "prompts in a process's rollout batch"),
        "--ptx_batch_size": (1, "chats in a process's minibatch"),
        "--max_input_len": (96, "longest prompt in tokens"),
        "--max_seq_len": (128, "longest prompt and answer in tokens"),
    }
    for name, (default, purpose) in counts.items():
        found.add_argument(name, type=positive, default=default, help=purpose)
    found.add_argument("--kl_coef", type=float, default=0.1, help="weight of the KL to the reference in the reward")
    found.add_argument("--ptx_coef", type=float, default=0.9, help="loss = ptx_coef x ptx + (1 - ptx_coef) x policy")
    return found


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 expected, not {word!r}")
    return int(word)


def settings(given: Namespace) -> PPOConfig:
    pretrain = coati.need_folder(given, "pretrain", "the folder or hub id of a tuned language model")
    prompts = coati.need(given, "prompt_path", "a file of instructions or prompts, or a hub id")
    if given.ptx_coef > 0:
        coati.need(given, "pretrain_dataset", "chats for the ptx loss, or switch it off by --ptx_coef 0")
    if given.max_seq_len <= given.max_input_len:
        raise UserError(
            "--max_seq_len leaves no room for an answer",
            evidence=f"--max_seq_len {given.max_seq_len}, --max_input_len {given.max_input_len}",
        )
    minibatch = given.train_batch_size * coati.world()
    wanted = given.experience_batch_size * given.update_timesteps * coati.world()
    per_step = max(1, round(wanted / minibatch)) * minibatch
    if per_step != wanted:
        coati.say(f"note: {per_step} prompts a step instead of {wanted}: they fill minibatches of {minibatch}")
    return PPOConfig(
        base=coati.base_config(given, pretrain, given.max_seq_len),
        rollout=RolloutConfig(
            prompts=prompts,
            bad_rows="skip_any",
            prompts_per_step=per_step,
            max_new_tokens=given.max_seq_len - given.max_input_len,
            temperature=1.0,
            top_k=50,
        ),
        judge=JudgeConfig(reward=(reward_model(given),)),
        kl=KLConfig(kl_coef=given.kl_coef),
        surrogate=ClipConfig(clip=0.2),
        algo=PPOAlgorithm(
            steps=max(1, given.num_episodes * given.max_timesteps // given.update_timesteps),
            epochs=given.max_epochs,
            minibatch_size=minibatch,
            value_clip=0.4,
        ),
        ptx=ptx(given),
        optim=RLOptimConfig(lr=given.lr, schedule="constant", warmup=0.0),
        parallel=coati.parallel_config(given),
        keep=coati.keep_config(given),
        run=coati.run_config(given),
    )


def ptx(given: Namespace) -> PtxConfig:
    if given.ptx_coef == 0:
        return PtxConfig()
    batch_size = given.ptx_batch_size * coati.world()
    return PtxConfig(ptx_data=given.pretrain_dataset, ptx_coef=given.ptx_coef, ptx_batch_size=batch_size)


def reward_model(given: Namespace) -> str:
    """`--rm_path`; `--rm_pretrain` and `--rm_model` say what it has to be."""
    old = Path(given.rm_path or "").is_file()
    folder = coati.need_folder(
        given, "rm_path", "the folder that train_reward_model.py wrote, or an old .pt file", base=given.rm_pretrain
    )
    family = given.rm_model or given.model
    since = f"--rm_model {family}" if given.rm_model else f"--model {family}, and no --rm_model"
    coati.check_family("--rm_path", folder, family, since=since, fix="say its family with --rm_model")
    if given.rm_pretrain and not old:
        backbone = coati.need_folder(given, "rm_pretrain", "the folder or hub id of a language model")
        family = coati.hub_config(backbone).get("model_type")
        since = f"--rm_pretrain {backbone} is a {family} model"
        coati.check_family("--rm_path", folder, family, since=since, fix="leave --rm_pretrain out: it is not needed")
        coati.say("note: --rm_path has all weights, so --rm_pretrain is not read")
    return folder


def fitted(cfg: PPOConfig) -> PPOConfig:
    """Smaller steps where the usable prompts do not fill one."""
    from kinkajou.data.chat import ChatFormat
    from kinkajou.data.tokenizer import load_tokenizer
    from kinkajou.models.load import find_model

    form = ChatFormat(load_tokenizer(find_model(cfg.base.model))[0])
    prompts = read_prompts(cfg.rollout.prompts, bad_rows="skip_any").rows
    room = cfg.base.max_len - cfg.rollout.max_new_tokens
    short = (prompt for prompt in prompts if len(form.prompt(prompt.messages)) <= room)
    usable = len(list(islice(short, cfg.rollout.prompts_per_step)))
    if not usable:
        raise UserError(f"no prompt is within {room} tokens", fix="raise --max_input_len and --max_seq_len")
    minibatch = cfg.algo.minibatch_size
    fits = coati.smaller(cfg.rollout.prompts_per_step, usable, "prompts", multiple=minibatch)
    return replace(
        cfg,
        rollout=replace(cfg.rollout, prompts_per_step=fits),
        algo=replace(cfg.algo, minibatch_size=min(minibatch, fits)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return coati.train(flags(), BECAME, settings, start_ppo, arguments, fitted)


if __name__ == "__main__":
    sys.exit(main())
