"""`kinkajou check`: the page, the exit code, how recipe and stage are found; the same checks before a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.cli import main
from small import Small, write_rows
from tiny import save_source, tiny_tokenizer

CHECKS = ["turns", "round_trip", "lengths", "end_token", "pad", "unknown", "vocabulary", "context", "steps"]
CHECKS += ["duplicates", "overlap", "control_words"]
REWRITES = "{{ messages | length }}{% for m in messages %} {{ m.content }} {{ eos_token }}{% endfor %}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return tmp_path


class Page:
    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        self.code = main(["check", *map(str, arguments)])
        self.text, self.fault = capsys.readouterr()

    def level(self, name: str) -> str:
        found = re.search(rf"^(ok|note|warning|error) +{name} ", self.text, re.MULTILINE)
        assert found, f"{name} is not on the page:\n{self.text}{self.fault}"
        return found[1]


def recipe(path: Path, **tables: dict[str, object]) -> Path:
    lines = [f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in t.items()) for name, t in tables.items()]
    path.write_text("\n".join(lines))
    return path


def base(small: Small, **more: object) -> dict[str, object]:
    return {"model": small.policy, "template": "plain", "max_len": 48, **more}


def rl(small: Small, **more: object) -> dict[str, object]:
    own = {"prompts": small.prompts, "reward": small.judge, "prompts_per_step": 8, "minibatch_size": 8}
    return base(small, max_new_tokens=8, steps=5, **{**own, **more})


def test_a_sound_recipe(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(here / "r.toml", sft=base(small, data=small.chats, batch_size=8, output="run", eval_share=0.1))
    page = Page(capsys, made, "--num-shown", 1)
    assert page.code == 0, page.fault
    assert {page.level(name) for name in [*CHECKS, "empty_mask", "cut"]} == {"ok"}
    assert "36 sequences fit --max_len 48" in page.text  # 40 records, a tenth of them held out
    assert "4 steps an epoch, 12 in all" in page.text
    assert "sequence 1:" in page.text
    assert "sequence 2:" not in page.text
    assert not (here / "run").exists()


def test_trained_tokens_stand_in_brackets_or_in_colour(
    small: Small, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "w3 w4", "output": "w5 w6"}, {"instruction": "w7 w8", "output": "\x1b[31mw9"}]
    flags = ["sft", "--model", small.policy, "--data", write_rows(here / "d.jsonl", rows), "--template", "plain"]
    flags += ["--batch-size", "1"]
    assert "w3 w4[w5 w6 <end>]" in Page(capsys, *flags, "--colour", "never").text
    coloured = Page(capsys, *flags, "--colour", "always").text
    assert re.search(r"w3 w4\x1b\[0m\x1b\[30;42mw5 w6 <end>\x1b\[0m", coloured)
    assert "[w5" not in coloured
    assert "sequence 1" not in Page(capsys, *flags, "--num-shown", "0").text


def test_what_records_say_reaches_no_terminal_raw() -> None:
    from kinkajou.train.check_page import printable

    assert printable("a\x1b[31mb\n\tc") == "a\\x1b[31mb\n\tc"
    long = printable("x" * 5000)
    assert "4,100 characters" in long
    assert len(long) < 1000


def test_large_data_is_looked_at_in_part(
    small: Small, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 records of 10 characters; a budget of 100."""
    from kinkajou.train import check_recipe

    monkeypatch.setattr(check_recipe, "MOST_CHARACTERS", 100)
    data = write_rows(here / "d.jsonl", [{"instruction": f"w{i} w4", "output": "w5w6"} for i in range(10, 50)])
    made = recipe(here / "r.toml", sft=base(small, data=data, batch_size=8))
    page = Page(capsys, made)
    assert (page.code, page.level("records"), page.level("steps")) == (0, "note", "ok"), page.fault
    assert "10 of 40 (25 %) records are tokenised" in page.text
    assert "all 10 sequences fit" in page.text
    assert "about 5 steps an epoch, 15 in all; 160 tokens an epoch" in page.text  # 40 records of 4 tokens
    assert "no two of 40 records" in page.text
    whole = Page(capsys, made, "--whole")
    assert "all 40 sequences fit" in whole.text
    assert "; 160 tokens an epoch (80 of them in answers), 480 in all" in whole.text


def test_flags_override_the_recipe(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(here / "r.toml", sft=base(small, data=small.chats, batch_size=8))
    assert "5 steps an epoch" in Page(capsys, made).text
    assert "10 steps an epoch" in Page(capsys, made, "--batch_size", 4).text


def test_the_stage_is_the_table(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"sft": base(small, data=small.chats, batch_size=8), "ppo": rl(small), "environment": {"world": 1}}
    made = recipe(here / "r.toml", **tables)
    several = Page(capsys, made)
    assert several.code == 2
    assert "several stages" in several.fault
    assert f"kinkajou check sft {made}" in several.fault
    for arguments in ((made, "--stage", "ppo"), ("ppo", made)):
        page = Page(capsys, *arguments)
        assert page.code == 0, page.fault
        assert page.level("room") == "ok"
    assert "sft" in Page(capsys, made, "--stage", "stf").fault
    assert "no table of a stage" in Page(capsys, recipe(here / "e.toml", environment={"world": 1})).fault
    assert "unknown table [sfd]" in Page(capsys, "sft", recipe(here / "u.toml", sft={}, sfd={})).fault
    assert "no recipe at none.toml" in Page(capsys, "none.toml").fault


def test_a_wrong_flag_points_to_the_stages_help(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(capsys, "sft", "--model", small.policy, "--data", small.chats, "--epohcs", 3)
    assert page.code == 2
    assert "kinkajou check sft --help" in page.fault
    assert "--model is missing" in Page(capsys, "sft").fault


def test_pairs(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"w{i}", "chosen": f"w{i} w4", "rejected": f"w{i} w5"} for i in range(3, 23)]
    data = write_rows(here / "pairs.jsonl", rows)
    for stage in ("reward", "prefer"):
        page = Page(capsys, recipe(here / "r.toml", **{stage: base(small, data=data, batch_size=8)}))
        assert page.code == 0, page.fault
        assert page.level("same_sides") == "ok"
        assert "sequence 1, chosen: 4 tokens, 3 trained" in page.text
        assert "w3[w3 w5 <end>]" in page.text
        assert "2 steps an epoch" in page.text
    judged = write_rows(
        here / "judged.jsonl", [{"prompt": "w3", "completion": f"w{i}", "label": True} for i in range(9)]
    )
    page = Page(capsys, "prefer", recipe(here / "k.toml", prefer=base(small, data=judged, batch_size=4, loss=["kto"])))
    assert page.code == 0, page.fault
    assert "2 steps an epoch" in page.text


def test_pairs_that_become_equal(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words that the tokenizer does not have make the same tokens."""
    rows = [{"prompt": "w3", "chosen": "one", "rejected": "two"}, {"prompt": "w3", "chosen": "w4", "rejected": "w5"}]
    made = recipe(here / "r.toml", reward=base(small, data=write_rows(here / "p.jsonl", rows), batch_size=1))
    page = Page(capsys, made)
    assert page.level("same_sides") == "warning"
    assert "sequences belong to pairs that are equal" in page.text
    assert "seen: 2 of 4 (50 %) sequences" in page.text


def test_reinforcement_learning(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(capsys, recipe(here / "r.toml", ppo=rl(small, eval_prompts=small.held_out)))
    assert page.code == 0, page.fault
    assert page.level("reward_scores") == "ok"
    assert "5 steps of 8 answers; up to 320 sampled tokens" in page.text
    assert "each prompt comes up 1 times" in page.text
    more = {"prompts_per_step": 4, "group_size": 4, "minibatch_size": 8, "reward": "rule:ended"}
    page = Page(capsys, recipe(here / "r.toml", grpo=rl(small, **more)))
    assert page.code == 0, page.fault
    assert "5 steps of 16 answers" in page.text
    assert "reward_scores" not in page.text


def test_prompts_that_leave_no_room(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "w3 " * 45}, *({"prompt": f"w{i}"} for i in range(3, 23))]
    made = recipe(here / "r.toml", ppo=rl(small, prompts=write_rows(here / "p.jsonl", rows)))
    page = Page(capsys, made)
    assert page.code == 2
    assert page.level("room") == "error"
    assert "20 of 21 (95.2 %) prompts leave room for 8 tokens" in page.text
    assert "--max_len 53" in page.text
    page = Page(capsys, made, "--bad_rows", "skip")
    assert (page.code, page.level("room")) == (0, "warning")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts_per_step": 41, "minibatch_size": 41}, "40 usable prompts, a step takes 41"),
        ({"minibatch_size": 5}, "8 answers a step, minibatches of 5"),
    ],
)
def test_steps_that_cannot_be_filled(
    changes: dict[str, object], words: str, small: Small, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page(capsys, recipe(here / "r.toml", ppo=rl(small, **changes)))
    assert (page.code, page.level("steps")) == (2, "error")
    assert words in page.text
    assert page.fault.startswith("error: preflight: 1 check failed: steps")


def test_a_reward_model_of_another_vocabulary(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_source(here / "other", AutoModelForSequenceClassification, "llama", tiny_tokenizer(words=80))
    page = Page(capsys, recipe(here / "r.toml", ppo=rl(small, reward=str(here / "other"))))
    assert (page.code, page.level("reward_scores")) == (2, "error")
    assert "different vocabularies" in page.fault


def test_a_template_that_rewrites_turns_ends_the_page(
    small: Small, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REWRITES
    save_source(here / "model", AutoModelForCausalLM, "llama", tokenizer)
    turns = [{"role": role, "content": "w3"} for role in ("user", "assistant", "user", "assistant")]
    data = write_rows(here / "d.jsonl", [{"messages": turns}])
    page = Page(capsys, "sft", "--model", here / "model", "--data", data)
    assert (page.code, page.level("turns")) == (2, "error")
    assert page.level("duplicates") == "ok"
    assert "steps" not in page.text
    assert "rewrites earlier turns" in page.fault
    assert "fix:" in page.fault


def test_a_folder_that_holds_a_run(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.toml").write_text("")
    made = recipe(here / "r.toml", sft=base(small, data=small.chats, batch_size=8, output="run"))
    page = Page(capsys, made)
    assert (page.code, page.level("output")) == (0, "warning")
    assert "output  " not in Page(capsys, made, "--overwrite").text


def test_bad_data_is_refused_before_torch_is_imported(small: Small, here: Path) -> None:
    (here / "bad.jsonl").write_text("{}\n")
    code = (
        "import sys; from kinkajou.cli import main; rc = main(sys.argv[1:]);"
        "print(rc, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "check", "sft", "--model", "gpt2", "--data", "bad.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert "bad.jsonl:1" in done.stderr
