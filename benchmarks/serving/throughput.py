"""Tokens a second: one client and sixteen, `kinkajou serve` and `transformers serve` on the same model in turn.

Both servers run all the time; only one is asked at a time.  In each round every cell (server, clients) gets the same
requests: greedy chats, not streamed, one after the other by each client.  Tokens are those that the model's tokenizer
makes of the texts that came back, so that both are counted alike.  Medians of the rounds, ratios within each round.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from transformers import AutoTokenizer

from benchmarks.serving import servers, transformers_serve
from benchmarks.serving.client import request
from benchmarks.serving.figures import Row, table
from benchmarks.serving.traffic import Crowd, good, lost

CLIENTS = (1, 16)
TOKENS, EACH, ROUNDS = 64, {1: 8, 16: 64}, 5
AIM_BATCHING, AIM_PEER = 4.0, 1.0


TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""For a model without one, which `transformers serve` refuses: the text as it is."""


def with_template(model: Path, folder: Path) -> Path:
    """The model's folder, or a copy with a chat template if it has none."""
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if "chat_template" in settings or (model / "chat_template.jinja").is_file():
        return model
    copy = folder / model.name
    copy.mkdir()
    for path in filter(Path.is_file, model.iterdir()):
        shutil.copyfile(path, copy / path.name)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return copy


def asked(model: str, number: int) -> bytes:
    told = f"Once upon a time, there was a little bird named Tom {number}. Tom liked to"
    body = {"model": model, "messages": [{"role": "user", "content": told}], "temperature": 0, "max_tokens": TOKENS}
    return request("POST", "/v1/chat/completions", body)


async def one(port: int, model: str, clients: int, requests: int) -> tuple[list[str], float]:
    """Texts and seconds."""
    crowd = Crowd(port)
    began = time.perf_counter()
    sent = await crowd.closed(clients, lambda number: asked(model, number), requests=requests)
    spent = time.perf_counter() - began
    crowd.close()
    if lost(sent) or len(good(sent)) != requests:
        first = next((s.answer for s in sent if s.answer and s.answer.status != 200), None)
        raise RuntimeError(f"{requests - len(good(sent))} of {requests} failed: {crowd.faults[:2]} {first}")
    return [s.answer.json["choices"][0]["message"]["content"] for s in good(sent) if s.answer], spent


def rounds_of(sides: dict[str, tuple[int, str]], rounds: int, scale: float, tokenizer: object) -> list[Row]:
    """Each a dictionary of (side, clients) -> tokens a second; the order of the sides turns round."""
    rows = []
    for number in range(-1, rounds):  # the first one warms up
        row: Row = {}
        names = list(sides) if number % 2 else list(reversed(sides))
        for clients in CLIENTS:
            requests = max(clients, round(EACH[clients] * scale))
            for name in names:
                port, model = sides[name]
                texts, spent = asyncio.run(one(port, model, clients, requests))
                counted = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)  # type: ignore[operator]
                row[f"{name} {clients}"] = {"tokens_per_s": round(counted / spent, 1), "tokens": counted}
        if number >= 0:
            rows.append(row)
    return rows


def middle(rows: Sequence[Row], name: str) -> float:
    return statistics.median(row[name]["tokens_per_s"] for row in rows)


def ratio(rows: Sequence[Row], over: str, under: str) -> Row:
    found = [row[over]["tokens_per_s"] / row[under]["tokens_per_s"] for row in rows]
    return {"median": round(statistics.median(found), 2), "least": round(min(found), 2), "most": round(max(found), 2)}


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    rounds = ROUNDS if given.scale >= 1 else 2
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    with ExitStack() as stack:
        room = stack.enter_context(tempfile.TemporaryDirectory(prefix="kinkajou-throughput-"))
        model = with_template(given.model, Path(room))
        ours = stack.enter_context(servers.kinkajou(model))
        theirs = stack.enter_context(transformers_serve.serving(model))
        port = urlsplit(theirs.url).port
        assert port is not None
        sides = {"kinkajou": (ours.port, model.name), "transformers": (port, theirs.model)}
        rows = rounds_of(sides, rounds, given.scale, tokenizer)
    names = [f"{name} {clients}" for name in sides for clients in CLIENTS]
    ratios = {
        "16 clients to 1": ratio(rows, "kinkajou 16", "kinkajou 1"),
        "transformers, 16 clients to 1": ratio(rows, "transformers 16", "transformers 1"),
        "kinkajou to transformers, 1 client": ratio(rows, "kinkajou 1", "transformers 1"),
        "kinkajou to transformers, 16 clients": ratio(rows, "kinkajou 16", "transformers 16"),
    }
    found = {
        "tokens_asked": TOKENS,
        "tokens_per_s": {name: middle(rows, name) for name in names},
        "tokens": {name: rows[0][name]["tokens"] for name in names},
        "ratios": ratios,
        "options": list(transformers_serve.FASTEST),
    }
    fine = ratios["16 clients to 1"]["median"] >= AIM_BATCHING
    fine &= all(ratios[f"kinkajou to transformers, {n}"]["median"] >= AIM_PEER for n in ("1 client", "16 clients"))
    return {"summary": found, "rounds": rows}, fine


def page(figures: Row) -> str:
    found = figures["summary"]
    speed, ratios = found["tokens_per_s"], found["ratios"]

    def told(name: str) -> str:
        x = ratios[name]
        return f"{x['median']:.1f} ({x['least']:.1f} to {x['most']:.1f})"

    rows = [
        ["`kinkajou serve`", speed["kinkajou 1"], speed["kinkajou 16"], told("16 clients to 1")],
        [
            "`transformers serve`",
            speed["transformers 1"],
            speed["transformers 16"],
            told("transformers, 16 clients to 1"),
        ],
        ["ratio", *(told(f"kinkajou to transformers, {n}") for n in ("1 client", "16 clients")), ""],
    ]
    return table(["tokens a second", "1 client", "16 clients", "16 to 1"], rows)
