"""Tensors that one strategy wrote are the same bits under every other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as load_distributed

from kinkajou.errors import UserError
from kinkajou.parallel.strategy import Single
from rank_processes import run_ranks
from shards import LAYOUTS, load, read, save_model, state_of, write

ROOT = Path(__file__).resolve().parents[1]
WORK = """
sys.path.insert(0, {root!r})
import shards
from pathlib import Path
source, folder = Path({source!r}), Path({folder!r})
for layout in {writers!r}:
    shards.write(layout, source, folder / layout)
print("|".join(x for layout in {readers!r} for x in shards.read(layout, source, [folder / x for x in {all!r}])))
dist.destroy_process_group()
os._exit(0)
"""


def on_ranks(world: int, source: Path, folder: Path, *, writers: list[str], readers: list[str], all: list[str]) -> None:
    """Those layouts write and then read what lies in `all`, on that many ranks."""
    words = {"source": str(source), "folder": str(folder), "writers": writers, "readers": readers, "all": all}
    ended = run_ranks(WORK.format(root=str(ROOT), **words), range(world), world=world)
    for rank, one in ended.items():
        assert one.code == 0, one.err
        assert one.out.strip() == "", rank


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one and two processes write; two read each other's files and the one's."""
    folder = tmp_path_factory.mktemp("written")
    write("naive", source, folder / "naive")
    two = [name for name, (world, _) in LAYOUTS.items() if world == 2]
    on_ranks(2, source, folder, writers=two, readers=two, all=["naive", *two])
    return folder


def test_one_process_reads_what_two_wrote(source: Path, written: Path) -> None:
    assert read("naive", source, sorted(written.iterdir())) == []


def test_each_part_is_written_once(source: Path, written: Path) -> None:
    state = state_of(load(source))
    numbers = sum(x.numel() for x in state.values())
    for layout, (world, _) in LAYOUTS.items():
        if world > 2:
            continue
        files = sorted((written / layout).iterdir())
        whole = layout in ("naive", "ddp")
        assert [f.name for f in files] == (
            ["state.safetensors"] if whole else [f"state-0000{i}-of-00002.safetensors" for i in (1, 2)]
        )
        assert sum(x.numel() for file in files for x in load_file(file).values()) == numbers
        if not whole:
            sizes = [sum(x.numel() for x in load_file(file).values()) for file in files]
            assert min(sizes) > 0.2 * numbers


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("layout", ["naive", "zero2", "tp"])
def test_pytorchs_own_reader_reads_them(layout: str, source: Path, written: Path) -> None:
    want = state_of(load(source))
    got = {name: torch.full_like(x, 3.0) for name, x in want.items()}
    load_distributed(got, storage_reader=HuggingFaceStorageReader(str(written / layout)), no_dist=True)
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.slow
def test_four_processes_too(source: Path, written: Path, tmp_path: Path) -> None:
    four = [name for name, (world, _) in LAYOUTS.items() if world == 4]
    on_ranks(4, source, written, writers=four, readers=four, all=list(LAYOUTS))
    on_ranks(2, source, written, writers=[], readers=["ddp", "zero2", "tp"], all=four)
    assert read("naive", source, [written / name for name in four]) == []
    numbers = sum(x.numel() for x in state_of(load(source)).values())
    for layout in four:
        assert sum(x.numel() for f in (written / layout).iterdir() for x in load_file(f).values()) == numbers
    for layout in four:
        for file in (written / layout).iterdir():
            file.rename(tmp_path / file.name)
        assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"b": torch.zeros(2)}, "has no tensor 'b'"),
        ({"a": torch.zeros(5)}, "'a' has another shape"),
        ({"a": torch.zeros(4, 1)}, "'a' has another shape"),
        ({"a": torch.zeros(4).double()}, "'a' has another type"),
    ],
)
def test_what_does_not_fit_names_file_and_tensor(wanted: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(4.0)}, path)
    with pytest.raises(UserError, match=words) as refused:
        Single().fill(wanted, [path])
    assert refused.value.exit_code == 4
    assert str(path) in str(refused.value)


def test_a_part_that_is_missing_or_twice_is_noticed(written: Path, tmp_path: Path) -> None:
    first, second = sorted((written / "zero2").iterdir())
    name, x = next((name, x) for name, x in load_file(first).items() if x.dim() == 2)
    whole = torch.zeros(x.shape[0] + load_file(second)[name].shape[0], x.shape[1], dtype=x.dtype)
    Single().fill({name: whole}, [first, second])
    with pytest.raises(UserError, match=r"parts of .* are missing"):
        Single().fill({name: whole}, [second])
    with pytest.raises(UserError, match=r"parts of .* are there twice"):
        Single().fill({name: whole}, [first, second, second])
    with pytest.raises(UserError, match="has no tensor 'a'"):
        Single().fill({"a": torch.zeros(1)}, [])


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"\x00" * 64, b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.safetensors cannot be read"):
            Single().fill({"a": torch.zeros(1)}, [path])
    with pytest.raises(UserError, match=r"gone\.safetensors cannot be read"):
        Single().fill({"a": torch.zeros(1)}, [tmp_path / "gone.safetensors"])


def test_places_stand_where_pytorch_looks(written: Path) -> None:
    path = sorted((written / "zero2").iterdir())[1]
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        assert places.keys() == set(file.keys())
        assert all(place["saved_offsets"][0] > 0 for place in places.values() if place["saved_offsets"])
