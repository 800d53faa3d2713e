"""Every raw-socket abuse of `benchmarks.serving abuse`, with short limits of time; and that the campaign can fail."""

import asyncio
import gc
import socket
import threading
import weakref

from benchmarks.serving import abuse
from benchmarks.serving.abuse_cases import Case, cases, lines
from benchmarks.serving.client import HOST, connect, request
from place import make_house, served, until

from kinkajou.serve.limits import Limits

QUICK = Limits(head_s=0.7, body_s=0.7, idle_s=2.0, send_s=2.0)


def test_no_abuse_gets_a_fault_of_ours_or_hangs_and_others_are_answered() -> None:
    async def ask() -> list[dict[str, object]]:
        async with served(make_house(limits=QUICK)) as place:
            return await asyncio.to_thread(abuse.campaign, place.port, cases())

    rows = asyncio.run(ask())
    assert len(rows) >= 50
    assert [row for row in rows if not row["right"]] == []
    assert abuse.summary(rows)["answers_5xx"] == 0


def judged(answer: bytes, case: Case, limit_s: float = 0.3) -> tuple[dict[str, object], bool]:
    """What the campaign finds of a server that says these bytes to anything, and whether that is right."""

    def talk(place: socket.socket) -> None:
        line, _ = place.accept()
        with line:
            line.recv(1 << 16)
            line.sendall(answer)
            line.recv(1)

    with socket.create_server((HOST, 0)) as place:
        server = threading.Thread(target=talk, args=(place,))
        server.start()
        row = abuse.send(case, place.getsockname()[1], limit_s)
        server.join()
    return row, abuse.right(case, row)


def plain(status: str, body: bytes) -> bytes:
    """An answer that says it has two bytes."""
    return b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\n%b" % (status.encode(), body)


def test_a_fault_a_hang_and_half_an_answer_are_found() -> None:
    case = Case("health", (lines("GET /health HTTP/1.1"),), frozenset({0, 200}))
    assert judged(plain("200 OK", b"ok"), case)[1]
    assert not judged(plain("500 Oh", b"no"), case)[1]
    assert not judged(plain("200 OK", b"o"), case)[1]
    assert not judged(b"", case)[1]
    assert not judged(b"nonsense\r\n\r\n", case)[1]


def test_a_connection_that_was_reset_is_forgotten_at_once() -> None:
    async def ask() -> list[object]:
        async with served() as place:
            line = await connect(place.port)
            assert (await line.ask(request("GET", "/health"))).status == 200
            kept = weakref.WeakSet(place.server.server_state.connections)
            assert len(kept) == 1
            line.reset()
            await until(lambda: not place.server.server_state.connections)
            await asyncio.sleep(0.05)
            gc.collect()
            return list(kept)

    assert asyncio.run(ask()) == []
