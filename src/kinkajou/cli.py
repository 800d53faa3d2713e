"""The command line.  Nothing heavy is imported before a command runs, so `--help` is quick."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from kinkajou import __version__, config
from kinkajou.commands import chat, demo, eval_app, export, quantize, replay, runs, sample, serve, verify
from kinkajou.errors import UserError, did_you_mean
from kinkajou.flags import grouped, names_of

STAGES: dict[str, tuple[type[Any], str]] = {
    "sft": (config.SFTConfig, "Supervised fine-tuning on demonstrations."),
    "reward": (config.RewardConfig, "Train a reward model on ranked pairs."),
    "prefer": (config.PreferConfig, "Learn from preferences without rollouts: DPO, KTO, ORPO, SimPO and others."),
    "ppo": (config.PPOConfig, "Improve a policy against a reward by PPO."),
    "grpo": (config.GRPOConfig, "Improve a policy against a reward without a critic: GRPO, DAPO, RLOO and others."),
}


@dataclass(frozen=True)
class Borrowing:
    """A command that takes a stage's settings without its run: `kinkajou VERB RECIPE --flag value ...`."""

    show: type[Any]
    """Its own settings; they go before the stage's of the same name, and a recipe's keys are never theirs."""
    start: str
    """What starts it, by its name in kinkajou.train."""
    words: str
    """Its help."""
    of_stage: str
    """Its help for one stage."""


BORROWING = {
    "check": Borrowing(
        config.CheckConfig,
        "start_check",
        "Check a recipe without a run: `kinkajou check RECIPE --flag value ...`.",
        "Data, template, tokenizer and model of `kinkajou {name}`: what is trained, and what is wrong.",
    ),
    "profile": Borrowing(
        config.ProfileConfig,
        "start_profile",
        """Where a step's time and memory go: `kinkajou profile RECIPE --flag value ...`.

    Trains a few steps (--warmup 1, then --steps 3 that are measured, then one that is traced) without a trace in the
    run's folder. --trace FILE takes the traced step; `kinkajou profile sft --help` lists all flags.
    """,
        """Train some steps of `kinkajou {name}`, keep nothing, show where time and memory went.

    Prints the phases of a step, what lies in memory, the ten most expensive operators and what to change, and writes
    a trace file for ui.perfetto.dev.""",
    ),
    "plan": Borrowing(
        config.PlanConfig,
        "start_plan",
        """Memory and time of a run before it: `kinkajou plan RECIPE --gpus 8 --memory 24GB --host 64GB`.

    Needs no weights, data or GPU: a model may be a folder with a config.json, a preset, or a name such as llama-7b.
    `kinkajou plan sft --help` lists all flags.
    """,
        """What `kinkajou {name}` will need: bytes by part and phase in each process, the peak, and a step's time.

    If it does not fit: the smallest changes that make it fit, and the largest model that does.""",
    ),
}
OTHERS = ("sample", "eval", "chat", "serve", "quantize", "export", "runs", "verify", "replay", "demo")
HELP = """Chat models from human feedback.

`kinkajou demo` shows the whole way in five minutes. A stage takes a recipe and flags that override it:
`kinkajou sft recipes/sft.toml --lr 1e-4`.
"""


def make_app(recipe: Sequence[Any] = ()) -> cyclopts.App:
    app = cyclopts.App(
        name="kinkajou",
        help=HELP,
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # `main` says "interrupted"
        config=list(recipe),
    )
    for name, (kind, summary) in STAGES.items():
        app.command(stage(name, kind, summary), name=name)
    for verb, borrowing in BORROWING.items():
        app.command(borrowing_app(verb, borrowing))
    app.command(eval_app())
    for plain in (sample, chat, serve, quantize, export, runs, verify, replay, demo):
        app.command(plain)
    return app


def stage(name: str, kind: type[Any], summary: str) -> Callable[..., None]:
    """A command `name [RECIPE] --flag value ...` over the fields of one config class."""

    def command(*, cfg: Any = None, print_config: bool = False) -> None:
        cfg = cfg or kind()  # an empty command line still names what is missing
        if print_config:
            print(config.to_toml({name: config.flat(cfg)}), end="")
            return
        from kinkajou.train import STARTERS

        STARTERS[name](cfg)  # type: ignore[operator]

    command.__doc__ = f"""{summary}

    Parameters
    ----------
    print_config
        Print the resolved settings as a recipe and leave.
    """
    command.__annotations__ = {
        "cfg": Annotated[grouped(kind) | None, Parameter(name="*")],
        "print_config": bool,
        "return": None,
    }
    return command


def borrowing_app(verb: str, borrowing: Borrowing) -> cyclopts.App:
    """The commands `VERB STAGE`; `VERB RECIPE` finds the stage in the recipe."""
    app = cyclopts.App(name=verb, help=borrowing.words)
    for name, (kind, _) in STAGES.items():
        app.command(borrowed(borrowing, name, kind), name=name)
    return app


def borrowed(borrowing: Borrowing, name: str, kind: type[Any]) -> Callable[..., None]:
    """A command `VERB name [RECIPE] --flag value ...`; `show` stands first, so that its flags do."""

    def command(*, show: Any = None, cfg: Any = None) -> None:
        from kinkajou import train

        getattr(train, borrowing.start)(cfg or kind(), show or borrowing.show())

    command.__doc__ = borrowing.of_stage.format(name=name)
    command.__annotations__ = {
        "show": Annotated[grouped(borrowing.show) | None, Parameter(name="*")],
        "cfg": Annotated[grouped(kind) | None, Parameter(name="*")],
        "return": None,
    }
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.  A `UserError` is printed as its sentence."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app = make_app(take_recipe(tokens))
        with without_pydantic():
            command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    except cyclopts.CycloptsError as fault:
        print(f"error: {fault}", file=sys.stderr)
        known = tokens[:1] if tokens and tokens[0] in (*STAGES, *BORROWING, *OTHERS) else []
        pairs = [["eval", "reward"], *([verb, name] for verb in BORROWING for name in STAGES)]
        known += tokens[1:2] if tokens[:2] in pairs else []
        print(f"  fix:  {' '.join(['kinkajou', *known, '--help'])}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def without_pydantic() -> Iterator[None]:
    """cyclopts also checks settings by pydantic if anybody has imported it: by their types, which those that a dialect
    fills in do not have yet.  A command must not depend on that."""
    found = sys.modules.pop("pydantic", None)
    try:
        yield
    finally:
        if found is not None:
            sys.modules["pydantic"] = found


def take_recipe(tokens: list[str]) -> list[Any]:
    """Removes the recipe of `[check | profile] STAGE RECIPE` from the tokens: a source below the flags."""
    verb = tokens[0] if tokens and tokens[0] in BORROWING else None
    if verb:
        name_stage(tokens)
    place = 1 if verb else 0
    if len(tokens) <= place or tokens[place] not in STAGES:
        return []
    stage = tokens[place]
    # Neither writes into the run's folder, so they need none.
    tables: list[dict[str, Any]] = [without_run(verb, stage)] if verb else []
    origin = [verb or stage]
    if len(tokens) > place + 1 and not tokens[place + 1].startswith("-"):
        path = Path(tokens.pop(place + 1))
        own = stage_table(path, stage)
        if verb:
            both = names_of(BORROWING[verb].show) & names_of(STAGES[stage][0])
            own = {key: value for key, value in own.items() if key not in both}
        tables, origin = [own, *tables], [str(path), *origin]
    return [
        cyclopts.config.Dict(
            {verb: {stage: table}} if verb else {stage: table}, source=source, use_commands_as_keys=True
        )
        for table, source in zip(tables, origin, strict=False)
    ]


def without_run(verb: str, stage: str) -> dict[str, Any]:
    """Settings that a run must be given, and this command can do without."""
    return {"output": config.NO_OUTPUT} | (config.NO_RECORDS[stage] if verb == "plan" else {})


def stage_table(path: Path, stage: str) -> dict[str, Any]:
    """A recipe's table of one stage, once all its tables are known."""
    tables = config.read_recipe(path)
    known = [*STAGES, "environment"]
    for name in tables:
        if name not in known:
            raise UserError(f"{path}: unknown table [{name}]", fix=did_you_mean(name, known))
    if stage not in tables:
        raise UserError(f"{path} has no table [{stage}]", evidence=f"it has: {', '.join(tables)}")
    config.check_texts(path, stage, tables[stage], STAGES[stage][0])
    return tables[stage]


def name_stage(tokens: list[str]) -> None:
    """`check RECIPE` and `check RECIPE --stage S` -> `check S RECIPE`; the other borrowing commands alike."""
    if "--stage" in tokens[:-1]:
        at = tokens.index("--stage")
        stage = tokens[at + 1]
        del tokens[at : at + 2]
        if stage not in STAGES:
            raise UserError(f"unknown stage {stage!r}", fix=did_you_mean(stage, list(STAGES)))
        tokens.insert(1, stage)
    elif len(tokens) > 1 and tokens[1] not in STAGES and not tokens[1].startswith("-"):
        tables = config.read_recipe(Path(tokens[1]))
        stages = [name for name in tables if name in STAGES]
        if len(stages) != 1:
            raise UserError(
                f"{tokens[1]} has {'several stages' if stages else 'no table of a stage'}",
                evidence=f"it has: {', '.join(tables) or 'nothing'}",
                fix=f"kinkajou {tokens[0]} {stages[0] if stages else 'sft'} {tokens[1]}",
            )
        tokens.insert(1, stages[0])
