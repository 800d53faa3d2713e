"""`python -m kinkajou` and the `kinkajou` command."""

import sys

from kinkajou.cli import main as run


def main() -> None:
    sys.exit(run())


if __name__ == "__main__":
    main()
