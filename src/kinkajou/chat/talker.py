"""A model that answers a conversation, piece by piece."""

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from kinkajou.batch import Sampling
from kinkajou.config import ChatConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.fitting import fitting
from kinkajou.data.records import Message
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.sampling import derive_seed
from kinkajou.engine.scheduler import Sample
from kinkajou.engine.session import Session
from kinkajou.engine.text import Answer as Shown
from kinkajou.errors import UserError
from kinkajou.models.load import LoadOptions, find_model, load_language_model
from kinkajou.models.quantised import FourBitLinear, Int8Linear, QuantisedLinear

ASSUMED_CONTEXT = 4096
"""Tokens of prompt and answer for a model that does not say how many it can read."""


class Answer(Iterator[str]):
    """Pieces of an answer, one for each step of the model and some of them empty; joined they are the whole answer."""

    def __init__(self, session: Session, sample: Sample, shown: Shown, *, left_out: int, began: float) -> None:
        self.left_out = left_out
        """Messages that had no room in the context."""
        self.num_tokens = 0
        """Without the end token."""
        self.finish: Literal["", "end", "stop", "length", "stopped"] = ""
        self._session, self._sample, self._shown = session, sample, shown
        self._times = [began]
        """When it was asked for, and when each token came."""

    def __next__(self) -> str:
        if self.finish:
            raise StopIteration
        pieces = []
        for word in self._session.step():
            self._times.append(time.perf_counter())
            if word.token in self._session.ends:
                self.finish = "end"
                break
            self.num_tokens += 1
            pieces.append(self._shown.push(word.token))
            if self._shown.stopped:
                self.finish = "stop"
                break
            if word.sample.finished == "length":
                self.finish = "length"
        if self.finish:
            self._session.drop(self._sample)
            pieces.append(self._shown.finish())
        return "".join(pieces)

    def stop(self) -> str:
        """Ends it here, between two steps.  Returns what was held back."""
        if self.finish:
            return ""
        self.finish = "stopped"
        self._session.drop(self._sample)
        return self._shown.finish()

    @property
    def ended(self) -> bool:
        """Whether the model came to the end itself."""
        return self.finish in ("end", "stop")

    @property
    def first(self) -> float | None:
        """Seconds until the first token."""
        return self._times[1] - self._times[0] if len(self._times) > 1 else None

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one."""
        took = self._times[-1] - self._times[1] if len(self._times) > 2 else 0.0
        return (len(self._times) - 2) / took if took else None


class Talker:
    """A loaded model with the template that it was trained with.  `cfg` may be replaced between answers."""

    def __init__(self, folder: str, cfg: ChatConfig) -> None:
        self.name, self.cfg = folder, cfg
        self.source = find_model(folder)
        tokenizer, _ = load_tokenizer(self.source)
        self.form = ChatFormat(tokenizer)
        model = load_language_model(self.source, tokenizer, LoadOptions(bits=cfg.bits))
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model
        settings = model.inner.config
        said = getattr(settings, "max_position_embeddings", None) or getattr(settings, "seq_length", None)
        self._stated = bool(said)
        self.context = int(said or ASSUMED_CONTEXT)
        self.engine = LocalEngine(model, end_ids=self.form.end_ids, pad_id=self.form.pad_id)
        self.turns = 0
        """Answers so far: each has a seed of its own."""
        self._session: Session | None = None

    def answer(self, messages: Sequence[Message]) -> Answer:
        """Starts an answer; UserError where the last question alone is longer than the context."""
        began = time.perf_counter()
        cfg = self.cfg
        prompt, left_out = self.fitting(messages)
        room = min(cfg.max_new_tokens, self.context - len(prompt))
        if room < 1:
            raise self._too_long(messages, len(prompt))
        self.turns += 1
        sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
        seed = derive_seed(cfg.seed, "chat", self.turns)
        sample = self.engine.samples([prompt], sampling, max_new_tokens=room, seeds=[seed])[0]
        session = self._session_of(len(prompt) + room)
        session.add(sample)
        return Answer(session, sample, Shown(self._decode, cfg.stop), left_out=left_out, began=began)

    def fitting(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The prompt, and how many of the oldest messages it lacks because they have no room."""
        return fitting(self.form, messages, context=self.context, answer=self.cfg.max_new_tokens)

    def _too_long(self, messages: Sequence[Message], count: int) -> UserError:
        """Of a prompt of so many tokens, which has no room although nothing old is in it any more."""
        bare, _ = self.fitting([message for message in messages if message.role != "system"])
        system = count - len(bare)
        evidence = f"{count:,} tokens with the template, the model has positions for {self.context:,}"
        if len(bare) >= self.context or system <= 0:
            what, fix = "the message is", "say it in fewer words"
        elif system >= self.context:
            what, fix = "the system message is", "/system TEXT with fewer words"
        else:
            what = "the system message and the message are together"
            fix = "say it in fewer words, or /system TEXT with fewer"
            evidence += f"; {system:,} are the system message's"
        return UserError(f"{what} longer than the model's context", evidence=evidence, fix=fix)

    def discard(self) -> None:
        """Begins the next answer with a new session."""
        self._session = None

    def _session_of(self, room: int) -> Session:
        """The last session if it is large enough: it has the weights laid out for decoding."""
        kept = self._session
        if kept is None or kept.busy or kept.room < room:
            kept = self.engine.session([], rows=1, room=min(self.context, max(256, 2 * room)))
        self._session = kept
        kept.renew(None)
        return kept

    def _decode(self, tokens: list[int]) -> str:
        return str(self.form.tokenizer.decode(tokens, skip_special_tokens=True))

    def describe(self) -> str:
        """The model in a line."""
        settings, module = self.model.inner.config, self.model.inner
        return (
            f"{self.source}: {settings.model_type}, {scaled(count_of(module))} parameters, {weights_of(module)}, "
            f"{self.model.device.type}, "
            f"context {self.context:,} tokens{'' if self._stated else ' (not stated by the model)'}"
        )


def count_of(module: nn.Module) -> int:
    """Parameters, however many bytes they are kept in."""
    packed = [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]
    kept = {id(layer.weight) for layer in packed}
    plain = sum(param.numel() for param in module.parameters() if id(param) not in kept)
    return plain + sum(layer.in_features * layer.out_features for layer in packed)


def weights_of(module: nn.Module) -> str:
    """The type that most of the weights are kept in."""
    for layer in module.modules():
        if isinstance(layer, Int8Linear | FourBitLinear):
            return "int8" if isinstance(layer, Int8Linear) else "4-bit"
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def scaled(count: int) -> str:
    """1,234,567 -> 1.2 M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
