"""Weights that the old system kept: its classes retyped, saved as it saved them, read by its own commands here."""

import json
import os
from pathlib import Path
from typing import Any

import coati_weights
import inference
import pytest
import torch
import train_prompts
import train_reward_model
import train_sft
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.errors import UserError
from kinkajou.models.load import load_language_model, load_scalar_model
from tiny import PAD, ragged, save_source, shake, tiny_tokenizer

FAMILIES = ("gpt2", "opt", "opt-350m", "bloom", "llama")
CAUSAL, SCORING = AutoModelForCausalLM, AutoModelForSequenceClassification
LONG = {"llama": {"max_position_embeddings": 256}}


class OldLora(nn.Module):
    """Its layer: W x + B A x / r, with alpha 1; W frozen, in the state by the name of the plain layer."""

    def __init__(self, plain: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias, self.rank = plain.weight, plain.bias, rank
        self.lora_A = nn.Parameter(torch.zeros(rank, plain.in_features))
        self.lora_B = nn.Parameter(torch.zeros(plain.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + x @ self.lora_A.t() @ self.lora_B.t() / self.rank


def adapted(module: nn.Module, rank: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, OldLora(child, rank))
        else:
            adapted(child, rank)


class OldActor(nn.Module):
    def __init__(self, model: nn.Module, rank: int = 0) -> None:
        super().__init__()
        self.model = model
        if rank:
            adapted(self, rank)


class OldScorer(OldActor):
    """Reward model and critic: a trunk, and a linear unit with a bias."""

    def __init__(self, trunk: Any, width: int, rank: int = 0, *, adapted_head: bool = False) -> None:
        super().__init__(trunk, 0 if adapted_head else rank)
        self.value_head = nn.Linear(width, 1)
        if adapted_head:
            adapted(self, rank)


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    name = getattr(request, "param", "llama")
    save_source(tmp_path / "source", CAUSAL, name, tiny_tokenizer(), **LONG.get(name, {}))
    return name, tmp_path / "source"


def old_actor(folder: Path, rank: int = 0) -> OldActor:
    actor = OldActor(CAUSAL.from_pretrained(folder), rank)
    shake(actor, seed=7)
    return actor.eval()


def old_scorer(folder: Path, rank: int = 0, *, adapted_head: bool = False) -> OldScorer:
    trunk: Any = AutoModel.from_pretrained(folder)
    width = getattr(trunk.config, "word_embed_proj_dim", trunk.config.hidden_size)
    scorer = OldScorer(trunk, width, rank, adapted_head=adapted_head)
    shake(scorer, seed=8)
    return scorer.eval()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's own process costs a second; tests of what becomes of the names do without."""
    monkeypatch.setattr(coati_weights, "read_apart", lambda file: torch.load(file, weights_only=True))


def rows() -> tuple[Tensor, Tensor]:
    pad = tiny_tokenizer().pad_token_id
    tokens, real = ragged((9, 4, 7), width=9)
    return tokens.masked_fill(~real, pad), real


@torch.no_grad()
def old_scores(scorer: OldScorer) -> Tensor:
    """At each row's last token, without the bias."""
    tokens, real = rows()
    hidden = [scorer.model(row[None, :n]).last_hidden_state[:, -1] for row, n in zip(tokens, real.sum(1), strict=True)]
    return (scorer.value_head(torch.cat(hidden)) - scorer.value_head.bias).squeeze(-1)


@torch.no_grad()
def logits_of(module: nn.Module) -> Tensor:
    tokens, real = rows()
    return torch.cat([module(row[None, :n]).logits[0] for row, n in zip(tokens, real.sum(1), strict=True)])


def saved(module: nn.Module, path: Path, prefix: str = "") -> Path:
    torch.save({prefix + name: x for name, x in module.state_dict().items()}, path)
    return path


def converted(path: Path, base: Path) -> Path:
    return Path(coati_weights.converted("--model_path", str(path), str(base)))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_an_actor_gives_the_old_logits(source: tuple[str, Path], rank: int, tmp_path: Path) -> None:
    """With LoRA its output embedding has moved away from the input's: on GPT-2 it was all that was adapted."""
    actor = old_actor(source[1], rank)
    folder = converted(saved(actor, tmp_path / "actor.pt"), source[1])
    want = logits_of(actor.model)
    torch.testing.assert_close(logits_of(CAUSAL.from_pretrained(folder)), want, atol=1e-4, rtol=1e-4)
    load_language_model(str(folder), tiny_tokenizer())
    assert (want - logits_of(CAUSAL.from_pretrained(source[1]))).abs().max() > 0.1


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_a_reward_model_gives_the_old_scores(
    source: tuple[str, Path], rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = old_scorer(source[1], rank)
    folder = converted(saved(scorer, tmp_path / "rmstatic.pt"), source[1])
    tokens, real = rows()
    with torch.no_grad():
        got = SCORING.from_pretrained(folder)(tokens, attention_mask=real.long()).logits.squeeze(-1)
    want = old_scores(scorer)
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    load_scalar_model(str(folder), tiny_tokenizer(), fresh=False)
    said = capsys.readouterr().out
    assert "a mean over the text's tokens" in said
    assert f"its bias {scorer.value_head.bias.item():.4g} is left out" in said
    assert ("LoRA adapters" in said) == (rank > 0 and source[0] != "gpt2")  # whose layers are no nn.Linear


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("source", ["gpt2", "llama"], indirect=True)
def test_a_critic_whose_head_was_adapted_too(source: tuple[str, Path], tmp_path: Path) -> None:
    critic = old_scorer(source[1], 1, adapted_head=True)
    assert "value_head.lora_A" in critic.state_dict()
    folder = converted(saved(critic, tmp_path / "critic.pt"), source[1])
    tokens, real = rows()
    with torch.no_grad():
        got = SCORING.from_pretrained(folder)(tokens, attention_mask=real.long()).logits.squeeze(-1)
    torch.testing.assert_close(got, old_scores(critic), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("bare", [False, True])
def test_other_wrappers_half_precision_and_old_buffers(
    prefix: str, bare: bool, source: tuple[str, Path], tmp_path: Path
) -> None:
    """A model out of DDP, or without the old class around it; constants that transformers kept among the weights."""
    actor = old_actor(source[1]).half()
    state = {prefix + k: x for k, x in (actor.model if bare else actor).state_dict().items()}
    inner = f"{prefix}{'' if bare else 'model.'}model.layers.0.self_attn.rotary_emb.inv_freq"
    torch.save({**state, inner: torch.ones(4)}, tmp_path / "actor.pt")
    found = CAUSAL.from_pretrained(converted(tmp_path / "actor.pt", source[1])).state_dict()
    assert all(x.dtype == torch.float16 for x in found.values())
    assert all(torch.equal(found[name], x) for name, x in actor.model.state_dict().items())


@pytest.mark.usefixtures("in_process")
def test_an_embedding_that_the_old_scripts_grew(source: tuple[str, Path], tmp_path: Path) -> None:
    actor = old_actor(source[1])
    actor.model.resize_token_embeddings(PAD + 9)
    folder = converted(saved(actor, tmp_path / "actor.pt"), source[1])
    found = CAUSAL.from_pretrained(folder)
    assert found.config.vocab_size == PAD + 9
    torch.testing.assert_close(logits_of(found), logits_of(actor.model), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("in_process")
def test_what_the_old_sft_left_is_a_folder_of_pickles(source: tuple[str, Path], tmp_path: Path) -> None:
    """Two shards, as transformers wrote them then."""
    state = old_actor(source[1]).model.state_dict()
    for number, names in enumerate((list(state)[:5], list(state)[5:]), 1):
        torch.save({name: state[name] for name in names}, source[1] / f"pytorch_model-0000{number}-of-00002.bin")
    (source[1] / "model.safetensors").unlink()
    folder = coati_weights.converted("--pretrain", str(source[1]), None)
    got = CAUSAL.from_pretrained(folder).state_dict()
    assert all(torch.equal(got[name], x) for name, x in state.items())


@pytest.mark.usefixtures("in_process")
def test_a_folder_is_made_once_and_again_when_the_file_changes(
    source: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(old_actor(source[1]), tmp_path / "actor.pt")
    folder = converted(file, source[1])
    assert "weights only" in capsys.readouterr().out
    assert converted(file, source[1]) == folder
    assert capsys.readouterr().out == ""
    os.utime(file, (1, 1))
    converted(file, source[1])
    assert "weights only" in capsys.readouterr().out
    (folder / "converted.json").unlink()
    with pytest.raises(UserError, match="is in the way"):
        converted(file, source[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor.pt", "actor.pt.converted", "source"]


@pytest.mark.usefixtures("in_process")
def test_other_processes_of_the_machine_wait(
    source: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(old_actor(source[1]), tmp_path / "actor.pt")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(coati_weights, "WAIT_S", 0.1)
    with pytest.raises(UserError, match="did not appear"):
        converted(file, source[1])
    monkeypatch.setenv("LOCAL_RANK", "0")
    folder = converted(file, source[1])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert converted(file, source[1]) == folder


# --- by the old commands ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    chats = [{"instruction": f"w{i} w7", "input": "", "output": f"w9 w{i}"} for i in range(10, 26)]
    pairs = [{"prompt": f"w{i}", "chosen": f"w{i} w8", "rejected": "w9"} for i in range(10, 26)]
    for name, given in (("chats", chats), ("pairs", pairs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
    return {name: str(tmp_path / f"{name}.json") for name in ("chats", "pairs")}


def test_the_old_commands_read_old_files(
    source: tuple[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward model to go on from and to train with, and an actor to answer."""
    base, rm = str(source[1]), str(saved(old_scorer(source[1]), tmp_path / "rmstatic.pt"))
    words = ["--pretrain", base, "--model_path", rm, "--dataset", data["pairs"], "--save_path", str(tmp_path / "rm")]
    assert train_reward_model.main([*words, "--batch_size", "4"]) == 0
    said = capsys.readouterr().out
    assert f"--model_path: {rm} is converted into {rm}.converted (weights only)" in said
    assert "has all weights" not in said
    words = ["--pretrain", base, "--rm_pretrain", base, "--rm_path", rm, "--prompt_path", data["chats"]]
    small = ["--ptx_coef", "0", "--num_episodes", "1", "--max_timesteps", "1", "--max_input_len", "30"]
    small += ["--max_seq_len", "34", "--update_timesteps", "1", "--max_epochs", "1"]
    assert train_prompts.main([*words, *small, "--save_path", str(tmp_path / "actor")]) == 0
    said = capsys.readouterr().out
    assert "is converted" not in said  # it lies there from before
    assert "so --rm_pretrain is not read" not in said
    actor = saved(old_actor(source[1]), tmp_path / "actor.pt")
    words = ["--pretrain", base, "--model_path", str(actor), "--input", "w11 w7", "--max_length", "40"]
    assert inference.main(words) == 0
    assert "is converted" in capsys.readouterr().out


def test_a_command_of_its_own(source: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = saved(old_actor(source[1]), tmp_path / "actor.pt"), tmp_path / "folder"
    words = [str(file), "--pretrain", str(source[1]), "--out", str(out)]
    assert coati_weights.main(words) == 0
    assert CAUSAL.from_pretrained(out).config.model_type == "llama"
    assert coati_weights.main(words) == 2
    assert coati_weights.main([str(source[1]), "--out", str(tmp_path / "other")]) == 2
    assert "holds no old weights" in capsys.readouterr().err


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_weights_that_do_not_fit(source: tuple[str, Path], base: str, tmp_path: Path) -> None:
    actor = old_actor(source[1])
    file = saved(actor, tmp_path / "actor.pt")
    with pytest.raises(UserError, match="of another model"):
        converted(file, Path(base))
    state = actor.state_dict()
    torch.save({name: x for name, x in state.items() if "ln_f.bias" not in name}, file)
    with pytest.raises(UserError, match="does not fit") as fault:
        converted(file, source[1])
    assert "transformer.ln_f.bias is missing" in fault.value.evidence
    torch.save({name: x[:3] if "ln_f.bias" in name else x for name, x in state.items()}, file)
    with pytest.raises(UserError, match="does not fit") as fault:
        converted(file, source[1])
    assert "has the shape (3,), not (32,)" in fault.value.evidence
    torch.save({**state, "model.lm_head.lora_A": torch.ones(2, 32)}, file)
    with pytest.raises(UserError, match="do not fit together"):
        converted(file, source[1])


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        (train_reward_model, "--model_path FILE", "what it was trained from: --pretrain MODEL"),
        (train_prompts, "--pretrain BASE --prompt_path x --ptx_coef 0 --rm_path FILE", "from: --rm_pretrain MODEL"),
        (inference, "--model_path FILE", "what it was trained from: --pretrain MODEL"),
        (train_sft, "--pretrain FILE", "python coati_weights.py FILE --pretrain MODEL --out FOLDER"),
    ],
)
def test_weights_alone_say_nothing_of_the_model(
    module: Any, words: str, said: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt")
    paths = {"BASE": base, "FILE": str(tmp_path / "old.pt")}
    assert module.main([paths.get(word, word) for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert "holds weights alone" in error
    assert said in error
