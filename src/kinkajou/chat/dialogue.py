"""One conversation, or the same questions to two models: who was asked what, and the answers on the screen."""

import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Self

from kinkajou.chat.conversation import Conversation, Turn
from kinkajou.chat.screen import WIDE, Columns, Screen
from kinkajou.chat.talker import Answer, Talker
from kinkajou.config import ChatConfig
from kinkajou.data.records import Message
from kinkajou.errors import UserError


class Stoppable:
    """Inside, a first ctrl-C only asks to stop, between two steps of the model; a second one interrupts at once."""

    def __init__(self, active: bool) -> None:
        self.asked = False
        self._active = active and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@dataclass
class Attempt:
    """One model's part of a turn."""

    talker: Talker
    answer: Answer | None
    said: str = ""
    fault: UserError | None = None

    @property
    def busy(self) -> bool:
        return self.answer is not None and not self.answer.finish

    def step(self) -> str:
        assert self.answer is not None
        piece = next(self.answer)
        self.said += piece
        return piece

    def stop(self) -> str:
        rest = self.answer.stop() if self.answer else ""
        self.said += rest
        return rest

    @property
    def kept(self) -> bool:
        """Whether it counts as an answer: nothing said counts if the model meant it."""
        return self.answer is not None and (self.answer.ended or bool(self.said))

    def message(self) -> Message:
        return Message("assistant", self.said, ended=self.answer is not None and self.answer.ended)

    def summary(self) -> str:
        """How it went, in a line."""
        answer = self.answer
        if answer is None:
            return self.fault.problem if self.fault else ""
        count = answer.num_tokens
        words = []
        if answer.finish == "stopped":
            words.append("stopped, what was said is kept" if self.kept else "stopped, the question is not kept")
        words.append(f"{count:,} token{'s' * (count != 1)}")
        if answer.rate is not None:
            words.append(f"{answer.rate:,.{0 if answer.rate >= 10 else 1}f} tokens/s")
        if answer.first is not None:
            words.append(f"first after {answer.first:.2f} s")
        if answer.finish == "length":
            cut = count < self.talker.cfg.max_new_tokens
            words.append("cut: the context is full" if cut else f"cut: /max_new_tokens {2 * count} allows more")
        if answer.left_out:
            count = answer.left_out
            words.append(f"{count} message{'s' * (count > 1)} from the beginning left out: the context is full")
        return " · ".join(words)


class Dialogue:
    """The models, what each was told, and how they answer."""

    def __init__(self, talkers: Sequence[Talker], cfg: ChatConfig, screen: Screen) -> None:
        self.talkers, self.cfg, self.screen = list(talkers), cfg, screen
        self.conversations = [Conversation(cfg.system) for _ in talkers]
        self.asked = 0
        """Questions so far; the number of the last one."""
        self.answered = False
        """Whether the last question got an answer that is kept."""
        self.saved: set[str] = set()
        """Files that this session has written."""
        self.interactive = False
        """Whether ctrl-C stops an answer and not the program."""

    @property
    def versus(self) -> bool:
        return len(self.talkers) > 1

    def set(self, cfg: ChatConfig) -> None:
        if cfg.seed != self.cfg.seed:  # the seed that was there once gives the same answers again
            for talker in self.talkers:
                talker.turns = 0
        self.cfg = cfg
        for talker in self.talkers:
            talker.cfg = cfg

    def systems(self) -> list[str]:
        """The system message, or each model's where a file gave them two."""
        found = [conversation.system for conversation in self.conversations]
        return found if len(set(found)) > 1 else found[:1]

    def renew(self, conversations: Sequence[Conversation]) -> None:
        """Goes on from these, one for each model."""
        self.conversations = list(conversations)
        self.asked = max((turn.number for x in conversations for turn in x.turns), default=self.asked)

    def last(self) -> Turn | None:
        """The last turn of the model that has got furthest."""
        turns = [conversation.turns[-1] for conversation in self.conversations if conversation.turns]
        return max(turns, key=lambda turn: turn.number, default=None)

    def take_back(self) -> Turn | None:
        """Forgets the last turn and returns it; None if there is none."""
        turn = self.last()
        if turn is not None:
            for conversation in self.conversations:
                conversation.take_back(turn.number)
        return turn

    def remembered(self) -> list[list[Turn]]:
        """The turns of each model as they are now, for `remember`."""
        return [list(conversation.turns) for conversation in self.conversations]

    def remember(self, turns: Sequence[Sequence[Turn]]) -> None:
        for conversation, own in zip(self.conversations, turns, strict=True):
            conversation.turns = list(own)

    def pick(self, index: int) -> None:
        """The last answer of that model counts for all of them."""
        turn, own = self.last(), self.conversations[index].turns
        if turn is None or not own or own[-1].number != turn.number:
            raise UserError("there is no answer of that model to pick", fix="ask something first")
        picked = own[-1]
        for conversation in self.conversations:
            conversation.take_back(picked.number)
            conversation.turns.append(picked)

    def ask(self, asked: Sequence[Message]) -> None:
        """Answers on the screen; an answer that came to something is kept, also if it was stopped.

        UserError if no model can answer.
        """
        self.answered = False
        attempts = [
            attempt(talker, conversation.messages(*asked))
            for talker, conversation in zip(self.talkers, self.conversations, strict=True)
        ]
        faults = [x.fault for x in attempts if x.fault]
        if faults and len(faults) == len(attempts):
            raise faults[0]
        self.asked += 1
        whole = False
        try:
            with Stoppable(self.interactive) as stoppable:
                self._show(attempts, stoppable)
            whole = True
        finally:
            self._keep(attempts, asked)
            for talker in self.talkers if not whole else ():  # a step that was interrupted is half made
                talker.discard()
        for number, x in enumerate(attempts, start=1):
            self.screen.note((f"{number}: " if self.versus else "") + x.summary())

    def _show(self, attempts: Sequence[Attempt], stoppable: Stoppable) -> None:
        size = self.screen.size
        if self.versus and size is not None and size.columns >= WIDE:
            columns = Columns(self.screen, size, self.headings())
            for index, piece in in_turns(attempts, stoppable):
                columns.add(index, piece)
                if not attempts[index].busy:
                    columns.finish(index)
            return
        for index, heading in enumerate(self.headings()):
            if self.versus:
                self.screen.heading(heading)
            for _, piece in in_turns(attempts[index : index + 1], stoppable):
                self.screen.piece(piece)
            self.screen.end_line()

    def _keep(self, attempts: Sequence[Attempt], asked: Sequence[Message]) -> None:
        self.screen.end_line()
        for x, conversation in zip(attempts, self.conversations, strict=True):
            x.stop()
            if x.kept:
                self.answered = True
                conversation.turns.append(Turn(self.asked, tuple(asked), x.message()))

    def headings(self) -> list[str]:
        return [f"{number}: {talker.name}" for number, talker in enumerate(self.talkers, start=1)]


def attempt(talker: Talker, messages: Sequence[Message]) -> Attempt:
    try:
        return Attempt(talker, talker.answer(messages))
    except UserError as fault:
        return Attempt(talker, None, fault=fault)


def in_turns(attempts: Sequence[Attempt], stoppable: Stoppable) -> Iterator[tuple[int, str]]:
    """A step of each that is not at its end, over and over: its index and what it said."""
    for index, one in enumerate(attempts):
        if one.fault:
            yield index, one.fault.problem
    while going := [(index, one) for index, one in enumerate(attempts) if one.busy]:
        for index, one in going:
            yield index, one.stop() if stoppable.asked else one.step()
