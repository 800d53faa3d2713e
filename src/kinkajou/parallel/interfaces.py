"""Network interfaces of this machine, by name and address, and who holds a port."""

import os
import re
import socket
import struct
import sys
from pathlib import Path

from kinkajou.errors import UserError, did_you_mean

ASK_ADDRESS = {"linux": 0x8915, "darwin": 0xC0206921}
"""SIOCGIFADDR: an interface's IPv4 address."""


def names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def loopback() -> str:
    return next((name for name in names() if re.fullmatch(r"lo\d*", name)), "lo")


def address_of(name: str) -> str:
    """The interface's address, IPv4 before IPv6."""
    known = names()
    if name not in known:
        raise UserError(
            f"this machine has no network interface {name!r}",
            evidence=f"{socket.gethostname()} has: {', '.join(known)}",
            fix=f"--interface {did_you_mean(name, known)}",
        )
    found = v4_of(name) or v6_of(name)
    if found is None:
        raise UserError(
            f"the network interface {name!r} has no address",
            evidence=f"on {socket.gethostname()}",
            fix="bring it up, or name another by --interface",
        )
    return found


def v4_of(name: str) -> str | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock.fileno(), ASK_ADDRESS[sys.platform], struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def v6_of(name: str) -> str | None:
    """From the kernel's table: address, index, prefix, scope (0: valid everywhere), flags, name."""
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    wide = [row[0] for row in rows if row[5] == name and row[3] in ("00", "10")]
    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(wide[0])) if wide else None


def leads_to(host: str, port: int) -> str | None:
    """The interface from which this machine would send to `host`; None while its name is unknown.  Nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)
            own = sock.getsockname()[0]
    except OSError:
        return None
    return next((name for name in names() if own in (v4_of(name), v6_of(name))), None)


def holder(port: int) -> str | None:
    """The process that listens on a port, as far as this user may see it: `python3 (pid 123)`."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        rows = [line.split() for line in Path(table).read_text().splitlines()[1:]] if Path(table).exists() else []
        inodes |= {
            f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port
        }
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) in inodes:
                process = link.parents[1]
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return None
