"""The command line.  Nothing heavy is imported before a command runs, so `--help` is quick."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

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
    app.command(sample)
    app.command(eval_app())
    app.command(chat)
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


def grouped(kind: type[Any]) -> type[Any]:
    """Marks every nested group so that its fields become flags without a prefix, and whole numbers as such."""
    import dataclasses

    for item in dataclasses.fields(kind):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            kind.__annotations__[item.name] = Annotated[grouped(item.type), Parameter(name="*")]
        elif item.type is int:
            kind.__annotations__[item.name] = Annotated[int, Parameter(converter=whole)]
        elif item.type == int | None:
            kind.__annotations__[item.name] = Annotated[int | None, Parameter(converter=whole_or_none)]
        elif item.type == tuple[str, ...]:  # --stop-on A B, or --stop-on A --stop-on B
            kind.__annotations__[item.name] = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
    return kind


def whole(kind: Any, tokens: Sequence[cyclopts.Token]) -> int:
    """A whole number, 1e3 included; cyclopts alone would make 2 of 2.5."""
    word, source = tokens[0].value, tokens[0].source
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(ValueError):
        if float(word).is_integer():
            return int(float(word))
    place = "" if source in ("", "cli") else f" from {source}"
    raise ValueError(f'unable to convert "{word}"{place} into int')


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
        known = tokens[:1] if tokens and tokens[0] in (*STAGES, "sample", "eval", "chat", "demo") else []
        known += tokens[1:2] if tokens[:2] == ["eval", "reward"] else []
        print(f"  fix:  {' '.join(['kinkajou', *known, '--help'])}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def take_recipe(tokens: list[str]) -> list[Any]:
    """Removes `stage RECIPE`'s recipe from the tokens and returns it as a source below the flags."""
    if len(tokens) < 2 or tokens[0] not in STAGES or tokens[1].startswith("-"):
        return []
    path = Path(tokens.pop(1))
    tables = config.read_recipe(path)
    known = [*STAGES, "environment"]
    for name in tables:
        if name not in known:
            raise UserError(f"{path}: unknown table [{name}]", fix=did_you_mean(name, known))
    if tokens[0] not in tables:
        raise UserError(f"{path} has no table [{tokens[0]}]", evidence=f"it has: {', '.join(tables)}")
    table = {tokens[0]: tables[tokens[0]]}
    return [cyclopts.config.Dict(table, source=str(path), use_commands_as_keys=True)]
