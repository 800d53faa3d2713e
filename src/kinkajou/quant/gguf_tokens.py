"""A tokenizer as llama.cpp keeps it, where llama.cpp would cut every text as the tokenizer does; else a refusal."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kinkajou.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""
BLANK = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|[.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c" + r"])]+"
SPLITS = {LLAMA3: ("llama-bpe", True), BLOOM: ("bloom", False)}
"""Pattern before the merges -> llama.cpp's name for it, and whether a whole word of the vocabulary is not merged."""
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Vocabulary:
    """Values of the `tokenizer.ggml` keys."""

    model: str
    """`gpt2` for bytes and merges, `llama` for SentencePiece's."""
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    flags: dict[str, bool]
    templates: dict[str, str]
    """By name; `default` among them where there are any."""


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int]) -> Vocabulary:
    """All entries of a tokenizer, for an embedding of that many rows; `ends` are all tokens that end an answer."""
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model["type"] != "BPE" or any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise unlike(f"its model is {model['type']}", "llama.cpp is given byte-pair encodings only")
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in model["merges"]]
    added = {entry["id"]: entry for entry in said["added_tokens"]}
    words = {index: word for word, index in model["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    if max(words) >= rows:
        raise UserError(
            "the tokenizer has more entries than the model has rows", evidence=f"{max(words) + 1} entries, {rows} rows"
        )
    for entry in added.values():
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
            raise unlike(f"{entry['content']!r} takes blanks beside it along", "llama.cpp has no such tokens")
    tokens = [words.get(i, f"[PAD{i}]") for i in range(rows)]
    if len(set(tokens)) < rows:
        raise unlike("two of its entries are the same text", "llama.cpp knows a token by its text")
    kinds = [kind(i, words, added, model.get("unk_token"), bool(model["byte_fallback"])) for i in range(rows)]
    scores: list[float] = []
    if model["byte_fallback"]:
        form, pre, flags = "llama", "default", {"add_space_prefix": space_before(said)}
        scores = merge_scores(tokens, kinds, pairs)
    else:
        form, pre, flags = "gpt2", byte_level(said), {}
        if not pairs:
            raise unlike("it has no merges", "llama.cpp refuses such a file")
    return Vocabulary(
        form,
        pre,
        tokens,
        kinds,
        [] if scores else [" ".join(pair) for pair in pairs],
        scores,
        special_ids(tokenizer, ends),
        flags | added_by_itself(tokenizer),
        plain_templates(tokenizer),
    )


def unlike(found: str, why: str) -> UserError:
    return UserError(
        "this tokenizer has no GGUF form that cuts texts as it does",
        evidence=f"{found}; {why}",
        fix="--to merged, and a server that reads Hugging Face folders: `kinkajou serve`, vLLM, transformers serve",
    )


def kind(index: int, words: Mapping[int, str], added: Mapping[int, Any], unknown: str | None, bytes_: bool) -> int:
    if index not in words:
        return UNUSED
    if words[index] == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    return BYTE if bytes_ and re.fullmatch(r"<0x[0-9A-F]{2}>", words[index]) else NORMAL


def byte_level(said: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts words before it merges."""
    if said["normalizer"]:
        raise unlike(f"it has a {said['normalizer']['type']} normalizer", "llama.cpp changes no text")
    before, whole_words = said["pre_tokenizer"] or {}, bool(said["model"].get("ignore_merges"))
    steps = before.get("pretokenizers", [before])
    *first, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        raise unlike(f"its words are cut by {json.dumps(before)[:200]}", "llama.cpp has no name for that")
    if not first and last["use_regex"]:
        name, takes_words = "gpt-2", False
    elif first == [{"type": "Digits", "individual_digits": True}] and last["use_regex"]:
        name, takes_words = "smollm", False
    elif (
        len(first) == 1
        and not last["use_regex"]
        and first[0]["type"] == "Split"
        and (first[0]["behavior"], first[0]["invert"]) == ("Isolated", False)
        and first[0]["pattern"].get("Regex") in SPLITS
    ):
        name, takes_words = SPLITS[first[0]["pattern"]["Regex"]]
    else:
        raise unlike(f"its words are cut by {json.dumps(first)[:200]}", "llama.cpp has no name for that")
    if whole_words != takes_words:
        raise unlike(f"ignore_merges is {whole_words}", f"with this pattern llama.cpp has {takes_words}")
    return name


def space_before(said: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a blank before a text; it must do nothing else to it."""
    steps = said["normalizer"] or {}
    parts = steps.get("normalizers", [steps])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    if said["pre_tokenizer"] is None and parts == [{"type": "Prepend", "prepend": BLANK}, replaces]:
        return True
    if said["pre_tokenizer"] is None and parts == [replaces]:
        return False
    found = json.dumps({name: said[name] for name in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
    raise unlike(f"it prepares texts by {found[:250]}", "llama.cpp writes blanks as ▁, with one before a text, or none")


def merge_scores(tokens: Sequence[str], kinds: Sequence[int], pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """Scores by which llama.cpp merges as the list of merges says.

    llama.cpp joins any two neighbours that make a token, the best score first.  That is the list's order if each way
    to split a token is a merge, and the merges of one token stand together.
    """
    normal = {token for token, found in zip(tokens, kinds, strict=True) if found == NORMAL}
    known = set(tokens)
    if missing := [i for i in range(256) if f"<0x{i:02X}>" not in known]:
        raise unlike(f"{len(missing)} of 256 bytes have no token", "llama.cpp writes unknown characters as bytes")
    ranks: dict[str, list[int]] = {}
    given = {pair: i for i, pair in enumerate(pairs)}
    for (left, right), rank in given.items():
        ranks.setdefault(left + right, []).append(rank)
    for token in normal:
        splits = {(token[:i], token[i:]) for i in range(1, len(token)) if {token[:i], token[i:]} <= known}
        found = ranks.get(token, [])
        if splits != {pairs[rank] for rank in found}:
            raise unlike(f"{token!r} is not merged from {sorted(splits)[:3]}", "llama.cpp merges all that fits")
        if found and max(found) - min(found) >= len(found):
            raise unlike(f"other merges stand between those of {token!r}", "llama.cpp has one score for a token")
    return [-float(min(ranks[token])) if token in ranks else -float(len(pairs)) for token in tokens]


def special_ids(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> dict[str, int]:
    ids = {
        name: int(index)
        for name in ("bos", "eos", "unk", "pad")
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    others = sorted(set(ends) - {ids["eos"]})
    if len(others) > 2:  # llama.cpp ends an answer at the end of a text, of a turn and of a message
        raise UserError(
            f"a GGUF file has keys for three end tokens, this model has {len(others) + 1}: answers would run on",
            evidence=str(sorted({ids["eos"], *others})),
            fix="name three in eos_token_id of its generation_config.json, or --to merged",
        )
    return ids | dict(zip(("eot", "eom"), others, strict=False))


def added_by_itself(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether a text gets a begin and an end token; UserError where it gets anything else."""
    bare = list(tokenizer("x", add_special_tokens=False).input_ids)
    whole = list(tokenizer("x").input_ids)
    begins = len(whole) > len(bare) and whole[:1] == [tokenizer.bos_token_id]
    ends = len(whole) > len(bare) + begins and whole[-1:] == [tokenizer.eos_token_id]
    if whole != [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
        raise unlike(f"it makes {whole} of the tokens {bare}", "llama.cpp adds a begin and an end token")
    return {"add_bos_token": begins, "add_eos_token": ends}


def plain_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates by the names of their keys; UserError where these would not say which one is meant."""
    said = tokenizer.chat_template
    given = said if isinstance(said, dict) else {"default": said} if said else {}
    found = {re.sub(r"[^A-Za-z0-9]", "_", name): plain_template(text) for name, text in given.items()}
    if given and ("default" not in found or len(found) < len(given)):
        raise UserError(
            "these chat templates have no GGUF form",
            evidence=f"they are named {', '.join(map(repr, given))}",
            fix="one of them must be `default`, and names must differ in letters or digits; or --to merged",
        )
    return found


def plain_template(template: str) -> str:
    """A chat template without {% generation %}, which only transformers reads; it renders the same."""

    def plain(found: re.Match[str]) -> str:
        before, end, after = found.groups()
        return f"{{%{before} {'endif' if end else 'if true'} {after}%}}"

    return GENERATION.sub(plain, template)
