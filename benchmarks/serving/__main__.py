"""`python -m benchmarks.serving NAME [--write]`: what the server holds, measured; docs/serving.md has the tables.

`--write` keeps the figures in benchmarks/results/serving-NAME.json, `--page` prints the tables of those that are kept.
Figures of time want the machine for themselves: `--raise` gives a run the highest priority (an administrator's right).
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.serving import figures, servers

NAMES = {
    "load": "64 clients, 10,000 requests, each beside the same alone",
    "throughput": "1 and 16 clients, kinkajou and `transformers serve` in turn",
    "overhead": "the server without a model, 32 clients",
    "overload": "ten times what it can do",
    "disconnects": "500 clients that vanish, 100 that are slow",
    "memory": "10,000 requests: memory, handles, threads, tasks",
    "drain": "100 SIGTERM with 16 streams open",
    "abuse": "raw sockets",
    "schema": "schemathesis, 10,000 cases",
}
RAISED = "KINKAJOU_RAISED"


def raise_priority() -> None:
    """Goes on as a session of its own with the highest priority."""
    if os.environ.get(RAISED) is None:
        os.environ[RAISED] = "1"
        again = [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:]]
        script = 'echo -20 > /proc/self/autogroup; exec nice -n -20 "$@"'
        os.execvp("setsid", ["setsid", "--wait", "bash", "-c", script, "_", *again])


def pages() -> str:
    """Every table whose figures are there, under the command that makes it."""
    parts = []
    for name in NAMES:
        path = figures.RESULTS / f"serving-{name}.json"
        if path.is_file():
            made = importlib.import_module(f"benchmarks.serving.{name}").page(json.loads(path.read_text()))
            parts.append(f"`python -m benchmarks.serving {name} --write`:\n\n{made}")
    return "\n".join(parts)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("names", nargs="*", metavar="NAME", help="; ".join(f"{n}: {told}" for n, told in NAMES.items()))
    flags.add_argument("--model", type=Path, default=servers.MODEL, help="a model's folder")
    flags.add_argument("--scale", type=float, default=1.0, help="part of the requests or trials that are made")
    flags.add_argument("--trials", type=int, help="number of trials (drain, disconnects)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--write", action="store_true", help="keep the figures")
    flags.add_argument("--page", action="store_true", help="print the tables of the figures that are kept")
    flags.add_argument("--raise", dest="raised", action="store_true", help="run with the highest priority")
    given = flags.parse_args()
    if given.page:
        print(pages(), end="")
        return 0
    if not given.names or set(given.names) - set(NAMES):
        flags.error(f"names are {', '.join(NAMES)}")
    if given.raised:
        raise_priority()
    all_fine = True
    for name in given.names:
        part, began = importlib.import_module(f"benchmarks.serving.{name}"), time.monotonic()
        found, fine = part.run(given)
        all_fine &= fine
        print(part.page(found))
        spent = round(time.monotonic() - began)
        print(f"{name}: {'as it should be' if fine else 'NOT AS IT SHOULD BE'}, {spent} s", flush=True)
        if given.write:
            told = {"model": given.model.name, "scale": given.scale, "trials": given.trials, "seed": given.seed}
            figures.write(name, found | {"seconds": spent, "fine": fine}, told)
    return 0 if all_fine else 1


if __name__ == "__main__":
    sys.exit(main())
