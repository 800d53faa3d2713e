"""The scripts for one machine, Slurm and Kubernetes: they parse, and run here under a Slurm that the test plays."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from small import Small, metrics

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SRUN = """#!/usr/bin/env bash
# Runs the command once for each node of $NODES_UP, all on this machine.
while [[ $1 == --* ]]; do shift; done
code=0; pids=()
for node in $NODES_UP; do SLURM_NODEID=$node SLURMD_NODENAME=node0$((node + 1)) "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = "#!/usr/bin/env bash\necho 127.0.0.1\n"


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh", "train_sft.sh"])
def test_shell_parses(name: str) -> None:
    done = subprocess.run(["bash", "-n", EXAMPLES / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def kinds() -> dict[str, Any]:
    parts = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    return {part["kind"]: part for part in parts}


def test_pods_find_each_other_and_nobody_else_finds_them() -> None:
    parts = kinds()
    job, service, policy = parts["Job"]["spec"], parts["Service"], parts["NetworkPolicy"]["spec"]
    labels = job["template"]["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == labels == policy["podSelector"]["matchLabels"]
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]
    pod = job["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["completionMode"] == "Indexed"
    env = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    assert str(job["completions"]) == str(job["parallelism"]) == env["NODES"]
    assert env["KINKAJOU_HOSTS"].split(",") == [f"kinkajou-{i}" for i in range(job["completions"])]


def test_pods_have_no_privileges_and_limits() -> None:
    pod = kinds()["Job"]["spec"]["template"]["spec"]
    box = pod["containers"][0]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "hostNetwork" not in pod
    assert box["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory", "nvidia.com/gpu"} <= set(box["resources"]["limits"])
    mounted = {item["name"] for item in box["volumeMounts"]}
    assert mounted == {item["name"] for item in pod["volumes"]}
    script = box["args"][0]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    assert set(re.findall(r"\$([A-Z_]+)", script)) - {"JOB_COMPLETION_INDEX"} <= {item["name"] for item in box["env"]}


def sft(small: Small, output: Path, epochs: int) -> list[str]:
    words = ["--model", small.policy, "--data", small.chats, "--output", str(output), "--template", "plain"]
    return [*words, "--max_len", "48", "--epochs", str(epochs), "--batch_size", "8"]


def surroundings(tmp_path: Path, **changes: str) -> dict[str, str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    base = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    slurm = {
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "PER_NODE": "1",
    }
    return base | slurm | {"OMP_NUM_THREADS": "1", "NODES_UP": "0 1"} | changes


def test_slurm_names_the_node_that_is_not_there(small: Small, tmp_path: Path) -> None:
    command = ["bash", str(EXAMPLES / "slurm.sh"), *sft(small, tmp_path / "run", 1)]
    for up, want in (("0", "no word from rank 1 on node02"), ("1", "rank 0 does not answer: 127.0.0.1")):
        env = surroundings(tmp_path, NODES_UP=up, START_TIMEOUT="1")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert want in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_slurm_trains_on_two_nodes(small: Small, tmp_path: Path) -> None:
    command = ["bash", str(EXAMPLES / "slurm.sh"), *sft(small, tmp_path / "run", 1)]
    done = subprocess.run(command, env=surroundings(tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 node(s) answer over lo" in done.stdout
    assert len(metrics(tmp_path / "run")) == 5


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds rank 1 by Linux's /proc")
def test_a_run_that_lost_a_rank_starts_again_from_the_start(small: Small, tmp_path: Path) -> None:
    """The run is the same as one that nothing happened to."""
    env = surroundings(tmp_path, PER_NODE="2", RESTARTS="1")
    command = ["bash", str(EXAMPLES / "local.sh"), "sft", "--strategy", "ddp"]
    plain = subprocess.run([*command, *sft(small, tmp_path / "plain", 20)], env=env, capture_output=True, timeout=200)
    assert plain.returncode == 0
    words = sft(small, tmp_path / "broken", 20)
    running = subprocess.Popen(
        [*command, *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while len(lines(tmp_path / "broken" / "metrics.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(rank_1(str(tmp_path / "broken")), 9)
    _, err = running.communicate(timeout=200)
    assert running.returncode == 0, err[-3000:]
    assert "exitcode: -9" in err
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("plain", "broken")]
    assert losses[1] == losses[0]
    assert len(losses[0]) == 100


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def rank_1(word: str) -> int:
    """The process of rank 1 among those with this word on their command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, env = (folder / "cmdline").read_text().split("\0"), (folder / "environ").read_text().split("\0")
        except OSError:
            continue
        if word in command and "RANK=1" in env:
            return int(folder.name)
    raise AssertionError("rank 1 is not running")
