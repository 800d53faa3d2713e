"""`kinkajou serve`: what can be checked is checked first, models are loaded next, then the port opens."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from kinkajou.config import DoorConfig, HostingConfig, ServeConfig
from kinkajou.errors import UserError
from kinkajou.serve.app import make_app
from kinkajou.serve.backend import Backend, Scorer
from kinkajou.serve.bind import host_names, make_room, origin_names, taken, url_of
from kinkajou.serve.desk import Desk
from kinkajou.serve.heap import give_back
from kinkajou.serve.house import House
from kinkajou.serve.keys import read_key
from kinkajou.serve.limits import Limits
from kinkajou.serve.local import Hosting, LocalBackend
from kinkajou.serve.metrics import Metrics
from kinkajou.serve.remote import remote_backends
from kinkajou.serve.remote_address import backend_key, root_of
from kinkajou.serve.reward_local import LocalScorer
from kinkajou.serve.server import make_server
from kinkajou.serve.words import Words, read_words


def serve(folders: Sequence[str], cfg: ServeConfig) -> None:
    """Until a signal ends it.  UserError for what is wrong; SystemExit where the end is not 0."""
    hosting, door = cfg.hosting, cfg.door
    sources = named(folders, hosting)
    limits = limits_of(door)
    key = read_key(door.key_file)
    hosts, origins = host_names(door.host, door.allow_hosts), origin_names(door.allow_origins)
    words = read_words(hosting.words, hosting.safe_answer) if hosting.words else None
    place = taken(door.host, door.port, has_key=key is not None, send_buffer_bytes=limits.send_buffer_bytes)
    with place:
        make_room(limits.connections)
        give_back()
        start_logs()
        code = asyncio.run(hosted(sources, cfg, limits, place, key=key, hosts=hosts, origins=origins, words=words))
    if code:
        raise SystemExit(code)


async def hosted(
    sources: dict[str, str],
    cfg: ServeConfig,
    limits: Limits,
    place: socket.socket,
    *,
    key: bytes | None,
    hosts: frozenset[str],
    origins: frozenset[str],
    words: Words | None,
) -> int:
    """Loads, serves, ends what was loaded; returns the exit code."""
    async with AsyncExitStack() as ends:
        backends, scorer = await parts_of(sources, cfg)
        for part in (*backends.values(), *([scorer] if scorer else ())):
            print(f"loading {part.name}", file=sys.stderr, flush=True)
            ends.push_async_callback(part.close)
            await part.start()
        desk = Desk(limits, Metrics(backends), queue=cfg.hosting.queue)
        house = House(
            backends=backends,
            desk=desk,
            scorer=scorer,
            words=words,
            rate=cfg.door.rate,
            key=key,
            hosts=hosts,
            origins=origins,
        )
        vital = {part.name: part.lost for part in (*backends.values(), scorer) if isinstance(part, LOCAL)}
        server = make_server(make_app(house), house, drain_s=cfg.door.drain_s, vital=vital)
        asked = "a key is asked for" if key else "no key is asked for"
        announce = f"{', '.join(backends)} at {url_of(place)} ({asked})"
        await server.announced(place, announce)
        return server.exit_code


LOCAL = (LocalBackend, LocalScorer)


def named(folders: Sequence[str], hosting: HostingConfig) -> dict[str, str]:
    """Names by which requests call the models -> where they lie: a folder's own name, with its parent's if need be.

    With `--backend` they are names of models there; none stands for all.
    """
    if hosting.backend:
        root_of(hosting.backend)
        backend_key()
        return {name: name for name in folders}
    if not folders:
        raise UserError("no model is named", fix="kinkajou serve FOLDER, or --backend URL")
    names = [short(folder) for folder in folders]
    if len(set(names)) < len(names):
        names = [long(folder) for folder in folders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two models have the name {twice}", fix="name one of their folders otherwise")
    return dict(zip(names, folders, strict=True))


def short(folder: str) -> str:
    return Path(os.path.abspath(folder)).name


def long(folder: str) -> str:
    return "/".join(Path(os.path.abspath(folder)).parts[-2:])


def reward_name(folder: str, taken: Collection[str]) -> str:
    """Another than any model's: of both it is told by name whether they are ready."""
    if name := next((name for name in (short(folder), long(folder)) if name not in taken), None):
        return name
    raise UserError(
        f"the reward model has the name of a model, {long(folder)}", fix="name one of their folders otherwise"
    )


def threads_left() -> int | None:
    """One processor stays for what speaks HTTP: threads of a model that share it wait for each other."""
    if "OMP_NUM_THREADS" in os.environ:  # torch reads it
        return None
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ours - 1)


async def parts_of(sources: dict[str, str], cfg: ServeConfig) -> tuple[dict[str, Backend], Scorer | None]:
    asked = cfg.hosting
    hosting = Hosting(
        bits=asked.bits,
        dtype=asked.dtype,
        slots=asked.slots,
        context=asked.context,
        max_tokens=limits_of(cfg.door).max_tokens,
        template=asked.template,
        threads=asked.threads or threads_left(),
    )
    backends: dict[str, Backend] = {}
    if asked.backend:
        backends |= await remote_backends(
            asked.backend,
            backend_key(),
            list(sources),
            max_tokens=cfg.door.max_new_tokens,
            deadline_s=cfg.door.deadline_s,
        )
    else:
        backends |= {name: LocalBackend(name, source, hosting) for name, source in sources.items()}
    scorer = LocalScorer(reward_name(asked.reward, backends), asked.reward, hosting) if asked.reward else None
    return backends, scorer


def limits_of(door: DoorConfig) -> Limits:
    return Limits(
        max_tokens=door.max_new_tokens or Limits.max_tokens,
        connections=door.max_connections,
        deadline_s=door.deadline_s,
    )


class OneLine(logging.Formatter):
    """Control characters of a message escaped; a traceback follows on lines that begin with blanks."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join("    " + escaped(line) for line in super().formatException(ei).split("\n"))


def escaped(line: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def start_logs() -> None:
    """One line for each request, and what goes wrong, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    for name, level in (("kinkajou", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.setLevel(level)
        log.handlers, log.propagate = [handler], False
