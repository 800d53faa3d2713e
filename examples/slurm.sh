#!/usr/bin/env bash
# Kinkajou on several nodes under Slurm: one torchrun on each node, one process for each GPU.
#
#   RECIPE=recipes/sft.toml INTERFACE=ib0 sbatch --nodes=4 --gpus-per-node=8 examples/slurm.sh --output runs/sft
#
# What follows the script's name goes to kinkajou. Read from the environment:
#   RECIPE         the recipe, or a recipe of flags alone (then leave it out)
#   STAGE          sft, reward, prefer, ppo or grpo (sft)
#   STRATEGY       ddp, zero2, zero2_cpu, zero3 or gemini (zero3)
#   INTERFACE      network interface of all traffic between nodes, by its name (the one that leads to the first node)
#   PER_NODE       processes on each node (its GPUs, else 1)
#   START_TIMEOUT  seconds until a node that does not answer is named and the job ends (60)
#   RESTARTS       how often a run that lost a process starts again (3)
#   PYTHON         the Python with kinkajou in it, on a disk that all nodes see (python)
#
#SBATCH --job-name=kinkajou
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

export STAGE=${STAGE:-sft} RECIPE=${RECIPE:-} STRATEGY=${STRATEGY:-zero3} INTERFACE=${INTERFACE:-}
export PER_NODE=${PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} START_TIMEOUT=${START_TIMEOUT:-60} RESTARTS=${RESTARTS:-3}
export PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / PER_NODE > 0 ? ${SLURM_CPUS_PER_TASK:-1} / PER_NODE : 1))}

MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs on a node need two ports. These lie below those that systems hand out by themselves.
PORT=$((10000 + SLURM_JOB_ID % 10000 * 2))
export MAIN PORT

# torchrun would wait for a node without saying for which, so the nodes call each other first.
srun --kill-on-bad-exit=1 bash -c 'exec "$PYTHON" -m kinkajou.parallel.check_nodes \
    --nodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --master_addr "$MAIN" --master_port $((PORT + 1)) \
    --interface "$INTERFACE" --start_timeout_s "$START_TIMEOUT"'

# torchrun itself listens at $PORT of the first node, on all its interfaces. All else keeps to the one interface: hence
# the addresses, and a table of the processes that lies with rank 0 instead of torchrun.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
ADDRESS='import sys; from kinkajou.parallel.interfaces import address_of, leads_to
print(address_of(sys.argv[1] or leads_to(sys.argv[2], 1)))'
export ADDRESS

# The bounds are of torchrun's own waits; by default it waits ten minutes.
srun --kill-on-bad-exit=1 bash -c '
    set -eu
    [ "$SLURM_NODEID" = 0 ] && host=1 || host=0
    address=$("$PYTHON" -c "$ADDRESS" "$INTERFACE" "$MAIN")
    exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc_per_node "$PER_NODE" \
        --rdzv_backend c10d --rdzv_endpoint "$MAIN:$PORT" --rdzv_id "$SLURM_JOB_ID" --local_addr "$address" \
        --rdzv_conf "is_host=$host,join_timeout=$START_TIMEOUT,read_timeout=$START_TIMEOUT" \
        --max_restarts "$RESTARTS" \
        -m kinkajou "$STAGE" ${RECIPE:+"$RECIPE"} --strategy "$STRATEGY" ${INTERFACE:+--interface "$INTERFACE"} \
        --start_timeout_s "$START_TIMEOUT" "$@"' kinkajou "$@"
