"""The place at which the server listens, taken before anything is loaded and opened once it can answer."""

import errno
import os
import re
import resource
import socket

from kinkajou.errors import UserError
from kinkajou.exchange import is_loopback
from kinkajou.serve.gate import NAME, bracketed, urlsplit_origin
from kinkajou.serve.keys import MAKE_ONE, VARIABLE

BACKLOG = 2048
OTHER_HANDLES = 256
"""Files, pipes of models' processes, connections that are being refused."""
EVERYWHERE = ("0.0.0.0", "::")


def taken(host: str, port: int, *, has_key: bool, send_buffer_bytes: int) -> socket.socket:
    """A socket that is bound but does not listen: until it does, who calls is turned away by the kernel.

    UserError if the host is no address of this machine, another than loopback without a key, or the port in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as fault:
        raise UserError(f"no address is known for the host {host!r}", evidence=str(fault)) from None
    if not has_key and not all(is_loopback(str(place[4][0])) for place in found):
        raise UserError(
            f"{host} can be reached from other machines, and no key is asked for",
            fix=f"{MAKE_ONE}, then --key-file key.txt (or the environment's {VARIABLE}); or leave --host out",
        )
    family, kind, protocol, _, address = found[0]
    place = socket.socket(family, kind, protocol)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    try:
        try:
            place.bind(address)
        except OSError as fault:
            if fault.errno != errno.EADDRINUSE:
                raise
            # Connections of a server that has just ended may stand in the way; else nobody may share the port.
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except OSError as fault:
        place.close()
        raise refused(f"{bracketed(host)}:{port}", fault) from None
    return place


def make_room(connections: int) -> None:
    """For so many connections among the process's file handles; UserError if they cannot be had."""
    wanted = connections + OTHER_HANDLES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(
                f"--max-connections {connections}: this process may open {hard:,} files",
                fix=f"--max-connections {max(1, hard - OTHER_HANDLES)}, or a higher `ulimit -n`",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def opened(place: socket.socket) -> None:
    """Who calls is heard from now on; UserError if another server was quicker."""
    # Not before: two sockets could be bound alike.  Connections inherit it, and the next server may bind over them.
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.listen(BACKLOG)
    except OSError as fault:
        raise refused(url_of(place), fault) from None


def refused(name: str, fault: OSError) -> UserError:
    return UserError(
        f"{name} cannot be listened at",
        evidence=os.strerror(fault.errno) if fault.errno else str(fault),
        fix="another --port, or 0 for a free one" if fault.errno == errno.EADDRINUSE else "another --host or --port",
    )


def url_of(place: socket.socket) -> str:
    """By which this machine reaches it."""
    host, port = place.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{bracketed(shown)}:{port}"


def host_names(host: str, allowed: tuple[str, ...]) -> frozenset[str]:
    """What may stand in a request's Host besides the addresses of this machine; UserError for what is no name."""
    names = [name.strip().lower().removesuffix(".") for name in allowed]
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"--allow-hosts: {name!r} is no name of a host", fix="such as chat.example.org, or with :port"
            )
    own = socket.gethostname().lower()
    return frozenset([*names, bracketed(host.lower()), own, f"{own}.local"]) - set(EVERYWHERE) - {"[::]"}


def origin_names(allowed: tuple[str, ...]) -> frozenset[str]:
    names = [name.strip().lower().removesuffix("/") for name in allowed]
    for name in names:
        if not re.fullmatch(r"https?://.+", name) or not NAME.fullmatch(urlsplit_origin(name)):
            raise UserError(f"--allow-origins: {name!r} is no origin", fix="such as https://chat.example.org")
    # A browser leaves the port out where it is the usual one.
    return frozenset(name.removesuffix(":443" if name.startswith("https:") else ":80") for name in names)
