"""A plan as tables: parts by phase, what fits, what a step takes, what would help."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from kinkajou.plan.architecture import Architecture
from kinkajou.plan.fitting import RESERVED, Proposal, Room, excess, on_machine
from kinkajou.plan.job import Job
from kinkajou.plan.memory import Memory, Phase
from kinkajou.plan.rates import REACHED, Machine, Times
from kinkajou.plan.saving import saving_of
from kinkajou.train.tables import grid, head

NAMES = {"sft": "SFT", "reward": "reward model", "prefer": "preferences", "ppo": "PPO", "grpo": "GRPO"}


def page(job: Job, room: Room, machine: Machine, memory: Memory, times: Times, model: str) -> Iterator[RenderableType]:
    yield Text(f"{NAMES[job.stage]} of {model}: {billions(job.policy.parameters)} parameters, {settings(job)}")
    phases = [memory.standing, *memory.phases]
    yield head(f"Memory of each {'GPU' if job.how.gpu else 'process'}")
    yield parts(phases, [phase.device for phase in phases])
    if memory.host_peak:
        yield head("Main memory of each process")
        yield parts(phases, [phase.host for phase in phases])
    yield Text()
    yield from verdict(job, room, memory)
    saving = saving_of(job)
    yield Text(
        f"a checkpoint: {size(saving.disk)} on the disk; its copy in the main memory of the first process, "
        f"{size(saving.host)} beside the rest, while it is written"
    )
    source = "measured rates" if machine.measured else f"data sheets, {REACHED:.0%} of the products they promise"
    yield head(f"Time of a step on {machine.name}, an estimate from {source}")
    yield timing(times)


def settings(job: Job) -> str:
    how, layout = job.how, job.layout
    one, many = ("GPU", "GPUs") if how.gpu else ("process", "processes")
    words = [layout.strategy, f"{layout.ranks} {one if layout.ranks == 1 else many}"]
    words += [f"tp {layout.tp}"] if layout.tp > 1 else []
    words += ["bf16" if how.half else "fp32", f"LoRA of rank {how.lora_rank}" if how.lora_rank else "all weights"]
    words += ["gradient checkpointing"] if how.checkpointing else []
    return ", ".join([*words, f"rows of {job.length:,} tokens, {job.pack:,} at once"])


def parts(phases: Sequence[Phase], tables: Sequence[dict[str, float]]) -> RenderableType:
    """Rows are parts, columns phases; the peak is bold."""
    totals = [sum(table.values()) for table in tables]
    shown = grid("", *(phase.name for phase in phases))
    for name in dict.fromkeys(name for table in tables for name in table):
        shown.add_row(name, *(size(table[name]) if name in table else "" for table in tables))
    shown.add_row("in all", *(Text(size(total), "bold" if total == max(totals) else "") for total in totals))
    return shown


def verdict(job: Job, room: Room, memory: Memory) -> Iterator[Text]:
    over, host_over = excess(job, room)
    where = f"peak {size(memory.device_peak)}, in the phase {memory.device_owner.name!r}"
    if job.how.gpu and room.memory is None:
        yield Text(f"{where}; --memory or --gpu says whether it fits")
    elif job.how.gpu:
        assert room.memory is not None
        assert room.usable is not None
        of = f"of {size(room.memory)}, {size(RESERVED)} of them reserved"
        left = f"{size(over)} too much" if over else f"{size(room.usable - memory.device_peak)} left"
        yield judged(not over, f"{where}, {of}: {left}")
    wanted = on_machine(job, memory)
    if not wanted:
        return
    owner = memory.host_owner if memory.host_peak else memory.device_owner
    number = job.layout.on_one_host
    words = f"main memory of a machine {size(wanted)}, for {number} process{'es' * (number > 1)}, "
    words += f"in the phase {owner.name!r}"
    if room.host is None:
        yield Text(f"{words}; --host says whether it fits")
    else:
        yield judged(not host_over, f"{words}, of {size(room.host)}")


def judged(good: bool, words: str) -> Text:
    return Text.assemble(("fits", "bold green") if good else ("does not fit", "bold red"), f": {words}")


def timing(times: Times) -> RenderableType:
    shown = grid("phase", "a step")
    for name, seconds in times.phases.items():
        shown.add_row(name, duration(seconds))
    shown.add_row("step", duration(times.step_s))
    shown.add_row("tokens/s", f"{times.tokens_per_s:,.0f}")
    return shown


def changes(singles: Sequence[Proposal], remedies: Sequence[Proposal]) -> Iterator[RenderableType]:
    yield head("What each change alone saves at the peak")
    shown = grid("change", "saves", "more on the host")
    shown.add_column("")
    for one in singles:
        shown.add_row(one.flags, size(one.saving), size(one.host) if one.host > 0 else "", one.changes[0].what)
    yield shown
    if not remedies:
        yield head("No set of up to four changes makes it fit: a smaller model, shorter rows, or larger machines")
        return
    yield head("The smallest changes that make it fit")
    shown = grid("changes", "save", "more on the host")
    for one in remedies:
        shown.add_row(one.flags, size(one.saving), size(one.host) if one.host > 0 else "")
    yield shown


def largest_told(family: str, found: tuple[str, Architecture] | None) -> Text:
    words = f"\nLargest {family} model that fits with these settings, of those known by name: "
    return Text(words + (f"{found[0]}, {billions(found[1].parameters)} parameters" if found else "none"))


def size(count: float) -> str:
    for unit, letters in ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:,.1f} {letters}"
    return f"{count:.0f} B"


def billions(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.3g} min"
