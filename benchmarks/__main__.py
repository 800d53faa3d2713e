"""`python -m benchmarks compare | performance`: measurements against other frameworks, and their page."""

import sys

from benchmarks.speed import compare, page
from kinkajou.errors import UserError

COMMANDS = {"compare": compare.main, "performance": page.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit("python -m benchmarks compare --help\npython -m benchmarks performance --help")
    try:
        sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
    except UserError as fault:
        print(fault, file=sys.stderr)
        sys.exit(fault.exit_code)
