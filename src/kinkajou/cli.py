"""The command line.  Nothing heavy is imported before a command runs, so `--help` is quick."""

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import cyclopts
from cyclopts import Parameter

from kinkajou import __version__, config
from kinkajou.errors import UserError, did_you_mean

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
OTHERS = ("sample", "eval", "chat", "runs", "verify", "replay", "demo")
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
    app.command(sample)
    app.command(eval_app())
    app.command(chat)
    app.command(runs)
    app.command(verify)
    app.command(replay)
    app.command(demo)
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


def grouped(kind: type[Any]) -> type[Any]:
    """Marks every nested group so that its fields become flags without a prefix, and numbers as what they are."""
    for item in fields(kind):
        if isinstance(item.type, type) and is_dataclass(item.type):
            kind.__annotations__[item.name] = Annotated[grouped(item.type), Parameter(name="*")]
        elif item.type is int:
            kind.__annotations__[item.name] = Annotated[int, Parameter(converter=whole)]
        elif item.type == int | None:
            kind.__annotations__[item.name] = Annotated[int | None, Parameter(converter=whole_or_none)]
        elif item.type in (float, float | None):
            read = number if item.name in config.UNBOUNDED else finite
            kind.__annotations__[item.name] = Annotated[item.type, Parameter(converter=read)]
        elif item.type == tuple[str, ...]:  # --stop-on A B, or --stop-on A --stop-on B
            kind.__annotations__[item.name] = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
    return kind


def names_of(kind: type[Any]) -> set[str]:
    """The flags of a config class, those of its groups included."""
    found = set[str]()
    for item in fields(kind):
        found |= names_of(item.type) if isinstance(item.type, type) and is_dataclass(item.type) else {item.name}
    return found


def whole(kind: Any, tokens: Sequence[cyclopts.Token]) -> int:
    """A whole number of 64 bits, 1e3 included; cyclopts alone would make 2 of 2.5."""
    word, value = tokens[0].value, None
    with contextlib.suppress(ValueError):
        value = float(word)
        value = int(word)
    if value is not None and -(2**63) <= value < 2**63 and value == int(value):
        return int(value)
    raise unreadable(tokens[0], "int")


def number(kind: Any, tokens: Sequence[cyclopts.Token], *, most: float = math.inf) -> float | None:
    word = tokens[0].value
    if type(None) in get_args(kind) and word.lower() in ("none", "null"):
        return None
    with contextlib.suppress(ValueError):
        if abs(value := float(word)) <= most:  # which NaN is not
            return value
    raise unreadable(tokens[0], "float" if most == math.inf else "a finite number")


def finite(kind: Any, tokens: Sequence[cyclopts.Token]) -> float | None:
    """Infinity is refused where it means nothing: a learning rate of it would train garbage."""
    return number(kind, tokens, most=sys.float_info.max)


def unreadable(token: cyclopts.Token, kind: str) -> ValueError:
    place = "" if token.source in ("", "cli") else f" from {token.source}"
    return ValueError(f'unable to convert "{token.value}"{place} into {kind}')


def whole_or_none(kind: Any, tokens: Sequence[cyclopts.Token]) -> int | None:
    return None if tokens[0].value.lower() in ("none", "null") else whole(kind, tokens)


for plain in (config.ChatConfig, config.DemoConfig, config.EvalRewardConfig, config.SampleConfig):
    grouped(plain)


def sample(*, cfg: Annotated[config.SampleConfig | None, Parameter(name="*")] = None) -> None:
    """Answer prompts several times and write the best (or best against worst) as training data."""
    from kinkajou.train.sample import sample_data

    sample_data(cfg or config.SampleConfig())


def eval_app() -> cyclopts.App:
    """The commands `eval NAME`."""
    app = cyclopts.App(name="eval", help="Measure what was trained.")
    app.command(eval_reward, name="reward")
    return app


def eval_reward(*, cfg: Annotated[config.EvalRewardConfig | None, Parameter(name="*")] = None) -> None:
    """A reward model's health on held-out pairs: accuracy, calibration, length and format bias, subsets."""
    from kinkajou.train.eval_reward import eval_reward as show

    show(cfg or config.EvalRewardConfig())


def chat(folder: Path, *, cfg: Annotated[config.ChatConfig, Parameter(name="*")] | None = None) -> None:
    """Talk to a trained model in the terminal.

    Parameters
    ----------
    folder
        A model's folder or a run's.
    """
    from kinkajou.chat import talk

    talk(str(folder), cfg or config.ChatConfig())


def runs(folder: Path = Path("."), /, *, json: bool = False) -> None:
    """List the runs of a folder: state, step, newest whole checkpoint, best, last metrics.

    Parameters
    ----------
    folder
        A run's folder, or one with runs in it or one level below.
    json
        Print a JSON array instead of a table.
    """
    from kinkajou.runs import runs as show

    show(folder, as_json=json)


def verify(folder: Path, /, *, json: bool = False) -> None:
    """Check that checkpoints are what was written, file by file: exit code 0, or 4 where one is damaged.

    Parameters
    ----------
    folder
        A checkpoint, or a run's folder: all its checkpoints.
    json
        Print a JSON array instead of a table.
    """
    from kinkajou.verify import verify as show

    show(folder, as_json=json)


def replay(folder: Path, /) -> None:
    """Make the step that stopped a run once more, and say where it first goes wrong: exit code 1 if it does not.

    Parameters
    ----------
    folder
        What the run wrote: RUN/replay/step-000012.
    """
    from kinkajou.train.replay import replay as again

    again(folder)


def demo(*, cfg: Annotated[config.DemoConfig, Parameter(name="*")] | None = None) -> None:
    """SFT, reward model and PPO on a toy world with a checker that knows the truth."""
    from kinkajou.demo import run_demo

    run_demo(cfg or config.DemoConfig())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.  A `UserError` is printed as its sentence."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        make_app(take_recipe(tokens))(tokens, exit_on_error=False, print_error=False)
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
