"""One answer of a trained model, by the flags of the original system; see README.md."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import coati_flags as coati

from kinkajou.config import ChatConfig
from kinkajou.errors import UserError


def flags() -> coati.Flags:
    found = coati.Flags("inference.py", "One answer of a trained model.")
    found.add_argument("--model", choices=coati.FAMILIES, help="family of the model, checked; detected if omitted")
    found.add_argument(
        "--pretrain", help="folder or hub id of a model; with an old --model_path, the model that it is of"
    )
    found.add_argument("--model_path", help="folder of a trained model, or an old .pt file")
    found.add_argument("--input", default="Question: How are you ? Answer:", help="what to answer")
    found.add_argument("--max_length", type=int, default=100, help="longest prompt and answer in tokens")
    return found


def answer(given: Namespace) -> None:
    name = "model_path" if given.model_path else "pretrain"
    what = "the folder of a model, a hub id, or an old .pt file with the --pretrain it is of"
    source = coati.need_folder(given, name, what, base=given.pretrain if given.model_path else None)
    coati.check_family(
        f"--{name}", source, given.model, since=f"--model {given.model}", fix="leave --model out: it is detected"
    )
    from kinkajou.chat.screen import safe
    from kinkajou.chat.talker import Talker
    from kinkajou.data.sources import Message

    talker = Talker(source, ChatConfig(temperature=1.0, top_k=50, top_p=0.95))
    messages = [Message("user", given.input)]
    prompt = len(talker.form.prompt(messages))
    if prompt >= given.max_length:
        raise UserError(
            "--max_length leaves no room for an answer",
            evidence=f"--max_length {given.max_length}; the input with its template has {prompt} tokens",
            fix=f"say --max_length {prompt + 100}",
        )
    talker.cfg = replace(talker.cfg, max_new_tokens=given.max_length - prompt)
    for piece in talker.answer(messages):
        print(safe(piece), end="", flush=True)
    print()


def main(arguments: Sequence[str] | None = None) -> int:
    return coati.guarded(flags(), {}, answer, arguments)


if __name__ == "__main__":
    sys.exit(main())
