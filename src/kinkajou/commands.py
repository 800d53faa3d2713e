"""The commands that are no stage of training.  Each imports its work when it runs, so that `--help` is quick."""

from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from kinkajou import config
from kinkajou.flags import grouped

TOOLS = (config.ChatConfig, config.DemoConfig, config.EvalRewardConfig, config.SampleConfig)
for kind in (*TOOLS, config.QuantizeConfig, config.ExportConfig, config.ServeConfig):
    grouped(kind)


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


def serve(*folders: str, cfg: Annotated[config.ServeConfig, Parameter(name="*")] | None = None) -> None:
    """Serve models over HTTP: an OpenAI-compatible API and a page to chat with them.

    Parameters
    ----------
    folders
        Models' folders or runs'; the first is the one that is asked where a request names none.
    """
    from kinkajou.serve.start import serve as run

    run(folders, cfg or config.ServeConfig())


def quantize(folder: Path, *, cfg: Annotated[config.QuantizeConfig, Parameter(name="*")] | None = None) -> None:
    """Write a model with int8 or 4-bit weights, if it still says what the original says.

    Parameters
    ----------
    folder
        A model's folder or a run's.
    """
    from kinkajou.quant.command import quantize as run

    run(str(folder), cfg or config.QuantizeConfig())


def export(folder: Path, *, cfg: Annotated[config.ExportConfig, Parameter(name="*")] | None = None) -> None:
    """Write a model for other programs: adapters folded in, or as a GGUF file.

    Parameters
    ----------
    folder
        A model's folder or a run's.
    """
    from kinkajou.quant.export import export as run

    run(str(folder), cfg or config.ExportConfig())


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
