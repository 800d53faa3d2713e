"""A model that is loaded, its session, and the jobs that are open in it: asks in, one report a step out."""

import math
import secrets
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from kinkajou import faults
from kinkajou.batch import Sampling
from kinkajou.engine.sampling import derive_seed
from kinkajou.engine.scheduler import Sample
from kinkajou.engine.session import Said, Session
from kinkajou.engine.text import Answer
from kinkajou.serve.backend import Alternative, Finish, Job, Refused
from kinkajou.serve.worker_prompts import Pieces, Prompt, Prompts

FAILED = "the model could not work on this request"
Write = Callable[[dict[str, Any]], None]


@dataclass(eq=False)
class Choice:
    """One answer that is being made."""

    job: "Open"
    number: int
    answer: Answer
    sample: Sample
    count: int = 0
    tokens: list[tuple[int, list[Any]]] = field(default_factory=list)
    """Said since the last piece: where each begins in the text, and how it is told."""


@dataclass(eq=False)
class Open:
    """A job: in preparation as long as it has no choices."""

    number: int
    job: Job
    future: "Future[Prompt] | None" = None
    choices: list[Choice] = field(default_factory=list)


@dataclass
class Report:
    """What a step has to tell: lists of rows as `LocalBackend` reads them."""

    began: list[list[Any]] = field(default_factory=list)
    pieces: list[list[Any]] = field(default_factory=list)
    refused: list[list[Any]] = field(default_factory=list)
    broken: list[list[Any]] = field(default_factory=list)

    def rows(self) -> dict[str, Any]:
        return {name: rows for name, rows in vars(self).items() if rows}


class Engine:
    """Takes events from `inbox`, steps the session, writes one report after each.

    Events: ("ask", Open), ("drop", number), ("ready", number, Future of a Prompt), ("end",).
    """

    def __init__(self, session: Session, prompts: Prompts, pieces: Pieces, write: Write) -> None:
        self.session, self.prompts, self.pieces, self.write = session, prompts, pieces, write
        self.inbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self.open: dict[int, Open] = {}
        self.choices: dict[int, Choice] = {}
        """Of samples that wait or run, by their number."""
        self.threads = ThreadPoolExecutor(1, "prompts")
        self.samples = 0
        self.told: list[int] = []

    def ask(self, number: int, job: Job) -> None:
        """From the thread that reads: the prompt is made beside the steps."""
        opened = Open(number, job)
        self.inbox.put(("ask", opened))
        opened.future = self.threads.submit(self.prompts.prompt, job)
        opened.future.add_done_callback(lambda done: self.inbox.put(("ready", number, done)))

    def drop(self, number: int) -> None:
        """From the thread that reads."""
        self.inbox.put(("drop", number))

    def run(self) -> None:
        while True:
            report = Report()
            waits = not self.session.busy
            while waits or not self.inbox.empty():
                event = self.inbox.get()
                if event[0] == "end":
                    return
                self._take(event, report)
                waits = False
            if self.session.busy:
                faults.reached("worker.step")
                self._tell(self.session.step(), report)
            rows, load = report.rows(), self._load()
            if rows or load != self.told:
                self.told = load
                self.write({**rows, "load": load})

    def _take(self, event: tuple[Any, ...], report: Report) -> None:
        match event:
            case "ask", Open() as opened:
                self.open[opened.number] = opened
            case "drop", int(number):
                if (gone := self.open.pop(number, None)) is not None:
                    if gone.future is not None:
                        gone.future.cancel()  # a prompt that waits is not made
                    for choice in gone.choices:
                        self._close(choice)
            case "ready", int(number), Future() as future:
                if number in self.open:
                    self._begin(self.open[number], future, report)

    def _begin(self, opened: Open, future: "Future[Prompt]", report: Report) -> None:
        number, job = opened.number, opened.job
        fault = future.exception()
        if fault is not None:
            del self.open[number]
            if isinstance(fault, Refused):
                report.refused.append([number, fault.problem, fault.param, fault.code])
            else:
                log(fault)
                report.broken.append([number, FAILED])
            return
        prompt = future.result()
        report.began.append([number, len(prompt.tokens), prompt.dropped])
        sampling = Sampling(job.temperature, job.top_k, job.top_p, job.min_p, job.repetition_penalty)
        seed = secrets.randbits(63) if job.seed is None else job.seed
        for i in range(job.n):
            self.samples += 1
            sample = Sample(
                self.samples,
                prompt.tokens,
                derive_seed(seed, "choice", i),
                prompt.room,
                sampling,
                likeliest=job.logprobs,
            )
            answer = Answer(self.pieces.decode, job.stops, trimmed=job.text is None)
            choice = self.choices[sample.number] = Choice(opened, i, answer, sample)
            opened.choices.append(choice)
            self.session.add(sample)

    def _close(self, choice: Choice) -> None:
        self.choices.pop(choice.sample.number, None)
        self.session.drop(choice.sample)

    def _tell(self, said: list[Said], report: Report) -> None:
        """A step may say several tokens of one sample, in the order of time."""
        for word in said:
            choice = self.choices.get(word.sample.number)
            if choice is not None:  # else a stop text came before, in this very step
                self._say(choice, word, report)

    def _say(self, choice: Choice, word: Said, report: Report) -> None:
        answer, sample = choice.answer, choice.sample
        choice.count += 1
        ended = word.token in self.session.ends
        begins = answer.cut.seen
        text = "" if ended else answer.push(word.token)
        if choice.job.job.logprobs is not None and word.token not in self.pieces.controls:
            choice.tokens.append((begins, self._token(word)))
        finish: Finish = ""
        if answer.stopped:
            finish = "stop"
            choice.tokens = [(at, token) for at, token in choice.tokens if at < answer.cut.end]
        elif ended or choice.count == sample.max_new_tokens:
            text += answer.finish()
            finish = "stop" if ended or answer.stopped else "length"
        if text or finish:
            self._piece(choice, text, finish, report)

    def _piece(self, choice: Choice, text: str, finish: Finish, report: Report) -> None:
        row: list[Any] = [choice.job.number, choice.number, text, choice.count, finish]
        # Tokens whose text is held back may yet turn out to be a stop text's.
        end = choice.answer.cut.shown if not finish else math.inf
        if tokens := [token for at, token in choice.tokens if at < end]:
            row.append(tokens)
            choice.tokens = choice.tokens[len(tokens) :]
        report.pieces.append(row)
        if finish:
            self._close(choice)
            choice.job.choices.remove(choice)
            if not choice.job.choices:
                del self.open[choice.job.number]

    def _token(self, word: Said) -> list[Any]:
        tell = self.pieces.alternative
        return [told(tell(word.token, word.own)), [told(tell(token, logp)) for token, logp in word.likeliest]]

    def _load(self) -> list[int]:
        """Running, waiting, slots, tokens that are kept, tokens for which there is room."""
        scheduler = self.session.scheduler
        preparing = sum(opened.job.n for opened in self.open.values() if not opened.choices)
        used = sum(sample.length for sample in scheduler.running)
        rows = scheduler.rows
        return [len(scheduler.running), len(scheduler.waiting) + preparing, rows, used, rows * self.session.room]


def told(token: Alternative) -> list[Any]:
    return [token.text, token.bytes.hex(), token.logprob]


def log(fault: BaseException) -> None:
    """Where it was raised and its kind; not its words, which may be those of a prompt."""
    print("".join(traceback.format_tb(fault.__traceback__)), type(fault).__name__, file=sys.stderr, flush=True)
