"""A conversation with a trained model in the terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from kinkajou.batch import Sampling
from kinkajou.config import ChatConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.sources import Message
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.sampling import derive_seed
from kinkajou.errors import UserError
from kinkajou.models.load import find_model, load_language_model

HELP = "/new starts again, /quit (or ctrl-D) leaves, ctrl-C stops an answer"


class Talker:
    """A model that answers a list of messages, streaming."""

    def __init__(self, folder: str, cfg: ChatConfig) -> None:
        source = find_model(folder)
        tokenizer, _ = load_tokenizer(source)
        self.form, self.cfg = ChatFormat(tokenizer), cfg
        model = load_language_model(source, tokenizer)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.context = getattr(model.inner.config, "max_position_embeddings", None)
        self.engine = LocalEngine(model, end_ids=self.form.end_ids, pad_id=self.form.pad_id, decode=self.form.answer)
        self.turns = 0

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Pieces of the answer as they come; joined they are the whole answer."""
        prompt = self.form.prompt(messages)
        room = self.cfg.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(prompt))
        if room < 1:
            raise UserError(
                "the conversation is longer than the model's context",
                evidence=f"{len(prompt)} tokens, the model has positions for {self.context}",
                fix="start again with /new",
            )
        self.turns += 1
        cfg = self.cfg
        sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
        seed = derive_seed(self.cfg.seed, "chat", self.turns)
        tokens: list[int] = []
        said = ""
        asked = self.engine.samples([prompt], sampling, max_new_tokens=room, seeds=[seed], stops=cfg.stop)
        for step in self.engine.stream(asked):
            tokens += step.tokens
            text = self.form.answer(tokens)
            # A character may take several tokens: until it is whole it decodes to a replacement mark.
            if len(text) > len(said) and not text.endswith("�"):
                yield text[len(said) :]
                said = text


def talk(folder: str, cfg: ChatConfig, *, read: Callable[[str], str] = input) -> None:
    """Reads from the terminal, answers on it; with `cfg.message` one answer and out."""
    talker = Talker(folder, cfg)
    opening = [Message("system", cfg.system)] if cfg.system else []
    if cfg.message is not None:
        speak(talker, [*opening, Message("user", cfg.message)])
        return
    print(HELP)
    history = list(opening)
    while True:
        try:
            said = read("you: ").strip()
        except (EOFError, KeyboardInterrupt):  # both mean: leave
            print()
            return
        if said == "/quit":
            return
        if said == "/new":
            history = list(opening)
        elif said.startswith("/"):
            print(HELP)
        elif said:
            asked = [*history, Message("user", said)]
            try:
                history = [*asked, Message("assistant", speak(talker, asked))]
            except UserError as fault:  # what could not be answered is not kept
                print(fault, file=sys.stderr)


def speak(talker: Talker, messages: Sequence[Message]) -> str:
    """Prints an answer while it comes; ctrl-C ends it there.  Returns what was said."""
    pieces: list[str] = []
    try:
        for piece in talker.answer(messages):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # the answer so far stays in the conversation
        print(" [stopped]", end="")
    print()
    return "".join(pieces)
