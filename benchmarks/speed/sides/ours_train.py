"""Our training on token batches: the model, optimiser, losses and `update` that the trainers use, with their defaults.

`kind` is sft (every token counts), reward or dpo.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from benchmarks.speed.line import Line
from kinkajou.algos.losses import Loss
from kinkajou.algos.preferences import RANKING
from kinkajou.batch import PairBatch, TokenBatch, pad_pairs, pad_rows
from kinkajou.config import PreferenceLossConfig
from kinkajou.data.chat import Encoded
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model
from kinkajou.parallel.strategy import Single
from kinkajou.train.optim import adamw
from kinkajou.train.preference_rows import Compared
from kinkajou.train.preference_tasks import PairTask
from kinkajou.train.reference import token_logps
from kinkajou.train.sft import token_loss
from kinkajou.train.update import Objective, in_parts, update

BATCH, BUDGET = 8, 8192


class Work:
    """Batches, a loss, and a model to train."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self.folder, self.job = folder, job
        self.source = str(folder / job["model"])
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.options = LoadOptions(dtype=job["dtype"])
        rows = json.loads((folder / "data.json").read_text())[job["data"]][: job["rows"]]
        self.parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        self.model, self.batches, self.loss_fn = getattr(self, job["kind"])()
        self.optimizer = adamw(self.model, lr=job["lr"], weight_decay=0.0)
        self.strategy = Single()

    def sft(self) -> tuple[nn.Module, list[TokenBatch], Any]:
        model = load_language_model(self.source, self.tokenizer, self.options)
        batches = [pad_rows(part, [[True] * len(row) for row in part], pad_id=0) for part in self.parts]
        return model, batches, token_loss

    def reward(self) -> tuple[nn.Module, list[PairBatch], Any]:
        model = load_scalar_model(self.source, self.tokenizer, self.options)
        ranking = RANKING["log_sig"]

        def pair_loss(model: nn.Module, batch: PairBatch, count: Any) -> Loss:
            both = batch.stacked()
            chosen, rejected = model(both.tokens, both.mask, at="end").view(-1, 2).unbind(1)
            return ranking(chosen, rejected, count)

        sides = [
            [[pair["prompt"] + pair[side] for pair in part] for side in ("chosen", "rejected")] for part in self.parts
        ]
        return model, [pad_pairs(chosen, rejected, pad_id=0) for chosen, rejected in sides], pair_loss

    def dpo(self) -> tuple[nn.Module, list[TokenBatch], Any]:
        """Batches without the reference's answers: `kinkajou prefer` asks for them first, and so does every work."""
        model = load_language_model(self.source, self.tokenizer, self.options)

        def side(prompt: list[int], answer: list[int]) -> Encoded:
            return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))

        compared: list[Compared] = [
            (side(pair["prompt"], pair["chosen"]), side(pair["prompt"], pair["rejected"]))
            for part in self.parts
            for pair in part
        ]
        task = PairTask(PreferenceLossConfig(), compared, 0)
        return model, [task.batch(range(i, i + BATCH)) for i in range(0, len(compared), BATCH)], task.loss

    def with_reference(self, batch: Any) -> Any:
        """The policy's own log-probabilities, from before its first step."""
        asked = in_parts(batch.stacked(), BUDGET, lambda part: token_logps(self.model, part))
        return dataclasses.replace(batch, ref_logp=asked.sum(1).view(-1, 2))

    def __call__(self, whole: bool) -> dict[str, Any]:
        batches = self.batches if whole else self.batches[:1]
        start, losses, norms = time.perf_counter(), [], []
        if self.job["kind"] == "dpo":
            batches = [self.with_reference(batch) for batch in batches]
        asked = time.perf_counter() - start
        for batch in batches:
            found = update(
                self.strategy,
                self.model,
                self.optimizer,
                [Objective(batch, self.loss_fn)],
                tokens_per_microbatch=BUDGET,
                max_norm=1.0,
            )
            losses.append(found["loss"])
            norms.append(found["grad_norm"])
        seconds = time.perf_counter() - start
        tokens, samples = sum(int(b.lengths.sum()) for b in batches), sum(len(b) for b in batches)
        phases = {"phases": {"reference": asked, "train": seconds - asked}} if self.job["kind"] == "dpo" else {}
        first = {"first_loss": losses[0], "first_norm": norms[0]}
        return {"seconds": seconds, "tokens": tokens, "samples": samples, **first, **phases}


if __name__ == "__main__":
    line = Line()
    line.serve(Work(Path(line.folder), line.job))
