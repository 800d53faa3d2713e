"""Digests of what a run is made from, and the settings that may differ when it goes on."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kinkajou.errors import UserError

WHOLE = 64 * 2**20
"""Bytes up to which a file is read whole; of a longer one so many at each end, and its length."""
READ = ("config.json", "adapter_config.json", "manifest.json", "*.safetensors")

FREE = frozenset(
    {
        *("output", "overwrite", "export", "log_every", "stop_on", "preflight"),
        *("save_every", "save_minutes", "save_updates", "save_state", "save_behind", "keep_last", "keep_every"),
        *("resume", "from_step", "allow_change"),
        *("interface", "start_timeout_s", "collective_timeout_s"),
        *("reward_timeout_s", "reward_retries", "workers", "ray_address"),
        *("server", "server_gap", "server_timeout_s"),
    }
)
"""Settings that decide nothing of what is learnt."""
ROUNDED = frozenset(
    {"strategy", "tp", "device_share", "engine_weights", "tokens_per_microbatch", "gradient_checkpointing"}
)
"""Settings that change nothing but the last bits of sums."""


def digest_of(*parts: Iterable[object]) -> str:
    """Of rows, each by its text."""
    digest = hashlib.sha256()
    for part in parts:
        for row in part:
            digest.update(repr(row).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def digest_of_model(source: str) -> str:
    """Of a folder's settings and weights; any other source is known by its name alone."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for path in sorted({path for pattern in READ for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(WHOLE))
            if size > WHOLE:
                file.seek(max(WHOLE, size - WHOLE))
                digest.update(file.read())
    return digest.hexdigest()


def check_settings(then: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], place: str) -> list[str]:
    """Refuses to go on under other settings than before; returns the names of those that change the last bits."""
    changed = [
        name for name in {**then, **now} if name not in FREE and then.get(name) != now.get(name) and name not in allowed
    ]
    serious = [name for name in changed if name not in ROUNDED]
    if serious:
        rows = "; ".join(f"{name}: {then.get(name)} then, {now.get(name)} now" for name in serious[:8])
        raise UserError(
            f"the settings are not those of {place}",
            evidence=rows + ("" if len(serious) <= 8 else f"; and {len(serious) - 8} more"),
            fix=f"--allow_change {' '.join(serious)} to go on with them; another --output, or --overwrite, "
            "for a run of its own",
        )
    return changed


def check_made_from(then: Mapping[str, str], now: Mapping[str, str], allowed: Sequence[str], place: str) -> None:
    changed = [name for name in now if name in then and then[name] != now[name] and name not in allowed]
    if changed:
        raise UserError(
            f"the {changed[0].replace('_', ' ')} is not what {place} was trained with",
            evidence="; ".join(f"{name}: {then[name][:12]} then, {now[name][:12]} now" for name in changed),
            fix=f"bring back what it was, or --allow_change {' '.join(changed)}",
        )


def other_machine(then: Mapping[str, Any], now: Mapping[str, Any], rounded: Sequence[str]) -> list[str]:
    """What keeps a run that goes on from being equal to the bit to one that was never stopped."""
    names = ("kinkajou", "torch", "transformers", "peft", "world", "threads", "device")
    changed = [
        f"{name} {then.get(name)} then, {now.get(name)} now" for name in names if then.get(name) != now.get(name)
    ]
    changed += rounded
    return [f"not equal to the bit to a run without a stop: {'; '.join(changed)}"] if changed else []
