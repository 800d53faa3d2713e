"""`python -m benchmarks.peers install`: fetches the peers, once."""

import sys

from benchmarks.peers import install

if sys.argv[1:] != ["install"]:
    sys.exit("python -m benchmarks.peers install")
install()
