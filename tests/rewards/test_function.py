"""A user's Python function: well, wrong, hanging or dying; and what becomes of its process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from answers import answer

from kinkajou.errors import UserError
from kinkajou.rewards.function import Function

MODULE = """
import os, sys, time
print("imported")

class Scalar:
    def __init__(self, x): self.x = x
    def item(self): return self.x
Scalar.__module__ = "numpy"

not_callable = 3
def good(prompts, completions, answer, ended, **columns):
    assert columns["day"] == [None, "Monday"] and columns["messages"][0] == [{"role": "user", "content": "first?"}]
    return [len(p) + len(c) + (a or 0) + e for p, c, a, e in zip(prompts, completions, answer, ended)]
def narrow(completions): return tuple(len(c) for c in completions)
def scalars(completions, **rest): return [Scalar(2), True]
def talks(completions, **rest):
    print("a line\\n{}")
    sys.__stdout__.write("another") ; sys.__stdout__.flush(); os.write(1, b"raw"); os.system("echo child")
    assert sys.stdin.read() == ""
    return [0.5] * len(completions)
def raises(completions, **rest): raise ValueError("no such word")
def leaves(completions, **rest): sys.exit(3)
def nan(completions, **rest): return [1.0, float("nan")]
def infinite(completions, **rest): return [1.0, float("-inf")]
def huge(completions, **rest): return [1.0, 10**400]
def none(completions, **rest): return [1.0, None]
def text(completions, **rest): return [1.0, "2"]
def short(completions, **rest): return [1.0]
def number(completions, **rest): return 1.0
def nothing(completions, **rest): pass
def dies(completions, **rest): os._exit(7)
def killed(completions, **rest): os.kill(os.getpid(), 9)
def hangs(completions, **rest):
    while True: pass
def sleeps_with_a_child(completions, **rest):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("pids", "w").write(f"{os.getpid()} {child.pid}\\n")
    time.sleep(600)
def once(completions, **rest):
    if not os.path.exists("seen"):
        open("seen", "w").close()
        time.sleep(600)
    return [1, 2]
"""
ANSWERS = [answer("one", "first?", answer=1), answer("three", "second?", ended=False, day="Monday")]
Make = Callable[..., Function]


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    (tmp_path / "scores_x.py").write_text(MODULE)
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the user stands in for the library')")
    monkeypatch.chdir(tmp_path)
    return lambda name, timeout_s=20.0: Function(f"scores_x:{name}", timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("name", "scores"), [("good", [11, 12]), ("narrow", [3, 5]), ("scalars", [2, 1]), ("talks", [0.5, 0.5])]
)
def test_scores(function: Make, name: str, scores: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    made = function(name)
    assert made(ANSWERS) == scores
    assert made(ANSWERS) == scores  # the same process
    seen = capfd.readouterr()
    assert seen.out == ""
    if name == "talks":
        assert all(word in seen.err for word in ("imported", "a line", "another", "raw", "child"))


@pytest.mark.parametrize("name", ["nan", "infinite", "huge"])
def test_a_score_that_is_not_finite_is_for_the_trainer_to_judge(function: Make, name: str) -> None:
    made = function(name)
    for _ in range(2):
        first, second = made(ANSWERS)
        assert first == 1.0
        assert str(second) == {"nan": "nan", "infinite": "-inf", "huge": "inf"}[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", ("raised an error", "ValueError", "no such word", "scores_x.py:", "first?")),
        ("leaves", ("raised an error", "SystemExit")),
        ("none", ("None instead of a number", "second?")),
        ("text", ("'2'", "instead of a number", "second?")),
        ("short", ("wrong number of scores", "1 for 2 samples")),
        ("number", ("returned float, not a list",)),
        ("nothing", ("returned NoneType, not a list",)),
    ],
)
def test_a_wrong_function_is_named_and_may_be_asked_again(function: Make, name: str, words: tuple[str, ...]) -> None:
    made = function(name)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            made(ANSWERS)
        assert caught.value.exit_code == 2
        for word in (f"scores_x:{name}", "prompts.jsonl:7", *words):
            assert word in str(caught.value)


@pytest.mark.parametrize(("name", "how"), [("dies", "exit code 7"), ("killed", "SIGKILL")])
def test_a_process_that_dies(function: Make, name: str, how: str) -> None:
    with pytest.raises(UserError, match=f"ended(.|\n)*{how}(.|\n)*first\\?"):
        function(name)(ANSWERS)


def test_a_hang_is_ended(function: Make) -> None:
    began = time.monotonic()
    made = function("hangs", timeout_s=1.0)
    with pytest.raises(UserError) as caught:
        made(ANSWERS)
    assert time.monotonic() - began < 10
    for word in ("scores_x:hangs", "longer than 1 s", "--reward_timeout_s", "first?"):
        assert word in str(caught.value)
    assert made.process.poll() is not None


def test_after_a_hang_a_new_process_is_started(function: Make) -> None:
    made = function("once", timeout_s=1.0)
    with pytest.raises(UserError):
        made(ANSWERS)
    assert made(ANSWERS) == [1, 2]


def test_the_process_ends_with_its_owner(function: Make) -> None:
    made = function("good")
    process = made.process
    assert process.poll() is None
    del made
    wait_for(lambda: process.poll() is not None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scores_x:absent", ("does not exist", "'absent'")),
        ("scores_x:not_callable", ("does not exist",)),
        ("nosuchmodule_x:f", ("cannot be imported", "ModuleNotFoundError")),
        ("broken_x:f", ("cannot be imported", "SyntaxError")),
        ("leaving_x:f", ("cannot be imported", "SystemExit")),
    ],
)
def test_a_module_that_does_not_load(function: Make, tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    (tmp_path / "broken_x.py").write_text("def f(:")
    (tmp_path / "leaving_x.py").write_text("raise SystemExit(1)")
    with pytest.raises(UserError) as caught:
        Function(name, timeout_s=20)
    for word in (name, *words):
        assert word in str(caught.value)


def test_nothing_is_left_when_the_parent_is_killed(function: Make, tmp_path: Path) -> None:
    """The worker sees the end of its pipe though its function never returns, and takes its own children along."""
    code = dedent("""
        from kinkajou.data.records import Message, Prompt
        from kinkajou.rewards.answer import Answer
        from kinkajou.rewards.function import Function
        given = Answer(Prompt((Message("user", "q"),), {}, "p"), "a", True)
        Function("scores_x:sleeps_with_a_child", timeout_s=60)([given])
    """)
    pids = tmp_path / "pids"
    # -P: the user's json.py is for the function's own process to ignore, not for this one.
    with subprocess.Popen([sys.executable, "-P", "-c", code], stderr=subprocess.DEVNULL) as parent:
        try:
            wait_for(lambda: pids.exists() and pids.read_text().endswith("\n"))
        finally:
            os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for yet is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
