"""A reward model in a process of its own: chats in, one number each out, read at the chat's last token."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch

from kinkajou.batch import pad_rows
from kinkajou.data.chat import ChatFormat
from kinkajou.data.records import Message
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.errors import UserError
from kinkajou.models.forward import ScalarModel
from kinkajou.models.load import LoadOptions, find_model, load_scalar_model
from kinkajou.serve.backend import Refused, Turn
from kinkajou.serve.worker_engine import FAILED, Write, log
from kinkajou.serve.worker_model import context_of
from kinkajou.serve.worker_prompts import refusal, sound

TOKENS = 8192
"""Tokens that go through the model at once, one chat at least."""


def load_scorer(settings: dict[str, Any], write: Write) -> "tuple[Scorer, dict[str, Any]]":
    """A reward model and what there is to know of it; UserError for what is none."""
    source = find_model(settings["source"])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    tokenizer, template = load_tokenizer(source, template=settings["template"])
    form = ChatFormat(tokenizer)
    model = load_scalar_model(source, tokenizer, LoadOptions(dtype=settings["dtype"]), fresh=False).freeze()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    context = context_of(model, None)
    scorer = Scorer(model, form, context, write)
    scorer.scores([[form.end_id, form.end_id]])
    return scorer, {"context": context, "template": template, "dtype": settings["dtype"]}


class Scorer:
    """One ask after the other; tokens are made in a thread beside."""

    def __init__(self, model: ScalarModel, form: ChatFormat, context: int, write: Write) -> None:
        self.model, self.form, self.context, self.write = model, form, context, write
        self.inbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self.threads = ThreadPoolExecutor(1, "prompts")
        self.open: dict[int, Future[list[list[int]]]] = {}
        """Asks that have no answer yet, and are waited for."""

    def ask(self, number: int, chats: list[list[Turn]]) -> None:
        future = self.open[number] = self.threads.submit(self.tokens, chats)
        future.add_done_callback(lambda done: self.inbox.put((number, done)))

    def drop(self, number: int) -> None:
        """From the thread that reads."""
        if (future := self.open.pop(number, None)) is not None:
            future.cancel()

    def run(self) -> None:
        while True:
            number, future = self.inbox.get()
            if number in self.open:
                answer = self._answer(number, future)
                if self.open.pop(number, None) is not None:
                    self.write(answer)

    def _answer(self, number: int, future: "Future[list[list[int]]]") -> dict[str, Any]:
        fault = future.exception()
        if isinstance(fault, Refused):
            return {"refused": [[number, fault.problem, fault.param, fault.code]]}
        if fault is not None:
            log(fault)
            return {"broken": [[number, FAILED]]}
        scores = self.scores(future.result(), wanted=lambda: number in self.open)
        if not all(map(torch.isfinite, torch.tensor(scores))):
            return {"broken": [[number, "the reward model gave no finite number"]]}
        return {"scores": [[number, scores]]}

    def tokens(self, chats: list[list[Turn]]) -> list[list[int]]:
        """Whole chats, end tokens included; Refused for those that the template or the context does not take."""
        rows = []
        for chat in chats:
            if not all(sound(turn.content) for turn in chat):
                raise Refused("the text has half of a surrogate pair in it, which is no character", param="input")
            try:
                tokens = self.form.conversation([Message(turn.role, turn.content, turn.ended) for turn in chat]).tokens
            except UserError as fault:
                raise refusal(fault, "input") from None
            if not 1 <= len(tokens) <= self.context:
                raise Refused(
                    f"a chat has {len(tokens):,} tokens; the reward model reads {self.context:,}",
                    param="input",
                    code="context_length_exceeded",
                )
            rows.append(tokens)
        return rows

    @torch.no_grad()
    def scores(self, rows: list[list[int]], *, wanted: Callable[[], bool] = lambda: True) -> list[float]:
        """Each chat alone, so that its score does not depend on the others; until nobody wants them any more."""
        found = []
        for row in rows:
            if not wanted():
                break
            batch = pad_rows([row], [[True] * len(row)], pad_id=self.form.pad_id).to(self.model.device)
            found.append(float(self.model(batch.tokens, batch.mask, at="end")))
        return found
