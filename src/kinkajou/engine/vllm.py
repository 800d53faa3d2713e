"""vLLM servers behind the engine protocol: token ids in and out, log-probabilities, and weights by their own means."""

import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kinkajou.batch import PLAIN, Rollout, Sampling, pad_rows
from kinkajou.engine.engine import Answered, Prompts, as_rollout
from kinkajou.engine.parity import Look, is_stale, told
from kinkajou.engine.vllm_server import Gone, Server
from kinkajou.engine.vllm_start import Started
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel

Sync = Literal["adapter", "reload", "restart"]
AT_ONCE = 64
"""Requests that one server has at the same time."""
PROBES, PROBE_TOKENS = 4, 16
"""Prompts of the parity gate, and how many tokens of an answer to each."""
KEPT = 2
"""Folders of weights that are left on disk: the server may still read the last but one."""
OLD_WEIGHTS = "still has old weights"
RESTART = "--server_sync restart, with --server start:ENVIRONMENT"


@dataclass(frozen=True)
class Wanted:
    """What the run asks of its servers."""

    sync: Sync
    bound: float
    """Largest distance of log-probabilities (nats, worst token) that passes the gate."""
    longest: int
    end_ids: tuple[int, ...]
    pad_id: int
    folder: Path
    """Where weights are written for the servers to read."""
    run: str
    """A word that no other run uses."""
    base: Path
    """What a server is started on that gets adapters."""


@dataclass(eq=False)
class Peer:
    """A server, and what the gate has seen of it."""

    server: Server
    started: Started | None = None
    look: Look | None = None
    """At the fixed tokens, after the last push."""
    gone: bool = False


class VllmEngine:
    """`model` holds the weights that are pushed; `write` lays them into a folder, as the sync wants them: an adapter
    alone, or everything."""

    def __init__(
        self,
        model: LanguageModel,
        peers: Sequence[Peer],
        wanted: Wanted,
        *,
        write: Callable[[Path], None],
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.peers, self.wanted, self.write, self.say = model, list(peers), wanted, write, say
        self.pushed = 0
        self.staleness = 0.0
        self.gap = 0.0
        """The worst distance that the last gate saw."""
        self._current = False
        self._probes: list[list[int]] = []
        self._last_gone: Gone | None = None
        self._own = dict(model.named_parameters())

    @torch.no_grad()
    def load(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the weights; the servers get them before the next answers."""
        for name, param in params:
            if self._own[name].data_ptr() != param.data_ptr():
                self._own[name].copy_(param)
        self._current = False

    def generate(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> Rollout:
        found = self.answers(prompts, sampling, max_new_tokens=max_new_tokens, seeds=seeds)
        return as_rollout(prompts, found, pad_id=self.wanted.pad_id).to(self.model.device)

    def answers(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Answered]:
        if not all(prompts):
            raise UserError("a prompt has no tokens", fix="give it at least a begin token or a word")
        check_cuts(sampling)
        if not prompts:
            return []
        if not self._current:
            self._push()
            self._gate(prompts, sampling, max_new_tokens)
            self._current = True
        found = self._shared_out(prompts, sampling, max_new_tokens, seeds)
        self._each(lambda peer: peer.server.check_version())
        return found

    def close(self) -> None:
        for peer in self.peers:
            if peer.started:
                peer.started.stop()
        for left in self.wanted.folder.glob(f"{self.wanted.run}-*"):
            shutil.rmtree(left)

    def _there(self) -> list[Peer]:
        return [peer for peer in self.peers if not peer.gone]

    def _push(self) -> None:
        """Writes the weights once and hands them to every server."""
        name = f"{self.wanted.run}-{self.pushed:06d}"
        folder = (self.wanted.folder / name).absolute()
        self.write(folder)
        for peer in self.peers:
            self._start(peer, folder, name)
        self._each(lambda peer: self._hand(peer, str(folder), name))
        self.pushed += 1
        for old in sorted(self.wanted.folder.glob(f"{self.wanted.run}-*"))[:-KEPT]:
            shutil.rmtree(old)

    def _start(self, peer: Peer, folder: Path, name: str) -> None:
        """Starts a server of our own that is wanted anew or is not there: on these weights, unless it gets adapters."""
        if not peer.started or (self.wanted.sync != "restart" and peer.server.model and not peer.gone):
            return
        whole = self.wanted.sync != "adapter"
        served = name if whole else f"{self.wanted.run}-base"
        peer.server.move(peer.started.start(folder if whole else self.wanted.base, served), served)
        peer.server.version, peer.gone = name if whole else "", False

    def _hand(self, peer: Peer, folder: str, name: str) -> None:
        if peer.server.version == name:
            return  # started on them
        if self.wanted.sync == "reload":
            peer.server.reload(folder, name)
        else:
            peer.server.load_adapter(folder, name)

    def _each(self, work: Callable[[Peer], object]) -> None:
        """Work with every server; one that gives no answer is left behind, as long as there are others."""
        for peer in self._there():
            try:
                work(peer)
            except Gone as fault:
                self._lost(peer, fault)
        if self._last_gone and not self._there():
            raise self._last_gone

    def _gate(self, prompts: Prompts, sampling: Sampling, max_new_tokens: int) -> None:
        """Each server's log-probabilities beside the trainer's: of fixed tokens, and of tokens that it samples now.

        The first shows which weights it has; the second also whether its cache is of them, and whether its
        log-probabilities are of the distribution that it samples from.
        """
        self.gap = 0.0
        count = max(1, min(PROBE_TOKENS, max_new_tokens - 1))
        self._each(lambda peer: self._look(peer, prompts[:PROBES], sampling, count))

    def _look(self, peer: Peer, prompts: Prompts, sampling: Sampling, count: int) -> None:
        said = [
            peer.server.complete(prompt, sampling, max_new_tokens=count, seed=self.pushed * PROBES + i)
            for i, prompt in enumerate(prompts)
        ]
        if not self._probes:
            cut = [[*p, *x.tokens][: self.wanted.longest - 1] for p, x in zip(prompts, said, strict=True)]
            self._probes = [row for row in cut if len(row) > 1]
        scores = [peer.server.scores(row) for row in self._probes]
        masks = [[False] + [True] * (len(row) - 1) for row in self._probes]
        look = Look([x for row in scores for x in row], self._scored(self._probes, masks, PLAIN))
        self._check_weights(peer, look)
        peer.look = look
        self._check_sampled(peer, prompts, said, sampling)
        self.gap = max(self.gap, look.worst)

    def _check_weights(self, peer: Peer, look: Look) -> None:
        before = peer.look
        if look.worst <= self.wanted.bound and not (before and is_stale(look, before)):
            return
        if before is None:
            raise peer.server.fault(
                "does not have the policy's weights",
                f"{told(look, None)}, {self.wanted.bound:g} may be",
                "serve the folder that the training starts from, in the trainer's type (--dtype float32 for fp32); "
                f"on a CPU a server that has reloaded may have kept old weights: {RESTART}",
            )
        how = {"reload": "`reload_weights`", "adapter": "loading the adapter", "restart": "a restart"}
        raise peer.server.fault(f"{OLD_WEIGHTS} after {how[self.wanted.sync]}", told(look, before), RESTART)

    def _check_sampled(self, peer: Peer, prompts: Prompts, said: Sequence[Answered], sampling: Sampling) -> None:
        rows = [[*prompt, *x.tokens] for prompt, x in zip(prompts, said, strict=True)]
        masks = [[False] * len(p) + [True] * len(x.tokens) for p, x in zip(prompts, said, strict=True)]
        theirs = [logp for x in said for logp in x.logps]
        look = Look(theirs, self._scored(rows, masks, sampling))
        if look.worst <= self.wanted.bound:
            return
        if Look(theirs, self._scored(rows, masks, PLAIN)).worst <= self.wanted.bound:
            raise peer.server.fault(
                "gives log-probabilities of another distribution than it samples from",
                f"{told(look, None)}; without temperature and cuts they agree",
                "vllm serve ... --logprobs-mode processed_logprobs",
            )
        raise peer.server.fault(
            "samples from other weights than it scores with",
            f"{told(look, None)}, though fixed tokens agree: its cache may be of old weights",
            f"vllm serve ... --no-enable-prefix-caching, or {RESTART}",
        )

    @torch.no_grad()
    def _scored(self, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], how: Sampling) -> list[float]:
        batch = pad_rows(rows, masks, pad_id=self.wanted.pad_id).to(self.model.device)
        logp: Tensor = self.model(batch.tokens, batch.mask, how).logp
        return [float(x) for row, mask in zip(logp, batch.mask, strict=True) for x in row[mask].tolist()]

    def _shared_out(
        self, prompts: Prompts, sampling: Sampling, max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Answered]:
        """Every server takes the next prompt when it has room; what one that goes away had is done by the others."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(prompts)):
            waiting.put(i)
        found: dict[int, Answered] = {}
        faults: list[UserError] = []

        def work(peer: Peer) -> None:
            while not peer.gone and not faults:
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    found[i] = peer.server.complete(prompts[i], sampling, max_new_tokens=max_new_tokens, seed=seeds[i])
                except Gone as fault:
                    waiting.put(i)
                    self._lost(peer, fault)
                except UserError as fault:
                    faults.append(fault)

        while len(found) < len(prompts):
            there = self._there()
            count = min(AT_ONCE, -(-waiting.qsize() // max(1, len(there))))
            threads = [threading.Thread(target=work, args=(peer,), daemon=True) for peer in there for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if faults:
                raise faults[0]
            if self._last_gone and not self._there():
                raise self._last_gone
        return [found[i] for i in range(len(prompts))]

    def _lost(self, peer: Peer, fault: Gone) -> None:
        if not peer.gone:
            peer.gone, self._last_gone = True, fault
            if self._there():
                self.say(f"note: {fault.problem} ({fault.evidence}); its prompts go to the other servers")


def check_cuts(sampling: Sampling) -> None:
    if sampling.top_p < 1 and sampling.min_p > 0:
        raise UserError(
            "vLLM cuts to min_p before top_p, the trainer after it: together they are another distribution",
            evidence=f"--top_p {sampling.top_p:g}, --min_p {sampling.min_p:g}",
            fix="leave one of them out, or --rollout local",
        )
