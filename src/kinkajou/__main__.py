"""`python -m kinkajou` and the `kinkajou` command."""

import sys

from kinkajou.cli import main as run
from kinkajou.output import endure


def main() -> None:
    endure()
    sys.exit(run())


if __name__ == "__main__":
    main()
