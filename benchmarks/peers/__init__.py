"""Other frameworks, each installed in a folder of its own and run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".peers"
VERSIONS = {"trl-1.12": "1.12.0", "trl-1.16": "1.16.0"}
BESIDE = (
    *("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0", "pandas==3.1.1"),
    *("python-dateutil==4.0.0", "six==1.17.0", "aiohttp==3.14.5"),
)
"""What TRL imports and the project does not; everything else comes from the project's own environment."""


def installed(name: str) -> bool:
    return (FOLDER / name / "trl").is_dir()


def install() -> None:
    """Each version of TRL by pip into its own folder, without dependencies: torch and transformers stay ours."""
    for name, version in VERSIONS.items():
        if installed(name):
            print(f"{name}: already there")
            continue
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER / name)]
        subprocess.run([*pip, f"trl=={version}", *BESIDE], check=True)


def run(name: str, script: str, folder: Path) -> None:
    """Runs a script of this package with the peer's folder first on the path; it reads and writes `folder`."""
    paths = [str(FOLDER / name), os.environ.get("PYTHONPATH", "")]
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | quiet | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).parent / script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {script} failed:\n{done.stderr[-4000:]}")
