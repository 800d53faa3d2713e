"""`kinkajou prefer` as a whole: what counts, what changes no number, and that it learns."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kinkajou.batch import pad_rows
from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.sources import read_pairs
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.errors import UserError
from kinkajou.models.load import load_language_model
from kinkajou.train.preference_rows import cut_to_fit, encode_compared, encode_judged
from kinkajou.train.preference_tasks import mismatched
from small import Small, nearly, weights, write_rows

ANY = {"warmup": 0.0, "eval_share": 0.1, "batch_size": 6}


@lru_cache(maxsize=4)
def load(folder: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answer_logps(folder: Path | str, asked: str, said: str) -> list[float]:
    """Log-probability of each token of an answer and of its end token, by transformers alone."""
    module, tokenizer = load(str(folder))
    prompt, answer = tokenizer(asked).input_ids, [*tokenizer(said).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logp = module(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return [float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]


def test_the_loss_is_of_the_answers_and_their_end_tokens(small: Small, tmp_path: Path) -> None:
    """One batch of all pairs, another reference: every number again by transformers and Python."""
    other = small.run("sft", tmp_path / "sft", lr=1e-2)
    assert other
    reference = tmp_path / "sft" / "checkpoints" / "step-000005"
    rows = small.run("prefer", tmp_path / "run", batch_size=40, reference=str(tmp_path / "sft"))
    margins, chosen = [], []
    for pair in read_pairs(small.pairs).rows:
        logps = {
            (side, model): math.fsum(answer_logps(folder, pair.prompt[0].content, getattr(pair, side)[0].content))
            for side in ("chosen", "rejected")
            for model, folder in (("policy", small.policy), ("ref", reference))
        }
        good = logps["chosen", "policy"] - logps["chosen", "ref"]
        margins.append(0.1 * (good - logps["rejected", "policy"] + logps["rejected", "ref"]))
        chosen.append(0.1 * good)
    loss = math.fsum(math.log1p(math.exp(-margin)) for margin in margins) / 40
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[0]["margin"] == pytest.approx(math.fsum(margins) / 40, rel=1e-4)
    assert rows[0]["reward_chosen"] == pytest.approx(math.fsum(chosen) / 40, rel=1e-4)
    assert rows[0]["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 40)


def test_orpo_counts_the_prompt_in_its_likelihood_and_not_in_its_odds(small: Small, tmp_path: Path) -> None:
    rows = small.run("prefer", tmp_path / "run", loss=("orpo",), batch_size=40, beta=0.2)
    nll, odds = [], []
    for pair in read_pairs(small.pairs).rows:
        asked = pair.prompt[0].content
        first, _, rest = asked.partition(" ")
        means = []
        for side in (pair.chosen, pair.rejected):
            logps = answer_logps(small.policy, asked, side[0].content)
            means.append(math.fsum(logps) / len(logps))
        odds.append(means[0] - means[1] - math.log(1 - math.exp(means[0])) + math.log(1 - math.exp(means[1])))
        nll += answer_logps(small.policy, first, f"{rest} {pair.chosen[0].content}".strip())
    want = -math.fsum(nll) / len(nll) + math.fsum(0.2 * math.log1p(math.exp(-x)) for x in odds) / 40
    assert rows[0]["loss"] == pytest.approx(want, rel=1e-5)
    assert not (tmp_path / "run" / "reference.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": ("sigmoid", "0.2*sft")},
        {"loss": ("ipo_mean",), "ld_alpha": 0.3},
        {"loss": ("sigmoid",), "use_weighting": True},
        {"loss": ("aot",)},
        {"loss": ("aot_unpaired", "0.5*aot")},
        {"loss": ("orpo",)},
        {"loss": ("simpo",), "lora_rank": 2},
        {"loss": ("sigmoid",), "gradient_checkpointing": True},
        {"loss": ("kto", "0.1*sft"), "undesirable_weight": 1.3},
    ],
    ids=lambda changes: "-".join(changes["loss"]),
)
def test_micro_batches_and_checkpointing_change_no_number(changes: Any, small: Small, tmp_path: Path) -> None:
    want = small.run("prefer", tmp_path / "one", **ANY, **{**changes, "gradient_checkpointing": False})
    got = small.run("prefer", tmp_path / "two", **ANY, **changes, tokens_per_microbatch=30)
    assert got == nearly(want)


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "orpo", "cpo"])
def test_the_order_of_a_batch_changes_no_number(loss: str, small: Small, tmp_path: Path) -> None:
    """All pairs are one batch, the file turned round."""
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(Path(small.pairs).read_text().splitlines(keepends=True))))
    own = {"loss": (loss,), "batch_size": 40, "epochs": 3, "warmup": 0.0}
    want = small.run("prefer", tmp_path / "one", **own)
    assert small.run("prefer", tmp_path / "two", **own, data=str(turned)) == nearly(want)


# --- it learns --------------------------------------------------------------------------------------------


def easy(folder: Path) -> list[dict[str, str]]:
    """The better answer says w7, the worse w8."""
    words = [f"w{i}" for i in range(10, 40)]
    return [{"prompt": words[i], "chosen": f"{words[-i]} w7", "rejected": f"{words[-i]} w8"} for i in range(30)]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "apo_zero", "aot_unpaired", "simpo", "orpo", "kto"])
def test_learns_an_easy_preference(loss: str, small: Small, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "easy.jsonl", easy(tmp_path))
    own = {"beta": 0.5} if loss in ("sigmoid", "kto", "aot_unpaired", "apo_zero") else {}
    rows = small.run(
        "prefer", tmp_path / "run", data=data, loss=(loss,), eval_share=0.3, epochs=8, batch_size=7, lr=5e-3, **own
    )
    assert rows[-1]["eval_accuracy"] >= 0.9
    assert rows[-1]["eval_accuracy_low"] < rows[-1]["eval_accuracy"] <= rows[-1]["eval_accuracy_high"]
    # The checkpoint says so too, by transformers alone.
    folder = tmp_path / "run" / "checkpoints" / f"step-{len(rows):06d}"
    good, bad = (math.fsum(answer_logps(folder, "w50", f"w60 {word}")) for word in ("w7", "w8"))
    before = [math.fsum(answer_logps(small.policy, "w50", f"w60 {word}")) for word in ("w7", "w8")]
    assert good - bad > before[0] - before[1]


def test_kto_of_pairs_and_of_their_halves_is_the_same(small: Small, tmp_path: Path) -> None:
    halves = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in easy(tmp_path)
        for side in ("chosen", "rejected")
    ]
    own = {"loss": ("kto",), "batch_size": 6, "warmup": 0.0}
    paired = small.run("prefer", tmp_path / "one", data=write_rows(tmp_path / "pairs.jsonl", easy(tmp_path)), **own)
    single = small.run("prefer", tmp_path / "two", data=write_rows(tmp_path / "halves.jsonl", halves), **own)
    assert single == paired
    assert len(single) == 10
    assert paired[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert paired[0]["kl"] == 0
    assert max(row["kl"] for row in paired) > 0


def test_kto_of_good_answers_only(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in easy(tmp_path)]
    data = write_rows(tmp_path / "good.jsonl", good)
    rows = small.run("prefer", tmp_path / "run", data=data, loss=("kto", "0.1*sft"), batch_size=6)
    assert "there is one kind only" in capsys.readouterr().out
    assert "reward_rejected" not in rows[-1]
    assert rows[-1]["loss_sft"] < rows[0]["loss_sft"]


def test_the_reference_point_is_of_mismatched_answers(small: Small, tmp_path: Path) -> None:
    """Step 2's KL again: the prompt of each row with the answer of the next, under step 1's weights and the source."""
    own = {"loss": ("kto",), "batch_size": 80, "epochs": 2, "warmup": 0.0, "lr": 1e-2, "save_every": 1}
    rows = small.run("prefer", tmp_path / "run", **own)
    from kinkajou.data.loader import Shuffle

    halves = [
        (pair.prompt[0].content, side[0].content)
        for pair in read_pairs(small.pairs).rows
        for side in (pair.chosen, pair.rejected)
    ]
    order = Shuffle(80, 80, 0).batch(1)
    moved, total = tmp_path / "run" / "checkpoints" / "step-000001", 0.0
    for i, j in zip(order, order[1:] + order[:1], strict=True):
        now, before = (math.fsum(answer_logps(f, halves[i][0], halves[j][1])) for f in (moved, small.policy))
        total += now - before
    assert rows[1]["kl"] == pytest.approx(max(0.0, total / 80), rel=1e-4, abs=1e-6)
    assert mismatched([4, 7, 1]) == [(4, 7), (7, 1), (1, 4)]


def test_alignment_is_the_log_ratio_to_the_expected_probability(small: Small) -> None:
    tokenizer, _ = load_tokenizer(small.policy, template="plain")
    model = load_language_model(small.policy, tokenizer)
    batch = pad_rows([[5, 9, 7, 11], [6, 30]], [[False, False, True, True], [True, True]], pad_id=1)
    got = model.alignment(batch.tokens, batch.mask)
    module, _ = load(small.policy)
    for i, row in enumerate([[5, 9, 7, 11], [6, 30]]):
        with torch.no_grad():
            probs = module(torch.tensor([row])).logits[0].double().softmax(-1)
        for j, token in enumerate(row[1:]):
            want = math.log(probs[j, token]) - math.log((probs[j] ** 2).sum()) if batch.mask[i, j] else 0.0
            assert got[i, j].item() == pytest.approx(want, abs=1e-5)


def test_a_weighted_pair_counts_less(small: Small, tmp_path: Path) -> None:
    """At the reference the loss is log 2 x the mean weight, and a random answer is far from what the policy writes."""
    rows = small.run("prefer", tmp_path / "run", use_weighting=True, batch_size=40)
    found = []
    module, tokenizer = load(small.policy)
    for pair in read_pairs(small.pairs).rows:
        weight = 1.0
        for side in (pair.chosen, pair.rejected):
            asked, said = (tokenizer(m.content).input_ids for m in (pair.prompt[0], side[0]))
            ids = [*asked, *said, tokenizer.eos_token_id]
            with torch.no_grad():
                logp = module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            terms = [logp[j - 1, ids[j]] - torch.logsumexp(2 * logp[j - 1], 0) for j in range(len(asked), len(ids))]
            weight *= math.exp(math.fsum(terms) / len(terms))
        found.append(weight)
    assert rows[0]["loss"] == pytest.approx(math.log(2) * math.fsum(found) / 40, rel=1e-4)


# --- rows -------------------------------------------------------------------------------------------------


def form_of(small: Small) -> ChatFormat:
    return ChatFormat(load_tokenizer(small.policy, template="plain")[0])


def test_long_rows_lose_the_beginning_of_the_prompt_first() -> None:
    answer = Encoded([7, 8, 9], [True, True, True])
    assert cut_to_fit([1, 2, 3, 4], answer, 5).tokens == [3, 4, 7, 8, 9]
    assert cut_to_fit([1, 2, 3, 4], answer, 5, longest=4).tokens == [4, 7, 8, 9]  # the other answer needs the room
    assert cut_to_fit([1, 2, 3, 4], answer, 3) == Encoded([4, 7, 8], [False, True, True])
    assert cut_to_fit([1, 2], answer, 9) == Encoded([1, 2, 7, 8, 9], [False, False, True, True, True])


def test_what_was_cut_and_dropped_is_said(small: Small, tmp_path: Path) -> None:
    words = " ".join(["w5"] * 12)
    data = [
        {"prompt": words, "chosen": "w6", "rejected": "w7 w8"},
        {"prompt": "w5", "chosen": words, "rejected": "w9"},
        {"prompt": "w5", "chosen": "w91", "rejected": "w92"},
        {"prompt": "w5", "chosen": "w9999", "rejected": "w8888"},  # both unknown words
    ]
    pairs = read_pairs(write_rows(tmp_path / "pairs.jsonl", data)).rows
    said: list[str] = []
    rows = encode_compared(pairs, form_of(small), 10, said.append)
    assert len(rows) == 3
    assert [max(len(side.tokens) for side in row) for row in rows] == [10, 10, 3]
    assert [len(rows[0][side].tokens) - sum(rows[0][side].counts) for side in (0, 1)] == [7, 7]
    assert "2 of 4 pairs are longer than 10 tokens: their prompts lost" in said[0]
    assert "1 of 4 pairs have an answer that does not fit" in said[1]
    assert "1 of 4 pairs have the same tokens" in said[2]


def test_turns_of_the_user_inside_an_answer_do_not_count(small: Small, tmp_path: Path) -> None:
    first = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    chosen = [*first, {"role": "assistant", "content": "w6"}]
    rejected = [*first, {"role": "assistant", "content": "w7"}, {"role": "user", "content": "w8"}]
    rejected.append({"role": "assistant", "content": "w9"})
    pairs = read_pairs(write_rows(tmp_path / "one.jsonl", [{"chosen": chosen, "rejected": rejected}])).rows
    form = form_of(small)
    ((good, bad),) = encode_compared(pairs, form, 40, print)

    def counting(row: Encoded) -> list[str]:
        return [str(form.tokenizer.decode([t])) for t, c in zip(row.tokens, row.counts, strict=True) if c]

    assert counting(good) == ["w6", "<end>"]
    assert counting(bad) == ["w7", "<end>", "w9", "<end>"]
    whole = form.conversation((*pairs[0].prompt, *pairs[0].rejected))
    assert bad.tokens == whole.tokens
    judged = encode_judged(pairs, form, 40, print)
    assert [row.good for row in judged] == [True, False]
    assert judged[0].prompt == judged[1].prompt
    assert [*judged[1].prompt, *judged[1].answer.tokens] == whole.tokens


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loss": ("sigmiod",)}, "unknown loss 'sigmiod'"),
        ({"loss": ("x*sft",)}, "weight of the loss 'sft'"),
        ({"loss": ("-1*sft",)}, "weight of the loss 'sft'"),
        ({"loss": ("sft", "2*sft")}, "given twice"),
        ({"loss": ()}, "no loss"),
        ({"loss": ("kto", "sigmoid")}, "cannot be summed"),
        ({"loss": ("sigmoid",), "label_smoothing": 0.1}, "--label_smoothing does nothing for the loss sigmoid"),
        ({"loss": ("orpo",), "reference": "x"}, "--reference does nothing"),
        ({"loss": ("sigmoid", "apo_zero"), "divergence": "js"}, "--divergence does nothing for the loss apo_zero"),
        ({"loss": ("aot",), "use_weighting": True}, "--use_weighting does nothing for the loss aot"),
        ({"loss": ("sft",), "beta": 0.3}, "--beta does nothing"),
        ({"divergence_alpha": 0.3}, "--divergence_alpha does nothing for this divergence"),
        ({"loss": ("cdpo",)}, "needs --label_smoothing"),
        ({"loss": ("orpo", "simpo")}, "seen: orpo 0.1, simpo 2"),
        ({"loss": ("kto",), "batch_size": 1}, "compares the records of a batch"),
        ({"loss": ("alphapo",), "alphapo_alpha": 0.0}, "is SimPO"),
        ({"ld_alpha": 1.5}, "must lie between"),
        ({"beta": -1.0}, "must be at least"),
    ],
)
def test_refused_settings(changes: dict[str, Any], problem: str, small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        small.settings("prefer", tmp_path / "run", **changes)
    assert problem in str(refused.value)


def test_defaults_that_depend_on_the_loss(small: Small, tmp_path: Path) -> None:
    beta = {loss: small.settings("prefer", tmp_path, loss=(loss,)).method.beta for loss in ("sigmoid", "simpo", "sft")}
    assert beta == {"sigmoid": 0.1, "simpo": 2.0, "sft": 0.0}
    for words, beta in ((("simpo", "sft"), 2.0), (("simpo", "alphapo"), 2.0), (("orpo", "cpo"), 0.1)):
        assert small.settings("prefer", tmp_path, loss=words).method.beta == beta
    assert small.settings("prefer", tmp_path, loss=("orpo", "simpo"), beta=0.3).method.beta == 0.3
    terms = small.settings("prefer", tmp_path, loss=("sigmoid", "0.2*sft")).method.terms
    assert terms == (("sigmoid", 1.0), ("sft", 0.2))


def test_the_checkpoint_is_plain_and_the_adapter_can_be_kept(small: Small, tmp_path: Path) -> None:
    small.run("prefer", tmp_path / "run", lora_rank=2, lora_save="adapter", save_state=True, dtype="bf16")
    folder = tmp_path / "run" / "checkpoints" / "step-000005"
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "state" / "optimizer.safetensors").is_file()
    small.run("prefer", tmp_path / "whole", epochs=0.2)
    assert weights(tmp_path / "whole", 1)
