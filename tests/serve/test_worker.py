"""The worker's parts in this process: prompts of requests, pieces of tokens, jobs from ask to finish."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from kinkajou import faults
from kinkajou.batch import Sampling
from kinkajou.data import fitting
from kinkajou.data.chat import ChatFormat
from kinkajou.data.records import Message
from kinkajou.data.tokenizer import load_tokenizer, prepare, train_tokenizer
from kinkajou.engine.scheduler import Sample
from kinkajou.engine.session import Said
from kinkajou.engine.text import Answer
from kinkajou.errors import UserError
from kinkajou.models.load import load_scalar_model
from kinkajou.serve.backend import Job, Refused, Turn
from kinkajou.serve.worker import job_of
from kinkajou.serve.worker_engine import FAILED, Choice, Engine, Open, Report
from kinkajou.serve.worker_model import load_engine
from kinkajou.serve.worker_prompts import Pieces, Prompts
from kinkajou.serve.worker_reward import load_scorer
from small import Small

SETTINGS: dict[str, Any] = {
    **{"bits": 16, "dtype": "fp32", "slots": 3, "context": 40, "max_tokens": 24, "template": "plain", "threads": None}
}


def form_of(small: Small) -> ChatFormat:
    return ChatFormat(load_tokenizer(small.policy, template="plain")[0])


def chat(*texts: str, system: str = "") -> tuple[Turn, ...]:
    turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return (*([Turn("system", system)] if system else []), *turns)


def words(count: int, first: int = 3) -> str:
    return " ".join(f"w{first + i}" for i in range(count)) + " "


def test_a_prompt_is_the_templates_and_its_answer_has_the_room_that_is_left(small: Small) -> None:
    form = form_of(small)
    prompts = Prompts(form, context=40, longest=24)
    turns = chat(words(3), words(4), words(5), system=words(2))
    found = prompts.prompt(Job(turns))
    assert list(found.tokens) == form.prompt([Message(turn.role, turn.content) for turn in turns])
    assert (found.room, found.dropped) == (24, 0)
    assert prompts.prompt(Job(turns, max_tokens=5)).room == 5
    assert prompts.prompt(Job(chat(words(37)))).room == 3
    text = prompts.prompt(Job(text="w3 <end> w4"))
    assert form.end_id not in text.tokens  # what is typed is no control token
    assert prompts.prompt(Job(text="w3 w4")).tokens == tuple(form.tokenizer("w3 w4").input_ids)


@pytest.mark.parametrize(
    ("job", "param", "problem"),
    [
        (Job(chat(words(40))), "messages", "40 tokens"),
        (Job(text=words(41)), "prompt", "41 tokens"),
        (Job(text=""), "prompt", "no tokens"),
        (Job(text="w " * 200_000), "prompt", "cannot fit"),
        (Job(chat("\ud83d")), "messages", "surrogate"),
        (Job(chat(words(3), words(3), words(45)), drop_oldest=True), "messages", "45 tokens"),
    ],
)
def test_what_has_no_prompt_is_refused_with_its_field(small: Small, job: Job, param: str, problem: str) -> None:
    with pytest.raises(Refused) as caught:
        Prompts(form_of(small), context=40, longest=24).prompt(job)
    assert caught.value.param == param
    assert problem in caught.value.problem


def test_the_oldest_turns_go_first_and_the_system_message_stays(small: Small) -> None:
    form = form_of(small)
    prompts = Prompts(form, context=40, longest=24)
    turns = chat(*(words(7, 10 * i + 3) for i in range(7)), system="w90 ")
    found = prompts.prompt(Job(turns, drop_oldest=True, max_tokens=8))
    # 1 + 7 n + ends of answers + 8 <= 40: three turns of seven and one end token.
    kept = [turns[0], *turns[-3:]]
    assert list(found.tokens) == form.prompt([Message(turn.role, turn.content) for turn in kept])
    assert (found.dropped, found.room) == (4, 8)
    with pytest.raises(Refused):
        prompts.prompt(Job(turns))
    assert prompts.prompt(Job(turns[:3], drop_oldest=True)).dropped == 0
    many = chat(*("w3 " * 400 for _ in range(31)), words(1), words(2))
    assert prompts.prompt(Job(many, drop_oldest=True)).dropped == 32


def test_a_template_that_refuses_an_order_of_roles_is_the_requests_fault(small: Small) -> None:
    tokenizer, _ = load_tokenizer(small.policy, template="plain")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    prompts = Prompts(ChatFormat(tokenizer), context=40, longest=24)
    with pytest.raises(Refused, match=r"template .* roles system, user: no system") as caught:
        prompts.prompt(Job(chat("w3", system="w4")))
    assert str(small.policy) not in caught.value.problem


def test_a_chat_of_many_turns_that_cannot_fit_is_refused_without_the_cost_of_their_square(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = form_of(small)
    prompts, asked = Prompts(form, context=400, longest=24), list[int]()
    rendered = form.render

    def render(messages: Any, *, to_answer: bool) -> str:
        asked.append(len(messages))
        return rendered(messages, to_answer=to_answer)

    monkeypatch.setattr(form, "render", render)
    monkeypatch.setattr(fitting, "QUICK", 1000)
    turns = chat(*("w3 w4 " for _ in range(301)))
    with pytest.raises(Refused, match="more than 400 tokens") as caught:
        prompts.prompt(Job(turns))
    assert caught.value.code == "context_length_exceeded"
    assert len(asked) == 1
    asked.clear()
    found = prompts.prompt(Job(turns, drop_oldest=True))
    messages = [Message(turn.role, turn.content) for turn in turns]
    assert list(found.tokens) == form.prompt(messages[found.dropped :])
    assert len(found.tokens) <= 400 - 24 < len(form.prompt(messages[found.dropped - 2 :]))


def test_pieces_are_the_bytes_that_tokens_stand_for() -> None:
    tokenizer = train_tokenizer(["the the the"], 262)
    prepare(tokenizer, template="plain", source="here")
    pieces = Pieces(ChatFormat(tokenizer))
    tokens = tokenizer("the 東\n").input_ids
    found = [pieces.alternative(token, -1.0) for token in tokens]
    assert b"".join(one.bytes for one in found) == "the 東\n".encode()
    assert [one.text for one in found if len(one.bytes) == 1 and one.bytes[0] > 127] == ["�"] * 3


def test_pieces_of_words_have_their_blanks(small: Small) -> None:
    pieces = Pieces(form_of(small))
    assert [pieces.alternative(token, 0.0).bytes for token in (3, 4)] == [b" w3", b" w4"]


class Out:
    """What an engine wrote; `wait` until something is there."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.changed = threading.Condition()

    def __call__(self, line: dict[str, Any]) -> None:
        with self.changed:
            self.lines.append(json.loads(json.dumps(line)))
            self.changed.notify_all()

    def rows(self, kind: str) -> list[list[Any]]:
        return [row for line in self.lines for row in line.get(kind, ())]

    def wait(self, until: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(until, timeout=30)

    def finished(self, number: int, choices: int = 1) -> list[list[Any]]:
        """A job's pieces once all its choices have finished."""
        self.wait(lambda: sum(bool(row[4]) for row in self.rows("pieces") if row[0] == number) == choices)
        return [row for row in self.rows("pieces") if row[0] == number]


@pytest.fixture
def served(small: Small) -> Iterator[tuple[Engine, Out, dict[str, Any]]]:
    out = Out()
    engine, facts = load_engine({"source": small.policy, **SETTINGS}, out)
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine, out, facts
    engine.inbox.put(("end",))
    thread.join(30)
    engine.threads.shutdown()


Served = tuple[Engine, Out, dict[str, Any]]


def text_of(rows: list[list[Any]], choice: int = 0) -> str:
    return "".join(row[2] for row in rows if row[1] == choice)


def test_a_job_from_ask_to_finish(served: Served) -> None:
    engine, out, facts = served
    assert (facts["context"], facts["slots"], facts["bits"], facts["device"]) == (40, 3, 16, "cpu")
    engine.ask(7, Job(chat("w3 w4"), max_tokens=6, temperature=0.0, logprobs=2))
    rows = out.finished(7)
    assert out.rows("began") == [[7, 2, 0]]
    last = rows[-1]
    assert last[4] in ("stop", "length")
    tokens = [token for row in rows for token in (row[5] if len(row) > 5 else [])]
    assert len(tokens) == last[3] - (last[4] == "stop")
    assert text_of(rows) == "".join(bytes.fromhex(said[1]).decode() for said, _ in tokens).strip()
    for said, likeliest in tokens:  # greedy
        assert said == likeliest[0]
        assert len(likeliest) == 2
    out.wait(lambda: out.lines[-1]["load"][:2] == [0, 0])
    assert not engine.open
    assert not engine.choices


def test_choices_differ_and_a_seed_repeats_them_whatever_their_number(served: Served) -> None:
    engine, out, _ = served
    asked = {"max_tokens": 8, "temperature": 3.0}
    for number, (n, seed) in enumerate([(3, 5), (2, 5), (2, -5), (2, None), (2, None)]):
        engine.ask(number, Job(chat("w3 w4"), n=n, seed=seed, **asked))
    rows = [out.finished(number, n) for number, n in enumerate((3, 2, 2, 2, 2))]
    said = [[text_of(part, choice) for choice in range(2)] for part in rows]
    assert said[0] == said[1]
    assert len({text for pair in said[1:] for text in pair}) == 8


def test_a_stop_text_ends_a_choice_before_it_and_takes_its_tokens_along(served: Served) -> None:
    engine, out, _ = served
    ask = {"max_tokens": 12, "temperature": 0.0}
    engine.ask(1, Job(chat("w3 w4"), **ask))
    whole = text_of(out.finished(1)).split()
    assert len(whole) > 3
    stop = next(i for i, word in enumerate(whole) if i and word not in whole[:i])
    engine.ask(2, Job(chat("w3 w4"), stops=(whole[stop],), logprobs=0, **ask))
    rows = out.finished(2)
    assert text_of(rows) == " ".join(whole[:stop])
    assert rows[-1][4] == "stop"
    tokens = [token for row in rows for token in (row[5] if len(row) > 5 else [])]
    assert len(tokens) == stop
    assert all(likeliest == [] for _, likeliest in tokens)


@pytest.mark.parametrize(
    ("said", "stop", "pieces"),
    [
        ("aaab", "aab", [("a", "a"), ("", "")]),
        ("aaa.", "aab", [("a", "a"), ("aa", "aa")]),
        ("a  b.", "x", [("a", "a"), ("  b", "  b"), ("", "")]),
    ],
)
def test_tokens_are_told_with_their_text(served: Served, said: str, stop: str, pieces: list[tuple[str, str]]) -> None:
    """One letter a token, the dot is the end token: what may be a stop text's is held back with its tokens."""
    engine, _, _ = served
    letters, end = dict(enumerate("ab x", 40)), next(iter(engine.session.ends))
    sample = Sample(1, (3,), 0, 20, Sampling())
    decode = lambda tokens: "".join(letters[token] for token in tokens)  # noqa: E731
    opened = Open(1, Job(chat("w3"), stops=(stop,), logprobs=0))
    choice = Choice(opened, 0, Answer(decode, [stop]), sample)
    opened.choices.append(choice)
    report, numbers = Report(), {letter: number for number, letter in letters.items()} | {".": end}
    engine.open[1] = opened
    engine._token = lambda word: [letters[word.token], []]  # type: ignore[method-assign,assignment]
    for letter in said:
        engine._say(choice, Said(sample, numbers[letter], 0.0, ()), report)
    found = [(row[2], "".join(token[0] for token in row[5]) if len(row) > 5 else "") for row in report.pieces]
    assert found == pieces


def test_a_drop_frees_slots_and_what_waits_goes_on(served: Served) -> None:
    engine, out, _ = served
    for number in range(4):
        engine.ask(number, Job(chat("w3 w4"), n=3, seed=number, max_tokens=24))
    out.wait(lambda: any(row[0] == 0 for row in out.rows("pieces")))
    for number in range(3):
        engine.drop(number)
    out.finished(3, 3)
    out.wait(lambda: out.lines[-1]["load"][:2] == [0, 0])
    assert not engine.open
    assert not engine.choices
    assert not engine.session.scheduler.wanted


def test_a_fault_in_one_jobs_preparation_is_its_own(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine, out, _ = served
    real = engine.prompts.prompt

    def prompt(job: Job) -> Any:
        if "w66" in job.turns[0].content:
            raise RuntimeError(f"no {job.turns[0].content}")
        return real(job)

    monkeypatch.setattr(engine.prompts, "prompt", prompt)
    engine.ask(1, Job(chat("w3 w4"), max_tokens=20))
    engine.ask(2, Job(chat("w66"), max_tokens=20))
    engine.ask(3, Job(chat("\ud800"), max_tokens=20))
    out.finished(1)
    out.wait(lambda: bool(out.rows("broken")) and bool(out.rows("refused")))
    assert out.rows("broken") == [[2, FAILED]]
    assert out.rows("refused")[0][0] == 3
    told = capfd.readouterr().err
    assert "RuntimeError" in told
    assert "w66" not in told


def test_a_step_that_fails_leaves_the_loop(small: Small) -> None:
    engine, _ = load_engine({"source": small.policy, **SETTINGS}, Out())
    faults.arm("worker.step:1:raise")
    try:
        engine.ask(1, Job(chat("w3 w4")))
        with pytest.raises(RuntimeError, match="asked for"):
            engine.run()
    finally:
        faults.arm("")
        engine.threads.shutdown()


def test_a_job_travels_as_json() -> None:
    from dataclasses import asdict

    job = Job(chat("a", "b", "c"), n=2, stops=("x",), seed=3, logprobs=1, min_p=0.1)
    assert job_of(json.loads(json.dumps(asdict(job)))) == job


@pytest.mark.parametrize(("context", "fits"), [(64, True), (65, False)])
def test_a_context_beyond_the_models_is_refused(small: Small, context: int, fits: bool) -> None:
    settings = {"source": small.policy, **SETTINGS, "context": context}
    if fits:
        assert load_engine(settings, Out())[1]["context"] == 64
        return
    with pytest.raises(UserError, match="longer than the model's"):
        load_engine(settings, Out())


def test_scores_are_the_reward_models_at_the_last_token(small: Small) -> None:
    scorer, facts = load_scorer({"source": small.judge, **SETTINGS}, Out())
    assert facts["context"] == 64
    chats = [list(chat("w3 w4", "w5")), list(chat("w9", "w10 w11", "w12", "w13"))]
    tokenizer, _ = load_tokenizer(small.judge, template="plain")
    form, model = ChatFormat(tokenizer), load_scalar_model(small.judge, tokenizer, fresh=False)
    expected = []
    for turns in chats:
        ids = torch.tensor([form.conversation([Message(turn.role, turn.content) for turn in turns]).tokens])
        with torch.no_grad():
            score = model(ids, torch.ones(1, ids.shape[1] - 1, dtype=torch.bool), at="end")
        expected.append(float(score))
    done: Future[list[list[int]]] = Future()
    done.set_result(scorer.tokens(chats))
    scorer.open[4] = done
    assert scorer._answer(4, done)["scores"] == [[4, pytest.approx(expected, abs=1e-6)]]
    del scorer.open[4]  # nobody waits for it any more
    assert scorer._answer(4, done)["scores"] == [[4, []]]
    with pytest.raises(Refused, match="reads 64"):
        scorer.tokens([list(chat(words(30) * 3, "w3"))])
    scorer.threads.shutdown()


def test_a_language_model_is_no_reward_model(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        load_scorer({"source": small.policy, **SETTINGS}, Out())
