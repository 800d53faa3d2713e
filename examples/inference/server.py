"""The server by the flags of 2023; see README.md."""

import sys
from argparse import Namespace
from collections.abc import Sequence

from flags import bits_of, coati, model_flags, model_of

from kinkajou.config import DoorConfig, HostingConfig, ServeConfig

BECAME = {"host": "--http_host", "port": "--http_port", "words": "--profanity_file", "bits": "--quant"}


def flags() -> coati.Flags:
    found = model_flags("server.py", "Serve a model: /generate, /generate/stream, OpenAI's API and a page.")
    found.add_argument("--http_host", default="127.0.0.1", help="was 0.0.0.0: any but this machine's own needs a key")
    found.add_argument("--http_port", type=int, default=7070, help="port to listen at")
    found.add_argument(
        "--key_file", default="", help="new: file with the API key; else the environment's KINKAJOU_API_KEY"
    )
    found.add_argument("--profanity_file", default="", help="words, one a line; answers with one of them are replaced")
    return found


def settings(given: Namespace) -> ServeConfig:
    return ServeConfig(
        hosting=HostingConfig(bits=bits_of(given), words=given.profanity_file),
        door=DoorConfig(host=given.http_host, port=given.http_port, key_file=given.key_file),
    )


def work(given: Namespace) -> None:
    source, cfg = model_of(given), settings(given)
    from kinkajou.serve.start import serve

    serve([source], cfg)


def main(arguments: Sequence[str] | None = None) -> int:
    return coati.guarded(flags(), BECAME, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
