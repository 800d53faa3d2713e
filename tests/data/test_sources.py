"""Where records come from: missing files, limits and subsets, the hub, real data; and fuzzing of the whole."""

import builtins
import dataclasses
import importlib
import json
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
from reading import ANSWER, GOOD, HH, PAIR, READERS, USER, packed, refused, said, write_jsonl

from kinkajou.data import sources
from kinkajou.data.sources import (
    BadRow,
    Chat,
    Message,
    Prompt,
    Rows,
    describe_skipped,
    read_chats,
    read_pairs,
    read_prompts,
)
from kinkajou.errors import UserError

# --- where there is no such file --------------------------------------------------------------------------


def test_missing_file_names_its_neighbours(here):
    write_jsonl("train.jsonl", GOOD)
    error = refused(read_chats, "tran.jsonl")
    assert error.problem == "tran.jsonl: no such file"
    assert error.fix == "did you mean train.jsonl?"
    assert refused(read_chats, "zzzzzzzz.csv").fix == "in . there is: train.jsonl"
    assert refused(read_chats, "no/such.json").fix == "the folder no does not exist either"
    for source in ("", "a\0b.json", "x" * 5000 + ".json", "https://example.org/a.json"):
        assert refused(read_chats, source).problem


def test_folder(here):
    Path("set").mkdir()
    assert refused(read_chats, "set").evidence == "it holds no data files"
    write_jsonl("set/train.jsonl", GOOD)
    error = refused(read_chats, "set")
    assert error.problem == "set: a folder, not a file"
    assert error.evidence == "it holds train.jsonl"
    Path("set.json").mkdir()
    assert refused(read_chats, "set.json").problem == "set.json: a folder, not a file"


def test_unreadable_file(here, monkeypatch):
    source = write_jsonl("a.jsonl", GOOD)

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    # Not by chmod: the tests may run as root.
    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(builtins, "open", denied)
    error = refused(read_chats, source)
    assert (error.problem, error.evidence) == ("a.jsonl: cannot be read", "Permission denied")


def test_special_and_dangling_files(here):
    Path("gone.jsonl").symlink_to("nowhere.jsonl")
    assert refused(read_chats, "gone.jsonl").problem == "gone.jsonl: no such file"
    mkfifo = pytest.importorskip("os").mkfifo
    mkfifo("pipe.jsonl")
    assert refused(read_chats, "pipe.jsonl").problem == "pipe.jsonl: not a regular file"


# --- bad rows, limits, subsets ----------------------------------------------------------------------------


def test_no_good_row_shows_the_first(here):
    error = refused(read_chats, write_jsonl("a.jsonl", {"instruction": "Hi"}, {}, {}), bad_rows="skip")
    assert error.problem == 'a.jsonl: no good row among 3; the first: a.jsonl:1: missing field "output"'
    assert error.evidence == "the row has: instruction"


def test_more_than_one_bad_row_in_a_hundred_is_an_error(here):
    for good, bad, told in (
        (299, 3, ""),
        (297, 3, ""),
        (296, 3, "3 of 299 rows"),
        (3, 1, ""),
        (98, 2, "2 of 100 rows"),
    ):
        source = write_jsonl("a.jsonl", *[GOOD] * (good - 1), *[{"instruction": "Hi"}] * bad, GOOD)
        if told:
            error = refused(read_chats, source, bad_rows="skip")
            assert error.problem == f"a.jsonl: {told} are bad; 1% may be skipped"
            assert f'a.jsonl:{good} (missing field "output")' in error.evidence
        else:
            assert len(read_chats(source, bad_rows="skip").skipped) == bad


def test_max_rows_counts_good_rows_and_stops_reading(here, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BAD_SHARE", 1.0)
    rows = [GOOD | {"output": str(number)} for number in range(5)]
    source = write_jsonl("a.jsonl", rows[0], {}, *rows[1:], {})
    found = read_chats(source, max_rows=2, bad_rows="skip")
    assert [chat.messages[1].content for chat in found.rows] == ["0", "1"]
    assert len(found.skipped) == 1
    assert found.sha256 == read_chats(source, bad_rows="skip").sha256
    assert len(read_chats(source, max_rows=1).rows) == 1
    assert "max_rows is 0" in refused(read_chats, source, max_rows=0).problem


def test_subset_of_a_file(here):
    rows = [PAIR | {"subset": name} for name in ("helpful", "harmless", "helpful")]
    source = write_jsonl("a.jsonl", *rows, {"subset": "harmless"})
    assert [pair.place for pair in read_pairs(source, subset="helpful").rows] == ["a.jsonl:1", "a.jsonl:3"]
    error = refused(read_pairs, source, subset="helpfull")
    assert error.problem == 'a.jsonl: no rows of the subset "helpfull"'
    assert error.evidence == "present: helpful (2), harmless (2)"
    assert error.fix == "did you mean 'helpful'?"
    error = refused(read_pairs, write_jsonl("b.jsonl", PAIR), subset="helpful")
    assert error.problem == 'b.jsonl:1: missing field "subset"'
    assert error.fix.startswith("leave --subset out")


def test_describe_skipped():
    bad = [BadRow(f"a.jsonl:{number}", "broken") for number in range(1, 8)]
    assert describe_skipped([]) == ""
    assert describe_skipped(bad[:1]) == "skipped 1 bad row: a.jsonl:1 (broken)"
    assert describe_skipped(tuple(bad)) == (
        "skipped 7 bad rows: a.jsonl:1 (broken); a.jsonl:2 (broken); a.jsonl:3 (broken); a.jsonl:4 (broken); "
        "a.jsonl:5 (broken); and 2 more"
    )


def test_records_are_frozen_and_complete():
    message = Message("user", "Hi")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.role = "text"  # type: ignore[misc]
    assert Chat((message,), "a:1") == Chat((Message("user", "Hi"),), "a:1")
    assert Rows((), (), "") == Rows((), (), "")
    assert Prompt((message,), {"a": 1}, "a:1").meta["a"] == 1


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(here, monkeypatch):
    """A stand-in for the package `datasets`; the calls of load_dataset end up in `hub.calls`."""
    module = types.ModuleType("datasets")
    module.calls = []

    def load_dataset(name, config=None, **options):
        module.calls.append((name, config, options))
        if name == "no/body":
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        return [PAIR, PAIR | {"chosen": "Good day!"}]

    module.load_dataset = load_dataset
    module.get_dataset_config_names = lambda name: ["default"] if "hh" in name else ["easy", "hard"]
    module.get_dataset_split_names = lambda _name, _config: ["train", "test"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("source", "subset", "call"),
    [
        ("Anthropic/hh-rlhf", None, (None, {"split": "train"})),
        ("Anthropic/hh-rlhf", "harmless-base", (None, {"data_dir": "harmless-base", "split": "train"})),
        ("Anthropic/hh-rlhf", "test", (None, {"split": "test"})),
        ("some/tasks", "hard", ("hard", {"split": "train"})),
    ],
)
def test_hub_id(hub, source, subset, call):
    found = read_pairs(source, subset=subset)
    assert hub.calls == [(source, *call)]
    assert [pair.place for pair in found.rows] == [f"{source}:record 1", f"{source}:record 2"]
    assert found.sha256 == read_pairs(source, subset=subset).sha256
    assert found.sha256 != read_pairs(source, subset=subset, max_rows=1).sha256


def test_hub_id_that_cannot_be_loaded(hub):
    error = refused(read_pairs, "no/body")
    assert error.problem == "no/body: no such file, and as a hub id it could not be loaded"
    assert error.evidence == "ConnectionError: Couldn't reach the hub"


def test_local_path_wins_over_the_hub(hub):
    Path("Dahoas").mkdir()
    write_jsonl("Dahoas/rm-static.jsonl", PAIR)
    assert len(read_pairs("Dahoas/rm-static.jsonl").rows) == 1
    Path("Dahoas/rm-static").mkdir()
    assert "a folder" in refused(read_pairs, "Dahoas/rm-static").problem
    assert "no such file" in refused(read_pairs, "Dahoas/rm_static.jsonl").problem
    assert hub.calls == []


# --- real files -------------------------------------------------------------------------------------------


def real(path):
    for folder in Path(__file__).resolve().parents:
        if (found := folder / "shared" / "data" / path).exists():
            return str(found)
    pytest.skip(f"the shared data folder with {path} is not beside this checkout")


@pytest.mark.parametrize(
    ("kind", "path", "good", "bad"),
    [
        ("pairs", "preference/hh/hh_dev.jsonl.gz", 6724, {"is empty": 12, "ends with the user": 2}),
        ("pairs", "preference/rasbt/rasbt_dev.json", 889, {"are the same": 5}),
        ("chats", "preference/rasbt/rasbt_dev.json", 894, {}),
        ("pairs", "preference/llamafactory/dpo_en_demo.json", 300, {}),
        ("pairs", "preference/llamafactory/dpo_zh_demo.json", 300, {}),
        ("pairs", "preference/open_instruct_sample/preference_sample.jsonl", 100, {}),
        ("pairs", "preference/stack_exchange_tiny/stack_exchange_paired_tiny.json", 25, {}),
        ("chats", "sft/alpaca_5k/alpaca_5000.json", 4998, {'field "output" is empty': 2}),
        ("chats", "sft/llamafactory_demo/alpaca_zh_demo.json", 1000, {}),
        ("chats", "sft/llamafactory_demo/glaive_toolcall_en_demo.json", 147, {'role "function_call"': 153}),
        ("chats", "sft/llamafactory_demo/v1_sft_demo.jsonl", 500, {}),
        ("chats", "sft/multiturn_fixtures/conversations.jsonl", 128, {}),
        ("chats", "sft/multiturn_fixtures/dummy_conversation.json", 500, {}),
        ("chats", "sft/multiturn_fixtures/sft_sample.jsonl", 100, {}),
        ("chats", "sft/oasst_zh/oaast_sft_zh.json", 766, {}),
        ("chats", "sft/seed_tasks/belle_dev1K.json", 1000, {}),
        ("chats", "sft/seed_tasks/seed_tasks.jsonl", 175, {}),
        ("prompts", "sft/oasst_zh/oaast_rm_zh.json", 775, {}),
        ("prompts", "prompts/instructionwild/user_1.jsonl", 429, {}),
        ("prompts", "prompts/instructionwild/user_2.jsonl", 246, {"invalid JSON": 2}),
        ("prompts", "prompts/instructionwild/user_3.jsonl", 198, {"invalid JSON": 3}),
        ("prompts", "prompts/awesome_chatgpt/prompts.csv", 204, {"invalid csv": 5}),
        ("prompts", "prompts/vicuna/vicuna_bench_question.jsonl", 80, {}),
        ("prompts", "prompts/gsm8k_train/train.jsonl", 7473, {}),
        ("prompts", "prompts/arithmetic_sequence/train.parquet", 800, {}),
        ("prompts", "prompts/countdown_train/train.parquet", 8001, {}),
    ],
)
def test_real_file(kind, path, good, bad, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BAD_SHARE", 1.0)
    if path.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    found = READERS[kind](real(path), bad_rows="skip")
    assert len(found.rows) == good
    assert len(found.skipped) == sum(bad.values())
    for phrase, count in bad.items():
        assert sum(phrase in row.problem for row in found.skipped) == count


def test_real_refusals():
    message = refused(read_chats, real("sft/oasst_100/en_100_message.jsonl.gz")).problem
    assert message.endswith("en_100_message.jsonl.gz:1: none of the known fields")
    message = refused(read_chats, real("sft/oasst_zh/oaast_rm_zh.json")).problem
    assert message.endswith('oaast_rm_zh.json:record 1: field "output" is a list, not text')
    message = refused(read_prompts, real("prompts/instructionwild/user_2.jsonl")).problem
    assert message.endswith("user_2.jsonl:134:455: invalid JSON: invalid \\escape")


def test_real_hh_pairs_are_sound():
    found = read_pairs(real("preference/hh/hh_dev.jsonl.gz"), subset="harmless-base", bad_rows="skip")
    assert 1000 < len(found.rows) < 6000
    for pair in found.rows:
        assert pair.prompt[-1].role == "user"
        assert pair.chosen[-1].role == pair.rejected[-1].role == "assistant"
        assert pair.chosen != pair.rejected


def test_real_gsm8k_keeps_the_answer():
    prompt = read_prompts(real("prompts/gsm8k_train/train.jsonl"), max_rows=1).rows[0]
    assert prompt.meta["answer"].endswith("#### 72")


# --- the whole --------------------------------------------------------------------------------------------


def mutated(data, rng):
    """`data` after one to three random accidents."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(out) + 1), rng.randint(1, 12)
        accident = rng.randrange(6)
        if accident == 0:
            del out[at : at + size]
        elif accident == 1:
            out[at:at] = rng.randbytes(size)
        elif accident == 2 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif accident == 3:
            del out[at:]
        elif accident == 4:
            word = rng.choice(
                [b"null", b"NaN", b'"', b"{", b"[", b"}", b"]", b",", b"\\ud800", b"\0", b"\xff", b"1e999"]
            )
            out[at:at] = word
        else:
            other = rng.randrange(len(out) + 1)
            out[at:at] = out[other : other + 40]
    return bytes(out)


FUZZED = [
    (
        "chats",
        "a.jsonl",
        "".join(json.dumps(row) + "\n" for row in [GOOD, {"messages": said(USER, ANSWER)}] * 3),
    ),
    ("pairs", "a.json", json.dumps([PAIR, {"chosen": HH + "a", "rejected": HH + "b"}] * 3, indent=1)),
    ("prompts", "a.csv", 'prompt,answer\n"a, b",1\n"c\nd",2\nsay ""e"",3\n'),
    ("prompts", "a.json", json.dumps({"data": [{"messages": said(USER)}, {"turns": ["a"]}]})),
]


def attempt(reader, source, **options):
    try:
        return reader(source, **options)
    except UserError as error:
        return error


@pytest.mark.parametrize(("kind", "name", "text"), FUZZED)
@pytest.mark.parametrize("zipped", [False, True])
def test_fuzz_ends_in_rows_or_a_user_error(here, kind, name, text, zipped):
    rng = random.Random(f"{kind} {name} {zipped}")
    name += ".gz" if zipped else ""
    outcomes = set()
    for turn in range(150):
        # Of the zipped files one half is damaged before zipping, the other after.
        if not zipped:
            data = mutated(text.encode(), rng)
        elif turn % 2:
            data = mutated(packed(text.encode()), rng)
        else:
            data = packed(mutated(text.encode(), rng))
        Path(name).write_bytes(data)
        result = attempt(READERS[kind], name, bad_rows="skip" if turn % 3 else "error")
        outcomes.add(type(result))
        # What is shown can be printed; the problem is one line that names the file.
        assert f"{result} {result!r}".encode()
        assert result.problem.startswith(name) if isinstance(result, UserError) else result.rows
        assert "\n" not in getattr(result, "problem", "")
    assert outcomes == {Rows, UserError}


def test_fuzz_parquet(here):
    arrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"prompt": f"Hi {n}", "n": n} for n in range(20)]), "good.parquet")
    whole, rng = Path("good.parquet").read_bytes(), random.Random(7)
    for _ in range(60):
        Path("a.parquet").write_bytes(mutated(whole, rng))
        result = attempt(read_prompts, "a.parquet", bad_rows="skip")
        assert isinstance(result, UserError) or result.rows


def test_reading_needs_the_standard_library_only(here):
    source = write_jsonl("a.jsonl", GOOD)
    code = (
        "import sys; from kinkajou.data.sources import read_chats; "
        f"assert len(read_chats({source!r}).rows) == 1; "
        "heavy = {'torch', 'numpy', 'pyarrow', 'datasets', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
